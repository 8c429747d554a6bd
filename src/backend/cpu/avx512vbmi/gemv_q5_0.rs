//! Q5_0 by Q8 activations: `d * dx * (dot(q, x) - 16 * sum(x))`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{ends, nibble_places, nibbles_at};
use crate::backend::cpu::avx512vnni::fold_rows;
use crate::backend::cpu::avx512vnni::gemv_q5_0::{Prepared, fifth_bits, prepare, scales};
use crate::quant::BlockQ5_0;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")]
fn dot4(w: [&[BlockQ5_0; 4]; 4], x: &Prepared, sums: __m512) -> __m512 {
    let mut dots = [x.offset; 4];
    for r in 0..4 {
        let [first, last] = ends(bytemuck::cast_ref::<_, [u8; 88]>(w[r]));
        let nibbles = nibbles_at(const { &nibble_places(88, 6) }, first, last);
        // Between -16 * 16 * 127 and 16 * 15 * 127 in two lanes.
        dots[r] = x.acts.dot(dots[r], fifth_bits(w[r], nibbles));
    }
    let scaled = _mm512_mul_ps(fold_rows(dots), x.acts.d);
    _mm512_fmadd_ps(scales(w), scaled, sums)
}

crate::backend::cpu::x86::gemv::gemv!(
    "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni",
    BlockQ5_0,
    4,
    together
);
