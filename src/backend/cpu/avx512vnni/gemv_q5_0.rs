//! Q5_0 by Q8 activations: `d * dx * (dot(q, x) - 16 * sum(x))`, four blocks of four rows at a time.

use std::arch::x86_64::*;

use super::{Acts4, fold_rows, join4, load, nibbles};
use crate::quant::BlockQ5_0;

pub(in crate::backend::cpu) struct Prepared {
    pub(in crate::backend::cpu) acts: Acts4,
    pub(in crate::backend::cpu) offset: __m512i,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn prepare(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d, s);
    let ones = _mm512_set1_epi8(1);
    let sums = acts.dot(_mm512_setzero_si512(), (ones, ones));
    let offset = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<4>(sums));
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot4(w: [&[BlockQ5_0; 4]; 4], x: &Prepared, sums: __m512) -> __m512 {
    let mut dots = [x.offset; 4];
    for r in 0..4 {
        let nibbles = nibbles(join4(w[r].each_ref().map(|w| &w.qs)));
        // Between -16 * 16 * 127 and 16 * 15 * 127 in two lanes.
        dots[r] = x.acts.dot(dots[r], fifth_bits(w[r], nibbles));
    }
    let scaled = _mm512_mul_ps(fold_rows(dots), x.acts.d);
    _mm512_fmadd_ps(scales(w), scaled, sums)
}

/// Adds the fifth bits: those of the low nibbles are the first 16 of each block, those of the high the last 16.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn fifth_bits(
    w: &[BlockQ5_0; 4],
    (low, high): (__m512i, __m512i),
) -> (__m512i, __m512i) {
    let bits = w.each_ref().map(|w| u32::from_le_bytes(w.qh));
    let firsts = |a: u32, b: u32| u64::from(a & 0xffff | b << 16);
    let lasts = |a: u32, b: u32| u64::from(a >> 16 | b & 0xffff_0000);
    let low_bits = firsts(bits[0], bits[1]) | firsts(bits[2], bits[3]) << 32;
    let high_bits = lasts(bits[0], bits[1]) | lasts(bits[2], bits[3]) << 32;
    let fifth = _mm512_set1_epi8(16);
    (
        _mm512_mask_add_epi8(low, low_bits, low, fifth),
        _mm512_mask_add_epi8(high, high_bits, high, fifth),
    )
}

/// The scales, of each block row after row.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn scales(w: [&[BlockQ5_0; 4]; 4]) -> __m512 {
    // The fourth scale is word 33; `last` starts at word 12.
    let places = _mm256_setr_epi16(0, 0, 0, 0, 11, 11, 11, 11, 22, 22, 22, 22, 53, 53, 53, 53);
    let mut d = _mm512_setzero_si512();
    for r in 0..4 {
        let bytes: &[u8; 88] = bytemuck::cast_ref(w[r]);
        let (first, last) = (bytes.first_chunk::<64>(), bytes.last_chunk::<64>());
        let first = load(first.expect("88 bytes"));
        let last = load(last.expect("88 bytes"));
        let halves = _mm512_permutex2var_epi16(first, _mm512_castsi256_si512(places), last);
        d = _mm512_mask_mov_epi16(d, 0x1111 << r, halves);
    }
    _mm512_cvtph_ps(_mm512_castsi512_si256(d))
}

crate::backend::cpu::x86::gemv::gemv!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    BlockQ5_0,
    4,
    together
);
