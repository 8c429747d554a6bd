//! Q5_K by Q8 activations, many tokens. |w| <= 31 bounds the chain of 16-bit sums.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles_of};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ5K;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ5K, 1, true, 2>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack(w: &BlockQ5K, group: usize) -> (__m256i, Scales) {
    let (scales, mins) = w.scales_mins();
    let scales = Scales {
        d: [float(w.d) * f32::from(scales[group]); 2],
        m: -float(w.dmin) * f32::from(mins[group]),
    };
    let q = nibbles_of(&w.qs, group);
    let which = _mm256_set1_epi8(1 << group);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(super::load(&w.qh), which), which);
    let fifth = _mm256_and_si256(set, _mm256_set1_epi8(16));
    (_mm256_or_si256(q, fifth), scales)
}
