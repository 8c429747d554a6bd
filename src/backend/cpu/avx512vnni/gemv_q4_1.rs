//! Q4_1 by Q8 activations: `d * dx * dot(q, x) + m * dx * sum(x)`, four blocks at a time, four lanes to a block.

use std::arch::x86_64::*;

use super::{Acts4, halves_at, join4, nibbles, places};
use crate::quant::BlockQ4_1;

struct Prepared {
    acts: Acts4,
    /// `dx * sum(x)`, spread over the lanes of a block.
    sums: __m512,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(acts.sums()), acts.d);
    Prepared { acts, sums }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ4_1; 4], x: &Prepared, sum: __m512) -> __m512 {
    let (low, high) = nibbles(join4(w.each_ref().map(|w| &w.qs)));
    let dot = x.acts.dot(_mm512_setzero_si512(), low, high);
    let (head, _) = bytemuck::cast_ref::<_, [u8; 80]>(w)
        .split_first_chunk::<64>()
        .expect("80 bytes");
    let d = halves_at(const { &places(0, 10, 4) }, head);
    let m = halves_at(const { &places(1, 10, 4) }, head);
    let sum = _mm512_fmadd_ps(m, x.sums, sum);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(d, x.acts.d), sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ4_1, 4);
