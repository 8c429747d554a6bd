//! Q4_K by Q8 activations: `d * scale * dx * dot(q, x) - dmin * min * dx * sum(x)`, four lanes to a scale of 32 weights.

use std::arch::x86_64::*;

use super::{Acts8, Scales, load, nibbles};
use crate::quant::BlockQ4K;

type Prepared = Acts8;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Prepared {
    Acts8::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ4K; 1], x: &Prepared, sum: __m512) -> __m512 {
    let [w] = w;
    let [a, b]: &[[u8; 64]; 2] = bytemuck::cast_ref(&w.qs);
    let (a, b) = (load(a), load(b));
    // The first and the last 16 weights of all groups: even groups in the low nibbles, odd ones in the high.
    let (first_even, first_odd) = nibbles(_mm512_shuffle_i32x4::<0b10_00_10_00>(a, b));
    let (last_even, last_odd) = nibbles(_mm512_shuffle_i32x4::<0b11_01_11_01>(a, b));
    let scales = Scales::new(w.d, w.dmin, &w.scales, x);
    x.add(&scales, [first_even, last_even, first_odd, last_odd], sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ4K, 1);
