//! F16, BF16 and F32 by float activations.

use std::arch::x86_64::*;

use bytemuck::Pod;

use super::floats as v;
use super::load128;
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::backend::cpu::x86::gemv::gemv_float;
use crate::quant::{Block, BlockBF16, BlockF16, BlockF32, blocks};

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_f16<T: Pod>(w: &T) -> __m256 {
    _mm256_cvtph_ps(load128(w))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_bf16<T: Pod>(w: &T) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load128(w))))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_f32(w: &[BlockF32; 8]) -> __m256 {
    v::load(bytemuck::cast_ref::<_, [f32; 8]>(w))
}

gemv_float!("avx2,fma,f16c", f16, BlockF16, widen_f16);
gemv_float!("avx2,fma,f16c", bf16, BlockBF16, widen_bf16);
gemv_float!("avx2,fma,f16c", f32, BlockF32, widen_f32);
