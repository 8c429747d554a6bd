//! Q4_1 by Q8 activations: `d * dx * dot(q, x) + m * dx * sum(x)`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{ends, nibble_places, nibbles_at};
use crate::backend::cpu::avx512vnni::gemv_q4_1::{Prepared, prepare};
use crate::backend::cpu::avx512vnni::{fold_rows, halves_of_rows, places};
use crate::quant::BlockQ4_1;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")]
fn dot4(w: [&[BlockQ4_1; 4]; 4], x: &Prepared, sums: __m512) -> __m512 {
    let mut dots = [_mm512_setzero_si512(); 4];
    let mut heads = [&[0; 64]; 4];
    for r in 0..4 {
        let [first, last] = ends(bytemuck::cast_ref::<_, [u8; 80]>(w[r]));
        let nibbles = nibbles_at(const { &nibble_places(80, 4) }, first, last);
        // At most 16 * 15 * 127 in two lanes.
        dots[r] = x.dot(dots[r], nibbles);
        heads[r] = first;
    }
    let d = halves_of_rows(const { &places(0, 10, 4) }, heads);
    let m = halves_of_rows(const { &places(1, 10, 4) }, heads);
    let sums = _mm512_fmadd_ps(m, x.s, sums);
    _mm512_fmadd_ps(d, _mm512_mul_ps(fold_rows(dots), x.d), sums)
}

crate::backend::cpu::x86::gemv::gemv!(
    "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni",
    BlockQ4_1,
    4,
    together
);
