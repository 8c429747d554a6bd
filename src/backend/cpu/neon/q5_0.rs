//! Q5_0: `w[i] = d * (q[i] - 16)`.

use std::arch::aarch64::*;

use super::{gather_u16, halves, load_u8, nibbles};
pub(crate) use crate::quant::BlockQ5_0 as Block;

pub(crate) type Unit = [Block; 4];
pub(crate) const GROUPS: usize = 4;
pub(crate) const SCALES: usize = 1;
pub(crate) const MINS: usize = 0;
/// `unpack` has subtracted it.
pub(crate) const OFFSET: i32 = 0;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack(w: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let bits = load_u8(&[1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128]);
    // Bytes 0 and 1, 2 and 3 of the fifth bits, each eight times.
    let first = load_u8(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]);
    let last = load_u8(&[2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3]);
    let code = |nibble, fifth| {
        // A fifth bit that is not set makes the nibble negative: minus 16.
        let sign = vbicq_u8(vdupq_n_u8(0xf0), vtstq_u8(fifth, bits));
        vreinterpretq_s8_u8(vorrq_u8(nibble, sign))
    };
    let codes = |w: &Block| {
        let [low, high] = nibbles(&w.qs);
        let fifth = vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(w.qh)));
        let fifth_low = vqtbl1q_u8(fifth, first);
        let fifth_high = vqtbl1q_u8(fifth, last);
        [code(low, fifth_low), code(high, fifth_high)]
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
