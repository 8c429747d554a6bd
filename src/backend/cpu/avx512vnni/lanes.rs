//! Vectors of sixteen rows: four bytes of each, or a sum of their products, or a float.

use std::arch::x86_64::*;

use super::{floats, load, load128};
use crate::backend::cpu::panels::Line;

/// Four bytes of each row, or a number.
pub(super) type I = __m512i;

/// A float of each row.
pub(super) type F = __m512;

crate::backend::cpu::x86::floats::operations! { "avx512bw,avx512dq,avx512vl,avx512vnni":
    fn line(x: &Line) -> I = load(x);
    /// Low nibbles.
    fn low(x: I) -> I = only(x, 15);
    /// High nibbles.
    fn high(x: I) -> I = only(up(x, -4), 15);
    /// Bits `n` places further up, or down, where the bytes of a mask follow.
    fn up(x: I, n: i32) -> I = match n {
        0.. => _mm512_sll_epi16(x, _mm_cvtsi32_si128(n)),
        _ => _mm512_srl_epi16(x, _mm_cvtsi32_si128(-n)),
    };
    fn only(x: I, bits: i8) -> I = _mm512_and_si512(x, _mm512_set1_epi8(bits));
    fn or(a: I, b: I) -> I = _mm512_or_si512(a, b);
    /// Where sums start.
    fn start(n: i32) -> I = _mm512_set1_epi32(n);
    /// Where sums of signed weights start; `n` is the sum of the activations.
    fn start_signed(n: i32) -> I = start(-128 * n);
    /// `sum` and the products of sixteen weights of each row, 0 to 31.
    fn dot(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = dot_wide(sum, w, x);
    /// The same of weights from 0 to 63.
    fn dot_wide(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = {
        let mut sum = sum;
        for i in 0..4 {
            let x = _mm512_set1_epi32(i32::from_le_bytes(x[i].map(|x| x as u8)));
            sum = _mm512_dpbusd_epi32(sum, w[i], x);
        }
        sum
    };
    /// The same of weights from -128 to 127: 128 more of each.
    fn dot_signed(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = {
        let mut raised = w;
        for w in &mut raised {
            *w = _mm512_xor_si512(*w, _mm512_set1_epi8(-128));
        }
        dot_wide(sum, raised, x)
    };
    fn scaled(x: I, d: f32) -> F = _mm512_mul_ps(_mm512_cvtepi32_ps(x), splat(d));
    fn halves(x: &[u16; 16]) -> F = floats::load_f16(x);
    fn bytes(x: &[u8; 16]) -> F = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load128(x)));
    fn signed_bytes(x: &[i8; 16]) -> F = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(x)));
    fn splat(x: f32) -> F = _mm512_set1_ps(x);
    /// `a * b + c`.
    fn fma(a: F, b: F, c: F) -> F = _mm512_fmadd_ps(a, b, c);
    fn store(x: F, out: &mut [f32; 16]) -> () = floats::store(x, out);
}
