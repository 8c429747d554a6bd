//! Q5_K by Q8 activations, many tokens.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles_of};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ5K;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ5K, 1, true>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn unpack(w: &BlockQ5K, group: usize) -> (__m256i, Scales) {
    let (scales, mins) = w.scales_mins();
    let scales = Scales {
        d: [float(w.d) * f32::from(scales[group]); 2],
        m: -float(w.dmin) * f32::from(mins[group]),
    };
    let q = nibbles_of(&w.qs, group);
    let set = _mm256_test_epi8_mask(super::load256(&w.qh), _mm256_set1_epi8(1 << group));
    (
        _mm256_mask_add_epi8(q, set, q, _mm256_set1_epi8(16)),
        scales,
    )
}
