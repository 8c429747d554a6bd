//! Q8_0 by Q8 activations: `d * dx * (dot(w + 128, x) - 128 * sum(x))`, four blocks at a time, eight lanes to a block.

use std::arch::x86_64::*;

use super::{halves_at, join2, lanes, load, load128, places};
use crate::quant::BlockQ8_0;

/// For the first and the last two blocks of four.
struct Prepared {
    q: [__m512i; 2],
    offset: [__m512i; 2],
    d: [__m512; 2],
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let [a, b] = bytemuck::cast_ref::<_, [[i8; 64]; 2]>(q);
    let q = [load(a), load(b)];
    let offset = q.map(|q| {
        let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), q);
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<7>(sums))
    });
    let d = _mm512_castps128_ps512(_mm_castsi128_ps(load128(d)));
    let d = [
        _mm512_permutexvar_ps(load(const { &lanes(0, 1, 8) }), d),
        _mm512_permutexvar_ps(load(const { &lanes(2, 1, 8) }), d),
    ];
    Prepared { q, offset, d }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ8_0; 4], x: &Prepared, mut sum: __m512) -> __m512 {
    let pairs: &[[BlockQ8_0; 2]; 2] = bytemuck::cast_ref(w);
    for (i, w) in pairs.iter().enumerate() {
        let q = _mm512_xor_si512(join2(w.each_ref().map(|w| &w.qs)), _mm512_set1_epi8(-128));
        let dot = _mm512_dpbusd_epi32(x.offset[i], q, x.q[i]);
        let (head, _) = bytemuck::cast_ref::<_, [u8; 68]>(w)
            .split_first_chunk::<64>()
            .expect("68 bytes");
        let d = _mm512_mul_ps(halves_at(const { &places(0, 17, 8) }, head), x.d[i]);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), d, sum);
    }
    sum
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ8_0, 4);
