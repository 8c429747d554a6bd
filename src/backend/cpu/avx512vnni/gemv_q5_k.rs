//! Q5_K by Q8 activations: `d * scale * dx * dot(q, x) - dmin * min * dx * sum(x)`, four lanes to a scale of 32 weights.

use std::arch::x86_64::*;

use super::{Acts8, Scales, lanes, load, load128, nibbles};
use crate::quant::BlockQ5K;

type Prepared = Acts8;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Prepared {
    Acts8::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ5K; 1], x: &Prepared, sum: __m512) -> __m512 {
    let [w] = w;
    let [a, b]: &[[u8; 64]; 2] = bytemuck::cast_ref(&w.qs);
    let (a, b) = (load(a), load(b));
    // The first and the last 16 weights of all groups: even groups in the low nibbles, odd ones in the high.
    let (first_even, first_odd) = nibbles(_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b));
    let (last_even, last_odd) = nibbles(_mm512_shuffle_i32x4::<0b11_01_11_01>(a, b));
    let [first, last]: &[[u8; 16]; 2] = bytemuck::cast_ref(&w.qh);
    let first = _mm512_broadcast_i32x4(load128(first));
    let last = _mm512_broadcast_i32x4(load128(last));
    // Bit 2i, then 2i + 1, in the lanes of group pair i.
    let even = _mm512_sllv_epi32(_mm512_set1_epi8(1), load(const { &lanes(0, 2, 4) }));
    let odd = _mm512_add_epi8(even, even);
    let fifth = |q, bits, which| {
        let set = _mm512_test_epi8_mask(bits, which);
        _mm512_mask_add_epi8(q, set, q, _mm512_set1_epi8(16))
    };
    let q = [
        fifth(first_even, first, even),
        fifth(last_even, last, even),
        fifth(first_odd, first, odd),
        fifth(last_odd, last, odd),
    ];
    let scales = Scales::new(w.d, w.dmin, &w.scales, x);
    x.add(&scales, q, sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ5K, 1);
