//! Vectors of sixteen floats.
#![allow(unsafe_code, reason = "loads and stores through array references")]

use std::arch::x86_64::*;

use super::load as load_bits;
use crate::quant::{BlockQ4_0, BlockQ8_0};

/// A vector.
pub(in crate::backend::cpu) type V = __m512;

/// Its floats.
pub(super) const LANES: usize = 16;

/// Vectors of a row that a kernel sums at a time for each of four queries.
pub(super) const WIDTH: usize = 4;

/// Rows and tokens of a GEMM's tile of sums.
pub(super) const TILE: (usize, usize) = (4, 4);

crate::backend::cpu::x86::floats::operations! { "avx512bw,avx512dq,avx512vl,avx512vnni":
    fn load(x: &[f32; 16]) -> V = _mm512_castsi512_ps(load_bits(x));
    // SAFETY: writes the 64 bytes of an exclusively borrowed array; no alignment is asked.
    fn store(x: V, out: &mut [f32; 16]) = unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
    fn load_f16(x: &[u16; 16]) -> V = _mm512_cvtph_ps(super::load256(x));
    fn store_f16(x: V, out: &mut [u16; 16]) = {
        let halves = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
        // SAFETY: writes the 32 bytes of an exclusively borrowed array; no alignment is asked.
        unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), halves) }
    };
    /// The vector `i` of the two of a block.
    fn load_q8_0(block: &BlockQ8_0, i: usize) -> V = {
        let q = &bytemuck::cast_ref::<_, [[i8; 16]; 2]>(&block.qs)[i];
        let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(super::load128(q)));
        mul(q, _mm512_cvtph_ps(_mm256_set1_epi16(block.d as i16)))
    };
    /// The vector `i` of the two of a block: all weights that it can have, looked up by the low four bits of an index.
    fn load_q4_0(block: &BlockQ4_0, i: usize) -> V = {
        const WEIGHTS: [f32; 16] = [
            -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0,
        ];
        let weights = mul(load(&WEIGHTS), _mm512_cvtph_ps(_mm256_set1_epi16(block.d as i16)));
        let q = _mm512_cvtepu8_epi32(super::load128(&block.qs));
        let q = _mm512_srlv_epi32(q, _mm512_set1_epi32(4 * i as i32));
        _mm512_permutexvar_ps(q, weights)
    };
    /// Where `key` is off from `held` by more than `threshold`, or is no number: the differences, the indices of their
    /// lanes from `first` on, what is held then, how many there are.
    fn changes(of: (V, V, V), first: usize, changes: &mut [f32; 16], lanes: &mut [u8; 16]) -> (V, usize) = {
        let (key, held, threshold) = of;
        let change = sub(key, held);
        let is_new = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(_mm512_abs_ps(change), threshold);
        store(_mm512_maskz_compress_ps(is_new, change), changes);
        let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let lane = _mm512_add_epi32(lane, _mm512_set1_epi32(first as i32));
        let bytes = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(is_new, lane));
        // SAFETY: writes the 16 bytes of an exclusively borrowed array; no alignment is asked.
        unsafe { _mm_storeu_si128(lanes.as_mut_ptr().cast(), bytes) };
        (_mm512_mask_mov_ps(held, is_new, key), is_new.count_ones() as usize)
    };
    /// Whole numbers to bytes.
    fn store_i8(x: V, out: &mut [i8; 16]) = {
        let bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
        // SAFETY: writes the 16 bytes of an exclusively borrowed array; no alignment is asked.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) }
    };
    fn splat(x: f32) -> V = _mm512_set1_ps(x);
    fn add(a: V, b: V) -> V = _mm512_add_ps(a, b);
    fn sub(a: V, b: V) -> V = _mm512_sub_ps(a, b);
    fn mul(a: V, b: V) -> V = _mm512_mul_ps(a, b);
    fn div(a: V, b: V) -> V = _mm512_div_ps(a, b);
    fn max(a: V, b: V) -> V = _mm512_max_ps(a, b);
    /// `b` where either is NaN.
    fn min(a: V, b: V) -> V = _mm512_min_ps(a, b);
    /// `a * b + c`.
    fn fma(a: V, b: V, c: V) -> V = _mm512_fmadd_ps(a, b, c);
    fn round(x: V) -> V = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    fn sum(x: V) -> f32 = _mm512_reduce_add_ps(x);
    fn first(x: V) -> f32 = _mm512_cvtss_f32(x);
    fn max_of(x: V) -> f32 = _mm512_reduce_max_ps(x);
    /// Minus infinity outside the lanes `first..end`.
    fn only(x: V, first: usize, end: usize) -> V = {
        let lanes = ((1u32 << end) - 1) & !((1u32 << first) - 1);
        _mm512_mask_mov_ps(splat(f32::NEG_INFINITY), lanes as u16, x)
    };
    /// Minus infinity where the bit of a lane is not set.
    fn only_bits(x: V, bits: &[u8; 2]) -> V =
        _mm512_mask_mov_ps(splat(f32::NEG_INFINITY), u16::from_le_bytes(*bits), x);
    /// Two times eight lanes.
    fn join(x: [&[f32; 8]; 2]) -> V = {
        // SAFETY: reads the 32 bytes of borrowed arrays; no alignment is asked.
        let [low, high] = x.map(|x| unsafe { _mm256_loadu_ps(x.as_ptr()) });
        _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
    };
    /// The rows of an eight of vectors become columns.
    fn turn_eight(rows: [&[f32; 16]; 8], out: &mut [[f32; 8]; 16]) = {
        let pairs = |first: usize| {
            let [a, b] = [load(rows[first]), load(rows[first + 1])];
            [_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)].map(|x| _mm512_castps_pd(x))
        };
        // Run `j` of four lanes of vector `i`: four rows of column `4 j + i`.
        let fours = |first: usize| {
            let ([a, b], [c, d]) = (pairs(first), pairs(first + 2));
            [
                _mm512_unpacklo_pd(a, c),
                _mm512_unpackhi_pd(a, c),
                _mm512_unpacklo_pd(b, d),
                _mm512_unpackhi_pd(b, d),
            ]
        };
        for (i, (up, down)) in fours(0).into_iter().zip(fours(4)).enumerate() {
            let first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
            let last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
            for (j, runs) in [(0, first), (8, last)] {
                let two = _mm512_castpd_ps(_mm512_permutex2var_pd(up, runs, down));
                let (low, high) = (_mm512_castps512_ps256(two), _mm512_extractf32x8_ps::<1>(two));
                // SAFETY: writes the 32 bytes of an exclusively borrowed array; no alignment is asked.
                unsafe { _mm256_storeu_ps(out[j + i].as_mut_ptr(), low) };
                // SAFETY: the same.
                unsafe { _mm256_storeu_ps(out[j + 4 + i].as_mut_ptr(), high) };
            }
        }
    };
    /// A bit for each key that is at least `least`.
    fn at_least(keys: &[i32; LANES], least: i32) -> u16 = {
        _mm512_cmpge_epi32_mask(load_bits(keys), _mm512_set1_epi32(least))
    };
    /// `p * 2^n`; 0 where `x` is below -87.3.
    fn times_power_of_two(p: V, n: V, x: V) -> V = {
        let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, splat(-87.3));
        _mm512_maskz_scalef_ps(normal, p, n)
    };
    /// The sum of each of four vectors.
    fn sum_of_4(x: [V; 4]) -> [f32; 4] = sum_runs(fold4(x));
    /// The sum of runs of four lanes.
    fn sum_runs(x: V) -> [f32; 4] = {
        let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let mut out = [0.0; 4];
        // SAFETY: writes the 16 bytes of a local array; no alignment is asked.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), x) };
        out
    };
    /// The sums of sixteen vectors.
    fn fold(x: [V; 16]) -> V = {
        fold_fours([
            fold4([x[0], x[1], x[2], x[3]]),
            fold4([x[4], x[5], x[6], x[7]]),
            fold4([x[8], x[9], x[10], x[11]]),
            fold4([x[12], x[13], x[14], x[15]]),
        ])
    };
    /// The sums of sixteen vectors of which fours are [folded](fold4).
    fn fold_fours(x: [V; 4]) -> V = halve(halve(x[0], x[1]), halve(x[2], x[3]));
    /// In each run of four lanes the sums of that run of four vectors.
    fn fold4(x: [V; 4]) -> V = {
        let ab = add(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
        let cd = add(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
        let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
        let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
        add(low, _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
    };
    /// Sums of pairs of runs of four lanes: two of `a`, then two of `b`.
    fn halve(a: V, b: V) -> V = {
        let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
        add(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b))
    };
}

crate::backend::cpu::x86::floats::sums!("avx512bw,avx512dq,avx512vl,avx512vnni");
crate::backend::cpu::x86::floats::exponentials!("avx512bw,avx512dq,avx512vl,avx512vnni");
