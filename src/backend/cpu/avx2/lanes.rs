//! Vectors of eight rows in pairs: four bytes of each row, or a sum of their products, or a float.

use std::arch::x86_64::*;

use super::{floats, load};
use crate::backend::cpu::panels::Line;

/// Four bytes of each row, or a number.
pub(super) type I = [__m256i; 2];

/// A float of each row.
pub(super) type F = [__m256; 2];

crate::backend::cpu::x86::floats::operations! { "avx2,fma,f16c":
    fn line(x: &Line) -> I = {
        let [a, b]: &[[u8; 32]; 2] = bytemuck::cast_ref(x);
        [load(a), load(b)]
    };
    /// Low nibbles.
    fn low(x: I) -> I = only(x, 15);
    /// High nibbles.
    fn high(x: I) -> I = only(up(x, -4), 15);
    /// Bits `n` places further up, or down, where the bytes of a mask follow.
    fn up(x: I, n: i32) -> I = match n {
        0.. => {
            let n = _mm_cvtsi32_si128(n);
            [_mm256_sll_epi16(x[0], n), _mm256_sll_epi16(x[1], n)]
        }
        _ => {
            let n = _mm_cvtsi32_si128(-n);
            [_mm256_srl_epi16(x[0], n), _mm256_srl_epi16(x[1], n)]
        }
    };
    fn only(x: I, bits: i8) -> I = {
        let bits = _mm256_set1_epi8(bits);
        [_mm256_and_si256(x[0], bits), _mm256_and_si256(x[1], bits)]
    };
    fn or(a: I, b: I) -> I = [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])];
    /// Where sums start.
    fn start(n: i32) -> I = [_mm256_set1_epi32(n); 2];
    /// Where sums of signed weights start.
    fn start_signed(_n: i32) -> I = start(0);
    /// `sum` and the products of sixteen weights of each row, 0 to 31: four times two pairs of 31 * 127 fit in 16 bits.
    fn dot(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = {
        let mut pairs = [_mm256_setzero_si256(); 2];
        for i in 0..4 {
            let x = four(&x[i]);
            for k in 0..2 {
                pairs[k] = _mm256_add_epi16(pairs[k], _mm256_maddubs_epi16(w[i][k], x));
            }
        }
        widened(sum, pairs)
    };
    /// The same of weights from 0 to 63: two times.
    fn dot_wide(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = {
        let mut sum = sum;
        for i in [0, 2] {
            let (a, b) = (four(&x[i]), four(&x[i + 1]));
            let mut pairs = [_mm256_setzero_si256(); 2];
            for k in 0..2 {
                let first = _mm256_maddubs_epi16(w[i][k], a);
                pairs[k] = _mm256_add_epi16(first, _mm256_maddubs_epi16(w[i + 1][k], b));
            }
            sum = widened(sum, pairs);
        }
        sum
    };
    /// The same of weights from -128 to 127: their sign moves to the activations.
    fn dot_signed(sum: I, w: [I; 4], x: &[[i8; 4]; 4]) -> I = {
        let mut sum = sum;
        for i in 0..4 {
            let x = four(&x[i]);
            let mut pairs = [_mm256_setzero_si256(); 2];
            for k in 0..2 {
                let w = w[i][k];
                pairs[k] = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            }
            sum = widened(sum, pairs);
        }
        sum
    };
    /// Four activations for each row.
    fn four(x: &[i8; 4]) -> __m256i = _mm256_set1_epi32(i32::from_le_bytes(x.map(|x| x as u8)));
    /// `sum` and sums of pairs of 16 bits.
    fn widened(sum: I, pairs: I) -> I = {
        let ones = _mm256_set1_epi16(1);
        [
            _mm256_add_epi32(sum[0], _mm256_madd_epi16(pairs[0], ones)),
            _mm256_add_epi32(sum[1], _mm256_madd_epi16(pairs[1], ones)),
        ]
    };
    fn scaled(x: I, d: f32) -> F = {
        let d = floats::splat(d);
        [floats::mul(_mm256_cvtepi32_ps(x[0]), d), floats::mul(_mm256_cvtepi32_ps(x[1]), d)]
    };
    fn halves(x: &[u16; 16]) -> F = {
        let [a, b]: &[[u16; 8]; 2] = bytemuck::cast_ref(x);
        [floats::load_f16(a), floats::load_f16(b)]
    };
    fn bytes(x: &[u8; 16]) -> F = {
        let x = super::load128(x);
        let [a, b] = [_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(x))];
        [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
    };
    fn signed_bytes(x: &[i8; 16]) -> F = {
        let x = super::load128(x);
        let [a, b] = [_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(x))];
        [_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)]
    };
    fn splat(x: f32) -> F = [floats::splat(x); 2];
    /// `a * b + c`.
    fn fma(a: F, b: F, c: F) -> F = [floats::fma(a[0], b[0], c[0]), floats::fma(a[1], b[1], c[1])];
    fn store(x: F, out: &mut [f32; 16]) -> () = {
        let [a, b]: &mut [[f32; 8]; 2] = bytemuck::cast_mut(out);
        floats::store(x[0], a);
        floats::store(x[1], b);
    };
}
