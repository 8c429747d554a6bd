//! Q5_0 by Q8 activations: `d * dx * (dot(q, x) - 16 * sum(x))`, four blocks at a time, four lanes to a block.

use std::arch::x86_64::*;

use super::{Acts4, join4, load, nibbles};
use crate::quant::BlockQ5_0;

struct Prepared {
    acts: Acts4,
    offset: __m512i,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 128], d: &[f32; 4], _: &[f32; 4]) -> Prepared {
    let acts = Acts4::new(q, d);
    let sixteen = _mm512_slli_epi32::<4>(acts.sums());
    let offset = _mm512_sub_epi32(_mm512_setzero_si512(), sixteen);
    Prepared { acts, offset }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ5_0; 4], x: &Prepared, sum: __m512) -> __m512 {
    let (low, high) = nibbles(join4(w.each_ref().map(|w| &w.qs)));
    // The fifth bits of `low` are the first 16 of each block, those of `high` the last 16.
    let bits = w.each_ref().map(|w| u32::from_le_bytes(w.qh));
    let firsts = |a: u32, b: u32| u64::from(a & 0xffff | b << 16);
    let lasts = |a: u32, b: u32| u64::from(a >> 16 | b & 0xffff_0000);
    let low_bits = firsts(bits[0], bits[1]) | firsts(bits[2], bits[3]) << 32;
    let high_bits = lasts(bits[0], bits[1]) | lasts(bits[2], bits[3]) << 32;
    let fifth = _mm512_set1_epi8(16);
    let low = _mm512_mask_add_epi8(low, low_bits, low, fifth);
    let high = _mm512_mask_add_epi8(high, high_bits, high, fifth);
    let dot = x.acts.dot(x.offset, low, high);
    let bytes: &[u8; 88] = bytemuck::cast_ref(w);
    let (first, last) = (bytes.first_chunk::<64>(), bytes.last_chunk::<64>());
    let (first, last) = (first.expect("88 bytes"), last.expect("88 bytes"));
    // The fourth scale is word 33; `last` starts at word 12.
    let places = _mm256_setr_epi16(0, 0, 0, 0, 11, 11, 11, 11, 22, 22, 22, 22, 53, 53, 53, 53);
    let halves = _mm512_permutex2var_epi16(load(first), _mm512_castsi256_si512(places), load(last));
    let d = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(d, x.acts.d), sum)
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ5_0, 4);
