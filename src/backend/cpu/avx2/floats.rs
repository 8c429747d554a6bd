//! Vectors of eight floats.
#![allow(unsafe_code, reason = "loads and stores through array references")]

use std::arch::x86_64::*;

use crate::quant::{BlockQ4_0, BlockQ8_0};

/// A vector.
pub(super) type V = __m256;

/// Its floats.
pub(super) const LANES: usize = 8;

/// Vectors of a row that a kernel sums at a time for each of four queries.
pub(super) const WIDTH: usize = 2;

/// Rows and tokens of a GEMM's tile of sums.
pub(super) const TILE: (usize, usize) = (2, 4);

crate::backend::cpu::x86::floats::operations! { "avx2,fma,f16c":
    // SAFETY: reads the 32 bytes of a borrowed array; no alignment is asked.
    fn load(x: &[f32; 8]) -> V = unsafe { _mm256_loadu_ps(x.as_ptr()) };
    // SAFETY: writes the 32 bytes of an exclusively borrowed array; no alignment is asked.
    fn store(x: V, out: &mut [f32; 8]) = unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) };
    fn load_f16(x: &[u16; 8]) -> V = _mm256_cvtph_ps(super::load128(x));
    fn store_f16(x: V, out: &mut [u16; 8]) = {
        let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x);
        // SAFETY: writes the 16 bytes of an exclusively borrowed array; no alignment is asked.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), halves) }
    };
    /// The vector `i` of the four of a block.
    fn load_q8_0(block: &BlockQ8_0, i: usize) -> V = {
        let q = bytemuck::cast_ref::<_, [[u8; 8]; 4]>(&block.qs)[i];
        let q = _mm_cvtsi64_si128(i64::from_le_bytes(q));
        mul(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), super::splat_half(block.d))
    };
    /// The vector `i` of the four of a block: the first two are low nibbles.
    fn load_q4_0(block: &BlockQ4_0, i: usize) -> V = {
        let q = bytemuck::cast_ref::<_, [[u8; 8]; 2]>(&block.qs)[i % 2];
        let q = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(q)));
        let q = _mm256_srlv_epi32(q, _mm256_set1_epi32(4 * (i / 2) as i32));
        let q = _mm256_cvtepi32_ps(_mm256_and_si256(q, _mm256_set1_epi32(15)));
        // Exact: a scale has 11 bits.
        let d = super::splat_half(block.d);
        fma(q, d, mul(d, splat(-8.0)))
    };
    /// Where `key` is off from `held` by more than `threshold`, or is no number: the differences, the indices of their
    /// lanes from `first` on, what is held then, how many there are.
    fn changes(of: (V, V, V), first: usize, changes: &mut [f32; 8], lanes: &mut [u8; 8]) -> (V, usize) = {
        let (key, held, threshold) = of;
        let change = sub(key, held);
        let size = _mm256_andnot_ps(splat(-0.0), change);
        let is_new = _mm256_cmp_ps::<_CMP_NLE_UQ>(size, threshold);
        let mask = _mm256_movemask_ps(is_new);
        let mut all = [0.0; 8];
        store(change, &mut all);
        let mut n = 0;
        for (i, change) in all.into_iter().enumerate() {
            changes[n & 7] = change;
            lanes[n & 7] = (first + i) as u8;
            n += (mask >> i & 1) as usize;
        }
        (_mm256_blendv_ps(held, key, is_new), n)
    };
    /// Whole numbers to bytes.
    fn store_i8(x: V, out: &mut [i8; 8]) = {
        let x = _mm256_cvtps_epi32(x);
        let x = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
        let bytes = _mm_packs_epi16(x, x);
        // SAFETY: writes the 8 bytes of an exclusively borrowed array; no alignment is asked.
        unsafe { _mm_storeu_si64(out.as_mut_ptr().cast(), bytes) }
    };
    fn splat(x: f32) -> V = _mm256_set1_ps(x);
    fn add(a: V, b: V) -> V = _mm256_add_ps(a, b);
    fn sub(a: V, b: V) -> V = _mm256_sub_ps(a, b);
    fn mul(a: V, b: V) -> V = _mm256_mul_ps(a, b);
    fn div(a: V, b: V) -> V = _mm256_div_ps(a, b);
    fn max(a: V, b: V) -> V = _mm256_max_ps(a, b);
    /// `b` where either is NaN.
    fn min(a: V, b: V) -> V = _mm256_min_ps(a, b);
    /// `a * b + c`.
    fn fma(a: V, b: V, c: V) -> V = _mm256_fmadd_ps(a, b, c);
    fn round(x: V) -> V = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    fn sum(x: V) -> f32 = {
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    };
    fn first(x: V) -> f32 = _mm256_cvtss_f32(x);
    fn max_of(x: V) -> f32 = {
        let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    };
    /// Minus infinity outside the lanes `first..end`.
    fn only(x: V, first: usize, end: usize) -> V = {
        let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let before = _mm256_cmpgt_epi32(_mm256_set1_epi32(first as i32), lane);
        let inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(end as i32), lane);
        let inside = _mm256_castsi256_ps(_mm256_andnot_si256(before, inside));
        _mm256_blendv_ps(splat(f32::NEG_INFINITY), x, inside)
    };
    /// Minus infinity where the bit of a lane is not set.
    fn only_bits(x: V, bits: &[u8; 1]) -> V = {
        let lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        let chosen = _mm256_and_si256(_mm256_set1_epi32(i32::from(bits[0])), lanes);
        let chosen = _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lanes));
        _mm256_blendv_ps(splat(f32::NEG_INFINITY), x, chosen)
    };
    /// Eight lanes.
    fn join(x: [&[f32; 8]; 1]) -> V = load(x[0]);
    /// The rows of an eight of vectors become columns.
    fn turn_eight(rows: [&[f32; 8]; 8], out: &mut [[f32; 8]; 8]) = {
        let pairs = |first: usize| {
            let [a, b] = [load(rows[first]), load(rows[first + 1])];
            [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)].map(|x| _mm256_castps_pd(x))
        };
        // Run `j` of four lanes of vector `i`: four rows of column `4 j + i`.
        let fours = |first: usize| {
            let ([a, b], [c, d]) = (pairs(first), pairs(first + 2));
            [
                _mm256_unpacklo_pd(a, c),
                _mm256_unpackhi_pd(a, c),
                _mm256_unpacklo_pd(b, d),
                _mm256_unpackhi_pd(b, d),
            ]
            .map(|x| _mm256_castpd_ps(x))
        };
        for (i, (up, down)) in fours(0).into_iter().zip(fours(4)).enumerate() {
            store(_mm256_permute2f128_ps::<0x20>(up, down), &mut out[i]);
            store(_mm256_permute2f128_ps::<0x31>(up, down), &mut out[4 + i]);
        }
    };
    /// A bit for each key that is at least `least`.
    fn at_least(keys: &[i32; LANES], least: i32) -> u8 = {
        let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(least), super::load(keys));
        !(_mm256_movemask_ps(_mm256_castsi256_ps(below)) as u8)
    };
    /// `p * 2^n`; 0 where `x` is below -87.3.
    fn times_power_of_two(p: V, n: V, x: V) -> V = {
        let normal = _mm256_cmp_ps::<_CMP_NLT_UQ>(x, splat(-87.3));
        // Two factors: 2^128 has no float of its own.
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127))));
        let scaled = mul(mul(p, power(half)), power(_mm256_sub_epi32(n, half)));
        _mm256_and_ps(normal, scaled)
    };
    /// The sum of each of four vectors.
    fn sum_of_4(x: [V; 4]) -> [f32; 4] = sum_runs(fold4(x));
    /// The sum of runs of four lanes.
    fn sum_runs(x: V) -> [f32; 4] = {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let mut out = [0.0; 4];
        // SAFETY: writes the 16 bytes of a local array; no alignment is asked.
        unsafe { _mm_storeu_ps(out.as_mut_ptr(), x) };
        out
    };
    /// The sums of eight vectors.
    fn fold(x: [V; 8]) -> V = {
        fold_fours([fold4([x[0], x[1], x[2], x[3]]), fold4([x[4], x[5], x[6], x[7]])])
    };
    /// The sums of eight vectors of which fours are [folded](fold4).
    fn fold_fours(x: [V; 2]) -> V = {
        add(_mm256_permute2f128_ps::<0x20>(x[0], x[1]), _mm256_permute2f128_ps::<0x31>(x[0], x[1]))
    };
    /// In each run of four lanes the sums of that run of four vectors.
    fn fold4(x: [V; 4]) -> V = {
        let ab = add(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
        let cd = add(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
        let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
        let low = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
        add(low, _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)))
    };
}

crate::backend::cpu::x86::floats::sums!("avx2,fma,f16c");
crate::backend::cpu::x86::floats::exponentials!("avx2,fma,f16c");
