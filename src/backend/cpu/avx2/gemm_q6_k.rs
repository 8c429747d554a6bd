//! Q6_K by Q8 activations, many tokens. |w| <= 32 bounds the chain of 16-bit sums.

use std::arch::x86_64::*;

use super::gemm::{self, Scales, float};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::BlockQ6K;

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn gemm(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::gemm::<BlockQ6K, 2, false, 2>(w, x, y, |w, group| unpack(w, group));
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack(w: &BlockQ6K, group: usize) -> (__m256i, Scales) {
    // 128 weights, four groups, take 64 bytes of `ql` and 32 of `qh`.
    let (half, i) = (group / 4, group % 4);
    let ql: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.ql);
    let qh: &[[u8; 32]; 2] = bytemuck::cast_ref(&w.qh);
    let low = _mm256_srl_epi16(
        super::load(&ql[(2 * half + i % 2) % 4]),
        _mm_cvtsi32_si128(4 * (i as i32 / 2)),
    );
    let high = _mm256_srl_epi16(super::load(&qh[half % 2]), _mm_cvtsi32_si128(2 * i as i32));
    let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
    let high = _mm256_and_si256(high, _mm256_set1_epi8(3));
    let q = _mm256_or_si256(low, _mm256_slli_epi16::<4>(high));
    let d = float(w.d);
    let scales = [w.scales[2 * group], w.scales[2 * group + 1]];
    let scales = Scales {
        d: scales.map(|scale| d * f32::from(scale)),
        m: 0.0,
    };
    (_mm256_sub_epi8(q, _mm256_set1_epi8(32)), scales)
}
