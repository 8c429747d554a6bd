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
    let dots = [dot2(&w[0], &w[1], x, 0), dot2(&w[2], &w[3], x, 1)];
    let m = halves([w[0].m, w[1].m, w[2].m, w[3].m]);
    let sum = _mm256_fmadd_ps(_mm256_zextps128_ps256(m), x.s, sum);
    x.acts.add([w[0].d, w[1].d, w[2].d, w[3].d], dots, sum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot2(a: &BlockQ4_1, b: &BlockQ4_1, x: &Prepared, which: usize) -> __m256i {
    let (low, high) = nibbles(join2(&a.qs, &b.qs));
    x.acts.dot(which, low, high)
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4_1, 4);
