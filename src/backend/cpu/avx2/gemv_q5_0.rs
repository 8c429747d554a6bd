//! Q5_0 by Q8 activations: `d * dx * (dot(q, x) - 16 * sum(x))`, four blocks at a time.

use std::arch::x86_64::*;

use super::{Acts4, join2, nibbles, sixteen_where};
use crate::quant::BlockQ5_0;

struct Prepared {
    acts: Acts4,
    offset: [__m256i; 2],
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let offset = acts.offset(16);
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ5_0; 4], x: &Prepared, sum: __m256) -> __m256 {
    let dots = [dot2(&w[0], &w[1], x, 0), dot2(&w[2], &w[3], x, 1)];
    x.acts.add([w[0].d, w[1].d, w[2].d, w[3].d], dots, sum)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot2(a: &BlockQ5_0, b: &BlockQ5_0, x: &Prepared, which: usize) -> __m256i {
    let (low, high) = nibbles(join2(&a.qs, &b.qs));
    // The fifth bits of `low` are the first 16 of each block, those of `high` the last 16.
    let (a, b) = (u32::from_le_bytes(a.qh), u32::from_le_bytes(b.qh));
    let low = _mm256_or_si256(low, sixteen_where(a & 0xffff | b << 16));
    let high = _mm256_or_si256(high, sixteen_where(a >> 16 | b & 0xffff_0000));
    _mm256_sub_epi16(x.acts.dot(which, low, high), x.offset[which])
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ5_0, 4);
