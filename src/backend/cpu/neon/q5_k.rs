//! Q5_K: as Q4_K, with a fifth bit to each code.

use std::arch::aarch64::*;

use super::q4_k::{min_bytes, scale_bytes, six_bits};
use super::{load_u8, nibbles, splat_half};
pub(crate) use crate::quant::BlockQ5K as Block;

pub(crate) type Unit = [Block; 1];
pub(crate) const GROUPS: usize = 8;
pub(crate) const SCALES: usize = 2;
pub(crate) const MINS: usize = SCALES;
pub(crate) const OFFSET: i32 = 0;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack([w]: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let qs: &[[[u8; 16]; 2]; 4] = bytemuck::cast_ref(&w.qs);
    let qh: &[[u8; 16]; 2] = bytemuck::cast_ref(&w.qh);
    let mut codes = [[vdupq_n_s8(0); 2]; GROUPS];
    for half in 0..2 {
        // The fifth bits of all groups, the next one's always lowest.
        let mut fifth = load_u8(&qh[half]);
        for i in 0..4 {
            let [low, high] = nibbles(&qs[i][half]);
            // Inserts bit 0 of `fifth` over the nibble's four.
            codes[2 * i][half] = vreinterpretq_s8_u8(insert(low, fifth));
            codes[2 * i + 1][half] = vreinterpretq_s8_u8(insert(high, vshrq_n_u8::<1>(fifth)));
            fifth = vshrq_n_u8::<2>(fifth);
        }
    }
    codes
}

/// `nibble`, and bit 0 of `fifth` as its bit 4.
#[inline]
#[target_feature(enable = "neon")]
fn insert(nibble: uint8x16_t, fifth: uint8x16_t) -> uint8x16_t {
    vsliq_n_u8::<4>(nibble, vandq_u8(fifth, vdupq_n_u8(1)))
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn scales([w]: &Unit) -> [float32x4_t; SCALES] {
    six_bits(scale_bytes(&w.scales), splat_half(w.d))
}

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn mins([w]: &Unit) -> [float32x4_t; MINS] {
    six_bits(min_bytes(&w.scales), vnegq_f32(splat_half(w.dmin)))
}
