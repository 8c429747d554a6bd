//! Q4_1: `w[i] = d * q[i] + m`.

use std::arch::aarch64::*;

use super::{gather_u16, halves, nibbles};
pub(crate) use crate::quant::BlockQ4_1 as Block;

pub(crate) type Unit = [Block; 4];
pub(crate) const GROUPS: usize = 4;
pub(crate) const SCALES: usize = 1;
pub(crate) const MINS: usize = SCALES;
pub(crate) const OFFSET: i32 = 0;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack(w: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let codes = |w: &Block| {
        let [low, high] = nibbles(&w.qs);
        [vreinterpretq_s8_u8(low), vreinterpretq_s8_u8(high)]
    };
    [codes(&w[0]), codes(&w[1]), codes(&w[2]), codes(&w[3])]
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn scales(w: &Unit) -> [float32x4_t; SCALES] {
    [halves(gather_u16([&w[0].d, &w[1].d, &w[2].d, &w[3].d]))]
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn mins(w: &Unit) -> [float32x4_t; MINS] {
    [halves(gather_u16([&w[0].m, &w[1].m, &w[2].m, &w[3].m]))]
}
