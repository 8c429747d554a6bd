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
    let dots = [0, 1].map(|i| {
        let (low, high) = nibbles(join2(&w[2 * i].qs, &w[2 * i + 1].qs));
        _mm256_sub_epi16(x.acts.dot(i, low, high), x.offset[i])
    });
    x.acts.add(w.each_ref().map(|w| w.d), dots, sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4_0, 4);
