//! Q8_0: `w[i] = d * q[i]`.

use std::arch::aarch64::*;

use super::{gather_u16, halves, load_i8};
pub(crate) use crate::quant::BlockQ8_0 as Block;

pub(crate) type Unit = [Block; 4];
pub(crate) const GROUPS: usize = 4;
pub(crate) const SCALES: usize = 1;
pub(crate) const MINS: usize = 0;
pub(crate) const OFFSET: i32 = 0;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack(w: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let codes = |w: &Block| {
        let [a, b] = bytemuck::cast_ref::<_, [[i8; 16]; 2]>(&w.qs);
        [load_i8(a), load_i8(b)]
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
pub(crate) fn mins(_: &Unit) -> [float32x4_t; MINS] {
    []
}
