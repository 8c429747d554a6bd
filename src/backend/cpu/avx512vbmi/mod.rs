//! x86-64 with AVX-512 VNNI, VBMI and GFNI: what they shorten in the formats with nibbles.
//!
//! One permutation of bytes takes the nibbles of four blocks out of a unit, where four loads were joined; one affine
//! map of bytes moves high nibbles down, where it took a shift and a mask.

use std::arch::x86_64::*;

use bytemuck::Pod;

use super::avx512vnni::{floats, load};

pub(crate) mod gemv_q4_0;
pub(crate) mod gemv_q4_1;
pub(crate) mod gemv_q5_0;

/// Of `size` bytes, four blocks, each with 16 bytes of nibbles from its byte `first`: which of the first 64 bytes, or,
/// counted from 64, of the last 64.
const fn nibble_places(size: usize, first: usize) -> [u8; 64] {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        let at = i / 16 * (size / 4) + first + i % 16;
        places[i] = if at < 64 { at } else { at - (size - 64) + 64 } as u8;
        i += 1;
    }
    places
}

/// The low and the high nibbles of the bytes at `places` of the first and the last 64 bytes of a unit.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,gfni")]
fn nibbles_at<T: Pod>(places: &[u8; 64], first: &T, last: &T) -> (__m512i, __m512i) {
    /// Bit `i` of the result is bit `i + 4`, of the upper four none.
    const DOWN: i64 = 0x1020_4080_0000_0000;
    let bytes = _mm512_permutex2var_epi8(load(first), load(places), load(last));
    let low = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    let high = _mm512_gf2p8affine_epi64_epi8::<0>(bytes, _mm512_set1_epi64(DOWN));
    (low, high)
}

/// The first and the last 64 bytes of a unit.
fn ends<const N: usize>(bytes: &[u8; N]) -> [&[u8; 64]; 2] {
    let ends = [bytes.first_chunk(), bytes.last_chunk()];
    ends.map(|end| end.expect("units are of 72 bytes and more"))
}
