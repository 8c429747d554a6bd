//! Q6_K: `w[i] = d * scale * (q[i] - 32)`, a scale of 8 bits per 16 weights.

use std::arch::aarch64::*;

use super::{floats, load_i8, load_u8, nibbles, splat_half};
pub(crate) use crate::quant::BlockQ6K as Block;

pub(crate) type Unit = [Block; 1];
pub(crate) const GROUPS: usize = 8;
pub(crate) const SCALES: usize = 4;
pub(crate) const MINS: usize = 0;
pub(crate) const OFFSET: i32 = 32;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack([w]: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let ql: &[[[u8; 16]; 4]; 2] = bytemuck::cast_ref(&w.ql);
    let qh: &[[[u8; 16]; 2]; 2] = bytemuck::cast_ref(&w.qh);
    let upper = vdupq_n_u8(0x30);
    let mut codes = [[vdupq_n_s8(0); 2]; GROUPS];
    for half in 0..2 {
        for i in 0..2 {
            // Bits 0 and 1 of `bits` belong to the first 32 of 128 weights, and so on.
            let bits = load_u8(&qh[half][i]);
            let [first, third] = nibbles(&ql[half][i]);
            let [second, fourth] = nibbles(&ql[half][2 + i]);
            let code = |low, high| vreinterpretq_s8_u8(vorrq_u8(low, vandq_u8(high, upper)));
            codes[4 * half][i] = code(first, vshlq_n_u8::<4>(bits));
            codes[4 * half + 1][i] = code(second, vshlq_n_u8::<2>(bits));
            codes[4 * half + 2][i] = code(third, bits);
            codes[4 * half + 3][i] = code(fourth, vshrq_n_u8::<2>(bits));
        }
    }
    codes
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn scales([w]: &Unit) -> [float32x4_t; SCALES] {
    let d = splat_half(w.d);
    let [a, b, c, e] = floats(load_i8(&w.scales));
    [
        vmulq_f32(a, d),
        vmulq_f32(b, d),
        vmulq_f32(c, d),
        vmulq_f32(e, d),
    ]
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn mins(_: &Unit) -> [float32x4_t; MINS] {
    []
}
