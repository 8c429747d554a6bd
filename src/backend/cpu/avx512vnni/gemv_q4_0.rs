//! Q4_0 by Q8 activations: `d * dx * (dot(q, x) - 8 * sum(x))`, four blocks at a time, four lanes to a block.

use std::arch::x86_64::*;

use super::{Acts4, halves_at, join4, nibbles, places};
use crate::quant::BlockQ4_0;

struct Prepared {
    acts: Acts4,
    offset: __m512i,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let eight = _mm512_slli_epi32::<3>(acts.sums());
    let offset = _mm512_sub_epi32(_mm512_setzero_si512(), eight);
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ4_0; 4], x: &Prepared, sum: __m512) -> __m512 {
    let (low, high) = nibbles(join4(w.each_ref().map(|w| &w.qs)));
    let dot = x.acts.dot(x.offset, low, high);
    let (head, _) = bytemuck::cast_ref::<_, [u8; 72]>(w)
        .split_first_chunk::<64>()
        .expect("72 bytes");
    let d = halves_at(const { &places(0, 9, 4) }, head);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(d, x.acts.d), sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ4_0, 4);
