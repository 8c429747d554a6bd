//! Q4_1 by Q8 activations: `d * dx * dot(q, x) + m * dx * sum(x)`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{Acts4, fold_rows, halves_of_rows, join2, nibbles};
use crate::quant::BlockQ4_1;

type Prepared = Acts4;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Prepared {
    Acts4::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot4(w: [&[BlockQ4_1; 4]; 4], x: &Prepared, mut sums: __m256) -> __m256 {
    for half in 0..2 {
        let mut dots = [_mm256_setzero_si256(); 4];
        let (mut d, mut m) = ([[0; 2]; 4], [[0; 2]; 4]);
        for r in 0..4 {
            let (a, b) = (&w[r][2 * half], &w[r][2 * half + 1]);
            dots[r] = x.dot(half, nibbles(join2(&a.qs, &b.qs)));
            d[r] = [a.d, b.d];
            m[r] = [a.m, b.m];
        }
        sums = _mm256_fmadd_ps(halves_of_rows(m), x.s[half], sums);
        let scaled = _mm256_mul_ps(fold_rows(dots), x.d[half]);
        sums = _mm256_fmadd_ps(halves_of_rows(d), scaled, sums);
    }
    sums
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4_1, 4, together);
