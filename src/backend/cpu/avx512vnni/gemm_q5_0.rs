//! Q5_0 by Q8 activations, many tokens.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles32};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ5_0;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ5_0, 1, false>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn unpack(w: &BlockQ5_0, _: usize) -> (__m256i, Scales) {
    // Minus 16 where the fifth bit is clear.
    let fifth = u32::from_le_bytes(w.qh);
    let q = nibbles32(&w.qs);
    let q = _mm256_mask_sub_epi8(q, !fifth, q, _mm256_set1_epi8(16));
    let d = float(w.d);
    (q, Scales { d: [d; 2], m: 0.0 })
}
