//! Q4_K by Q8 activations, many tokens. |w| <= 15 bounds the chain of 16-bit sums.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float, nibbles_of};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ4K;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ4K, 1, true, 4>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack(w: &BlockQ4K, group: usize) -> (__m256i, Scales) {
    let (scales, mins) = w.scales_mins();
    let scales = Scales {
        d: [float(w.d) * f32::from(scales[group]); 2],
        m: -float(w.dmin) * f32::from(mins[group]),
    };
    (nibbles_of(&w.qs, group), scales)
}
