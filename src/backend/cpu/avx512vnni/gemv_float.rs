//! F16, BF16 and F32 by float activations.

use std::arch::x86_64::*;

use bytemuck::Pod;

use super::floats as v;
use super::load256;
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::backend::cpu::x86::gemv::gemv_float;
use crate::quant::{Block, BlockBF16, BlockF16, BlockF32, blocks};

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn widen_f16<T: Pod>(w: &T) -> __m512 {
    _mm512_cvtph_ps(load256(w))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn widen_bf16<T: Pod>(w: &T) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load256(w))))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn widen_f32(w: &[BlockF32; 16]) -> __m512 {
    v::load(bytemuck::cast_ref::<_, [f32; 16]>(w))
}

gemv_float!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    f16,
    BlockF16,
    widen_f16
);
gemv_float!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    bf16,
    BlockBF16,
    widen_bf16
);
gemv_float!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    f32,
    BlockF32,
    widen_f32
);
