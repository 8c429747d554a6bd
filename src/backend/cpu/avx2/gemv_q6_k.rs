//! Q6_K by Q8 activations: `d * scale * dx * (dot(q, x) - 32 * sum(x))`, four lanes to a scale of 16 weights.

use std::arch::x86_64::*;

use super::{load, nibbles, splat_half};
use crate::quant::BlockQ6K;

struct Prepared {
    q: [__m256i; 8],
    offset: [__m256i; 8],
    d: __m256,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 256], d: &[f32; 8], _: &[f32; 8]) -> Prepared {
    let q = bytemuck::cast_ref::<_, [[i8; 32]; 8]>(q)
        .each_ref()
        .map(|q| load(q));
    let offset = q.map(|q| _mm256_maddubs_epi16(_mm256_set1_epi8(32), q));
    let d = _mm256_castsi256_ps(load(d));
    Prepared { q, offset, d }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ6K; 1], x: &Prepared, mut sum: __m256) -> __m256 {
    let [w] = w;
    let ql: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.ql);
    let qh: &[[u8; 32]; 2] = bytemuck::cast_ref(&w.qh);
    let d = _mm256_mul_ps(x.d, splat_half(w.d));
    let upper = |bits| _mm256_and_si256(bits, _mm256_set1_epi8(0x30));
    for half in 0..2 {
        let (low_a, high_a) = nibbles(load(&ql[2 * half]));
        let (low_b, high_b) = nibbles(load(&ql[2 * half + 1]));
        let bits = load(&qh[half]);
        let q = [
            _mm256_or_si256(low_a, upper(_mm256_slli_epi16::<4>(bits))),
            _mm256_or_si256(low_b, upper(_mm256_slli_epi16::<2>(bits))),
            _mm256_or_si256(high_a, upper(bits)),
            _mm256_or_si256(high_b, upper(_mm256_srli_epi16::<2>(bits))),
        ];
        for (i, q) in q.into_iter().enumerate() {
            let i = 4 * half + i;
            let dot = _mm256_sub_epi16(_mm256_maddubs_epi16(q, x.q[i]), x.offset[i]);
            // The 16-bit sums times their scales, exactly: at most 2 * 8128 * 128.
            let scales = _mm256_setr_m128i(
                _mm_set1_epi16(w.scales[2 * i].into()),
                _mm_set1_epi16(w.scales[2 * i + 1].into()),
            );
            let dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dot, scales));
            let d = _mm256_permutevar8x32_ps(d, _mm256_set1_epi32(i as i32));
            sum = _mm256_fmadd_ps(dot, d, sum);
        }
    }
    sum
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ6K, 1);
