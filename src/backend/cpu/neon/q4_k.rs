//! Q4_K: `w[i] = d * scale * q[i] - dmin * min`, eight scales and minima of 6 bits to a super-block.

use std::arch::aarch64::*;

use super::{nibbles, splat_half};
pub(crate) use crate::quant::BlockQ4K as Block;

pub(crate) type Unit = [Block; 1];
pub(crate) const GROUPS: usize = 8;
pub(crate) const SCALES: usize = 2;
pub(crate) const MINS: usize = SCALES;
pub(crate) const OFFSET: i32 = 0;

#[inline]
#[target_feature(enable = "neon")]
pub(crate) fn unpack([w]: &Unit) -> [[int8x16_t; 2]; GROUPS] {
    let qs: &[[[u8; 16]; 2]; 4] = bytemuck::cast_ref(&w.qs);
    let mut codes = [[vdupq_n_s8(0); 2]; GROUPS];
    for (i, qs) in qs.iter().enumerate() {
        for (half, qs) in qs.iter().enumerate() {
            let [low, high] = nibbles(qs);
            codes[2 * i][half] = vreinterpretq_s8_u8(low);
            codes[2 * i + 1][half] = vreinterpretq_s8_u8(high);
        }
    }
    codes
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

#[inline]
fn words(packed: &[u8; 12]) -> [u32; 3] {
    bytemuck::cast::<_, [[u8; 4]; 3]>(*packed).map(u32::from_le_bytes)
}

/// The eight 6-bit scales of Q4_K and Q5_K: the layout is told in `quant/q4_k.rs`.
#[inline]
pub(super) fn scale_bytes(packed: &[u8; 12]) -> u64 {
    let [a, _, c] = words(packed);
    let last = c & 0x0f0f_0f0f | (a >> 2) & 0x3030_3030;
    u64::from(a & 0x3f3f_3f3f) | u64::from(last) << 32
}

/// The eight 6-bit minima of Q4_K and Q5_K.
#[inline]
pub(super) fn min_bytes(packed: &[u8; 12]) -> u64 {
    let [_, b, c] = words(packed);
    let last = (c >> 4) & 0x0f0f_0f0f | (b >> 2) & 0x3030_3030;
    u64::from(b & 0x3f3f_3f3f) | u64::from(last) << 32
}

/// `factor` times eight bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn six_bits(bytes: u64, factor: float32x4_t) -> [float32x4_t; 2] {
    let wide = vmovl_u8(vcreate_u8(bytes));
    let times = |x| vmulq_f32(vcvtq_f32_u32(x), factor);
    [
        times(vmovl_u16(vget_low_u16(wide))),
        times(vmovl_high_u16(wide)),
    ]
}
