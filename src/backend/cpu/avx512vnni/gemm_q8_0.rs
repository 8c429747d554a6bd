//! Q8_0 by Q8 activations, many tokens.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ8_0;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ8_0, 1, false>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn unpack(w: &BlockQ8_0, _: usize) -> (__m256i, Scales) {
    let d = float(w.d);
    (super::load256(&w.qs), Scales { d: [d; 2], m: 0.0 })
}
