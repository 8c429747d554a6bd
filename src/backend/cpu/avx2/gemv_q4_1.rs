//! Q4_1 by Q8 activations: `d * dx * dot(q, x) + m * dx * sum(x)`, four blocks at a time.

use std::arch::x86_64::*;

use super::{Acts4, halves, join2, load128, nibbles};
use crate::quant::BlockQ4_1;

struct Prepared {
    acts: Acts4,
    /// `dx * sum(x)` of the four blocks, in the lower lanes.
    s: __m256,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let s = _mm256_zextps128_ps256(_mm_castsi128_ps(load128(s)));
    Prepared { acts, s }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ4_1; 4], x: &Prepared, sum: __m256) -> __m256 {
    let dots = [0, 1].map(|i| {
        let (low, high) = nibbles(join2(&w[2 * i].qs, &w[2 * i + 1].qs));
        x.acts.dot(i, low, high)
    });
    let m = _mm256_zextps128_ps256(halves(w.each_ref().map(|w| w.m)));
    let sum = _mm256_fmadd_ps(m, x.s, sum);
    x.acts.add(w.each_ref().map(|w| w.d), dots, sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4_1, 4);
