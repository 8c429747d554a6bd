//! Q4_0 by Q8 activations: `d * dx * (dot(q, x) - 8 * sum(x))`, four blocks at a time.

use std::arch::x86_64::*;

use super::{Acts4, join2, nibbles};
use crate::quant::BlockQ4_0;

struct Prepared {
    acts: Acts4,
    offset: [__m256i; 2],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let offset = acts.offset(8);
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ4_0; 4], x: &Prepared, sum: __m256) -> __m256 {
    let dots = [dot2(&w[0], &w[1], x, 0), dot2(&w[2], &w[3], x, 1)];
    x.acts.add([w[0].d, w[1].d, w[2].d, w[3].d], dots, sum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot2(a: &BlockQ4_0, b: &BlockQ4_0, x: &Prepared, which: usize) -> __m256i {
    let (low, high) = nibbles(join2(&a.qs, &b.qs));
    _mm256_sub_epi16(x.acts.dot(which, low, high), x.offset[which])
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4_0, 4);
