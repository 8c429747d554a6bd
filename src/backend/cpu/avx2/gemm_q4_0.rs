//! Q4_0 by Q8 activations, many tokens. |w| <= 8 bounds the chain of 16-bit sums.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles32};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ4_0;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ4_0, 1, false, 8>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack(w: &BlockQ4_0, _: usize) -> (__m256i, Scales) {
    let q = _mm256_sub_epi8(nibbles32(&w.qs), _mm256_set1_epi8(8));
    let d = float(w.d);
    (q, Scales { d: [d; 2], m: 0.0 })
}
