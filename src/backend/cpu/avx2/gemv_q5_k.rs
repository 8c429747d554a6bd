//! Q5_K by Q8 activations: `d * scale * dx * dot(q, x) - dmin * min * dx * sum(x)`.

use std::arch::x86_64::*;

use super::{Acts8, load, load128, nibbles};
use crate::quant::BlockQ5K;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Acts8 {
    Acts8::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ5K; 1], x: &Acts8, sum: __m256) -> __m256 {
    let [w] = w;
    let [first, last]: &[[u8; 16]; 2] = bytemuck::cast_ref(&w.qh);
    let first = _mm256_broadcastsi128_si256(load128(first));
    let last = _mm256_broadcastsi128_si256(load128(last));
    let qs: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.qs);
    let q = [0, 1].map(|half| {
        let (a, b) = (load(&qs[2 * half]), load(&qs[2 * half + 1]));
        // The first and the last 16 weights of two pairs of groups: even groups in the low nibbles, odd ones in the high.
        let (first_even, first_odd) = nibbles(_mm256_permute2x128_si256::<0x20>(a, b));
        let (last_even, last_odd) = nibbles(_mm256_permute2x128_si256::<0x31>(a, b));
        // Group i has its fifth bits in bit i; the upper lanes are two groups on.
        let bits = |x: __m256i, i: i64| {
            let to_fifth = _mm256_setr_epi64x(i, i, i + 2, i + 2);
            let fifth = _mm256_set1_epi8(16);
            let up = _mm256_sllv_epi64(x, _mm256_sub_epi64(_mm256_set1_epi64x(4), to_fifth));
            let down = _mm256_srlv_epi64(x, _mm256_sub_epi64(to_fifth, _mm256_set1_epi64x(4)));
            _mm256_and_si256(_mm256_or_si256(up, down), fifth)
        };
        let i = 4 * half as i64;
        [
            _mm256_or_si256(first_even, bits(first, i)),
            _mm256_or_si256(last_even, bits(last, i)),
            _mm256_or_si256(first_odd, bits(first, i + 1)),
            _mm256_or_si256(last_odd, bits(last, i + 1)),
        ]
    });
    x.add((w.d, w.dmin, &w.scales), q, sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ5K, 1);
