//! Q5_0 by Q8 activations, many tokens. |w| <= 16 bounds the chain of 16-bit sums.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles32};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ5_0;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ5_0, 1, false, 4>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack(w: &BlockQ5_0, _: usize) -> (__m256i, Scales) {
    // Minus 16 where the fifth bit is clear.
    let fifth = u32::from_le_bytes(w.qh);
    let q = nibbles32(&w.qs);
    let q = _mm256_sub_epi8(q, super::sixteen_where(!fifth));
    let d = float(w.d);
    (q, Scales { d: [d; 2], m: 0.0 })
}
