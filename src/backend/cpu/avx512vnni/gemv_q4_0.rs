//! Q4_0 by Q8 activations: `d * (dx * dot(q, x) - 8 * dx * sum(x))`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{Acts4, fold_rows, halves_of_rows, join4, nibbles, places};
use crate::quant::BlockQ4_0;

pub(in crate::backend::cpu) type Prepared = Acts4;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn prepare(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d, s);
    let s = _mm512_mul_ps(acts.s, _mm512_set1_ps(8.0));
    Prepared { s, ..acts }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot4(w: [&[BlockQ4_0; 4]; 4], x: &Prepared, sums: __m512) -> __m512 {
    let mut dots = [_mm512_setzero_si512(); 4];
    let mut heads = [&[0; 64]; 4];
    for r in 0..4 {
        let [a, b, c, d] = w[r];
        // At most 16 * 15 * 127 in two lanes.
        dots[r] = x.dot(dots[r], nibbles(join4([&a.qs, &b.qs, &c.qs, &d.qs])));
        heads[r] = bytemuck::cast_ref::<_, [u8; 72]>(w[r])
            .first_chunk()
            .expect("72 bytes");
    }
    let d = halves_of_rows(const { &places(0, 9, 4) }, heads);
    _mm512_fmadd_ps(d, _mm512_fmsub_ps(fold_rows(dots), x.d, x.s), sums)
}

crate::backend::cpu::x86::gemv::gemv!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    BlockQ4_0,
    4,
    together
);
