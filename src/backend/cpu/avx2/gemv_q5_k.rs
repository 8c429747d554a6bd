//! Q5_K by Q8 activations: `d * scale * dx * dot(q, x) - dmin * min * dx * sum(x)`.

use std::arch::x86_64::*;

use super::{Acts8, load, load128, nibbles};
use crate::quant::BlockQ5K;

type Prepared = Acts8;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Prepared {
    Acts8::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ5K; 1], x: &Prepared, sum: __m256) -> __m256 {
    let [w] = w;
    let qs: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.qs);
    let [first, last]: &[[u8; 16]; 2] = bytemuck::cast_ref(&w.qh);
    let first = _mm256_broadcastsi128_si256(load128(first));
    let last = _mm256_broadcastsi128_si256(load128(last));
    // Group i has its fifth bits in bit i; the upper lanes are two groups on.
    let even = _mm256_setr_m128i(_mm_set1_epi8(1), _mm_set1_epi8(4));
    let odd = _mm256_add_epi8(even, even);
    let q = [
        groups(&qs[0], &qs[1], first, last, even, odd),
        groups(
            &qs[2],
            &qs[3],
            first,
            last,
            _mm256_slli_epi16::<4>(even),
            _mm256_slli_epi16::<4>(odd),
        ),
    ];
    x.add((w.d, w.dmin, &w.scales), q, sum)
}

/// The first and the last 16 weights of two pairs of groups: even groups in the low nibbles, odd ones in the high; their
/// fifth bits are those of `first` and `last` at `even` and `odd`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn groups(
    a: &[u8; 32],
    b: &[u8; 32],
    first: __m256i,
    last: __m256i,
    even: __m256i,
    odd: __m256i,
) -> [__m256i; 4] {
    let (a, b) = (load(a), load(b));
    let (first_even, first_odd) = nibbles(_mm256_permute2x128_si256::<0x20>(a, b));
    let (last_even, last_odd) = nibbles(_mm256_permute2x128_si256::<0x31>(a, b));
    [
        fifth(first_even, first, even),
        fifth(last_even, last, even),
        fifth(first_odd, first, odd),
        fifth(last_odd, last, odd),
    ]
}

/// `q`, plus 16 where `bits` has the bit `which`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth(q: __m256i, bits: __m256i, which: __m256i) -> __m256i {
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bits, which), which);
    _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)))
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ5K, 1);
