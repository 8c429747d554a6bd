//! Q6_K by Q8 activations: `d * scale * dx * (dot(q, x) - 32 * sum(x))`, four lanes to a scale of 16 weights.

use std::arch::x86_64::*;

use super::{load, nibbles, pairs, splat_half, spread};
use crate::quant::BlockQ6K;

struct Prepared {
    q: [__m256i; 8],
    offset: [__m256i; 8],
    /// The scales, each twice.
    d: [__m256; 2],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 256], d: &[f32; 8], _: &[f32; 8]) -> Prepared {
    let groups: &[[i8; 32]; 8] = bytemuck::cast_ref(q);
    let mut q = [_mm256_setzero_si256(); 8];
    let mut offset = q;
    for ((q, offset), group) in q.iter_mut().zip(&mut offset).zip(groups) {
        *q = load(group);
        *offset = _mm256_maddubs_epi16(_mm256_set1_epi8(32), *q);
    }
    let d = _mm256_castsi256_ps(load(d));
    let low = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    let high = _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7);
    let d = [
        _mm256_permutevar8x32_ps(d, low),
        _mm256_permutevar8x32_ps(d, high),
    ];
    Prepared { q, offset, d }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ6K; 1], x: &Prepared, mut sum: __m256) -> __m256 {
    let [w] = w;
    let ql: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.ql);
    let qh: &[[u8; 32]; 2] = bytemuck::cast_ref(&w.qh);
    let d = splat_half(w.d);
    let scales: &[[i8; 8]; 2] = bytemuck::cast_ref(&w.scales);
    let upper = _mm256_set1_epi8(0x30);
    for half in 0..2 {
        let scales = _mm_cvtsi64_si128(i64::from_le_bytes(bytemuck::cast(scales[half])));
        let scales = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(scales));
        let scales = _mm256_mul_ps(_mm256_mul_ps(scales, d), x.d[half]);
        let (low_a, high_a) = nibbles(load(&ql[2 * half]));
        let (low_b, high_b) = nibbles(load(&ql[2 * half + 1]));
        let bits = load(&qh[half]);
        let up_4 = _mm256_and_si256(_mm256_slli_epi16::<4>(bits), upper);
        let up_2 = _mm256_and_si256(_mm256_slli_epi16::<2>(bits), upper);
        let down_2 = _mm256_and_si256(_mm256_srli_epi16::<2>(bits), upper);
        let i = 4 * half;
        let a = dot32(_mm256_or_si256(low_a, up_4), x, i);
        let b = dot32(_mm256_or_si256(low_b, up_2), x, i + 1);
        let c = dot32(
            _mm256_or_si256(high_a, _mm256_and_si256(bits, upper)),
            x,
            i + 2,
        );
        let e = dot32(_mm256_or_si256(high_b, down_2), x, i + 3);
        sum = _mm256_fmadd_ps(a, spread::<0, 1>(scales), sum);
        sum = _mm256_fmadd_ps(b, spread::<2, 3>(scales), sum);
        sum = _mm256_fmadd_ps(c, spread::<4, 5>(scales), sum);
        sum = _mm256_fmadd_ps(e, spread::<6, 7>(scales), sum);
    }
    sum
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot32(q: __m256i, x: &Prepared, i: usize) -> __m256 {
    let dot = _mm256_maddubs_epi16(q, x.q[i]);
    pairs(_mm256_sub_epi16(dot, x.offset[i]))
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ6K, 1);
