//! Q4_K by Q8 activations: `d * scale * dx * dot(q, x) - dmin * min * dx * sum(x)`.

use std::arch::x86_64::*;

use super::{Acts8, load, nibbles};
use crate::quant::BlockQ4K;

type Prepared = Acts8;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Prepared {
    Acts8::new(q, d, s)
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot(w: &[BlockQ4K; 1], x: &Prepared, sum: __m256) -> __m256 {
    let [w] = w;
    let qs: &[[u8; 32]; 4] = bytemuck::cast_ref(&w.qs);
    let q = [groups(&qs[0], &qs[1]), groups(&qs[2], &qs[3])];
    x.add((w.d, w.dmin, &w.scales), q, sum)
}

/// The first and the last 16 weights of two pairs of groups: even groups in the low nibbles, odd ones in the high.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn groups(a: &[u8; 32], b: &[u8; 32]) -> [__m256i; 4] {
    let (a, b) = (load(a), load(b));
    let (first_even, first_odd) = nibbles(_mm256_permute2x128_si256::<0x20>(a, b));
    let (last_even, last_odd) = nibbles(_mm256_permute2x128_si256::<0x31>(a, b));
    [first_even, last_even, first_odd, last_odd]
}

crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ4K, 1);
