//! Q8_0 by Q8 activations: `d * dx * dot(w, x)`, four blocks at a time. The sign of `w` moves to `x`, since `maddubs`
//! wants one side unsigned; |w| <= 128 and |x| <= 127 keep pairs in 16 bits.

use std::arch::x86_64::*;

use super::{halves, load, load128, pairs};
use crate::quant::BlockQ8_0;

struct Prepared {
    q: [__m256i; 4],
    d: __m128,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let q = bytemuck::cast_ref::<_, [[i8; 32]; 4]>(q)
        .each_ref()
        .map(|q| load(q));
    let d = _mm_castsi128_ps(load128(d));
    Prepared { q, d }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ8_0; 4], x: &Prepared, mut sum: __m256) -> __m256 {
    let d = _mm_mul_ps(halves([w[0].d, w[1].d, w[2].d, w[3].d]), x.d);
    let d = _mm256_castps128_ps256(d);
    for (i, w) in w.iter().enumerate() {
        let w = load(&w.qs);
        let dot = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x.q[i], w));
        let d = _mm256_permutevar8x32_ps(d, _mm256_set1_epi32(i as i32));
        sum = _mm256_fmadd_ps(pairs(dot), d, sum);
    }
    sum
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ8_0, 4);
