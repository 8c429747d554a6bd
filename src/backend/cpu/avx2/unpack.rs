//! 32 weights of the formats that have no kernels of their own, as signed bytes and scales: for the loops of
//! [`gemm`](super::gemm), here and with AVX-512, and of [`gemv_unpacked`](super::gemv_unpacked).

use std::arch::x86_64::*;

use super::gemm::{Scales, float, nibbles32};
use super::{load, load128, sixteen_where};
use crate::quant::{
    BlockIQ4NL, BlockIQ4XS, BlockMXFP4, BlockQ3K, BlockQ5_1, BlockTQ2_0, KVALUES_IQ4NL,
    KVALUES_MXFP4,
};

/// The values that 32 codes of four bits stand for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn look_up(values: &[i8; 16], codes: __m256i) -> __m256i {
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(values)), codes)
}

/// Two bits of each of 32 weights: 32 bytes serve four groups.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn two_bits(qs: &[u8; 64], group: usize) -> __m256i {
    let bytes: &[[u8; 32]; 2] = bytemuck::cast_ref(qs);
    let shift = _mm_cvtsi32_si128(2 * (group as i32 % 4));
    let x = _mm256_srl_epi16(load(&bytes[group / 4 % 2]), shift);
    _mm256_and_si256(x, _mm256_set1_epi8(3))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn q5_1(w: &BlockQ5_1, _: usize) -> (__m256i, Scales) {
    let fifth = sixteen_where(u32::from_le_bytes(w.qh));
    let q = _mm256_or_si256(nibbles32(&w.qs), fifth);
    let (d, m) = (float(w.d), float(w.m));
    (q, Scales { d: [d; 2], m })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn q3_k(w: &BlockQ3K, group: usize) -> (__m256i, Scales) {
    let third = _mm256_srl_epi16(load(&w.hmask), _mm_cvtsi32_si128(group as i32));
    let third = _mm256_and_si256(third, _mm256_set1_epi8(1));
    let q = _mm256_or_si256(two_bits(&w.qs, group), _mm256_slli_epi16::<2>(third));
    let d = float(w.d);
    let scale = |i: usize| d * f32::from(w.scale(2 * group + i));
    let scales = Scales {
        d: [scale(0), scale(1)],
        m: 0.0,
    };
    (_mm256_sub_epi8(q, _mm256_set1_epi8(4)), scales)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn iq4_nl(w: &BlockIQ4NL, _: usize) -> (__m256i, Scales) {
    let d = float(w.d);
    let q = look_up(&KVALUES_IQ4NL, nibbles32(&w.qs));
    (q, Scales { d: [d; 2], m: 0.0 })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn iq4_xs(w: &BlockIQ4XS, group: usize) -> (__m256i, Scales) {
    let d = float(w.d) * f32::from(w.scales()[group]);
    let qs: &[[u8; 16]; 8] = bytemuck::cast_ref(&w.qs);
    let q = look_up(&KVALUES_IQ4NL, nibbles32(&qs[group]));
    (q, Scales { d: [d; 2], m: 0.0 })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn mxfp4(w: &BlockMXFP4, _: usize) -> (__m256i, Scales) {
    let d = w.scale();
    let q = look_up(&KVALUES_MXFP4, nibbles32(&w.qs));
    (q, Scales { d: [d; 2], m: 0.0 })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in crate::backend::cpu) fn tq2_0(w: &BlockTQ2_0, group: usize) -> (__m256i, Scales) {
    let d = float(w.d);
    let q = _mm256_sub_epi8(two_bits(&w.qs, group), _mm256_set1_epi8(1));
    (q, Scales { d: [d; 2], m: 0.0 })
}
