//! Q5_0 by Q8 activations: `d * dx * (dot(q, x) - 16 * sum(x))`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{Acts4, fold_rows, halves_of_rows, join2, nibbles, sixteen_where};
use crate::quant::BlockQ5_0;

struct Prepared {
    acts: Acts4,
    offset: [__m256i; 2],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d, s);
    let offset = acts.offset(16);
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot4(w: [&[BlockQ5_0; 4]; 4], x: &Prepared, mut sums: __m256) -> __m256 {
    for half in 0..2 {
        let mut dots = [_mm256_setzero_si256(); 4];
        let mut d = [[0; 2]; 4];
        for r in 0..4 {
            let (a, b) = (&w[r][2 * half], &w[r][2 * half + 1]);
            let (low, high) = nibbles(join2(&a.qs, &b.qs));
            d[r] = [a.d, b.d];
            // The fifth bits of `low` are the first 16 of each block, those of `high` the last 16.
            let (a, b) = (u32::from_le_bytes(a.qh), u32::from_le_bytes(b.qh));
            let low = _mm256_or_si256(low, sixteen_where(a & 0xffff | b << 16));
            let high = _mm256_or_si256(high, sixteen_where(a >> 16 | b & 0xffff_0000));
            let dot = x.acts.dot(half, (low, high));
            dots[r] = _mm256_sub_epi16(dot, x.offset[half]);
        }
        let scaled = _mm256_mul_ps(fold_rows(dots), x.acts.d[half]);
        sums = _mm256_fmadd_ps(halves_of_rows(d), scaled, sums);
    }
    sums
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ5_0, 4, together);
