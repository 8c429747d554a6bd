//! Products of quantized weights and 8-bit activations, by `sdot`.

use std::arch::aarch64::*;

use super::sdot;

/// Products of 32 codes and activations in four partial sums.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot32(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    sdot(dot16(w[0], x[0]), w[1], x[1])
}

/// Products of 16 codes and activations in four partial sums.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot16(w: int8x16_t, x: int8x16_t) -> int32x4_t {
    sdot(vdupq_n_s32(0), w, x)
}

crate::backend::cpu::neon::gemv_rows!("neon,dotprod": q4_0, q4_1, q5_0, q8_0, q4_k, q5_k, q6_k);
