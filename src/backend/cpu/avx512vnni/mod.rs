//! x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
//!
//! `vpdpbusd` multiplies unsigned by signed bytes: weights are the unsigned side. Where a format stores them with an
//! offset, the sums start from minus the offset times the activations, which rows share.
#![allow(unsafe_code, reason = "loads and stores through array references")]

use std::arch::x86_64::*;

use bytemuck::Pod;

pub(crate) mod attend;
mod attend_chosen;
pub(crate) mod attend_lanes;
pub(crate) mod elementwise;
pub(in crate::backend::cpu) mod floats;
pub(crate) mod gemm;
pub(crate) mod gemm_float;
pub(crate) mod gemm_q4_0;
pub(crate) mod gemm_q4_1;
pub(crate) mod gemm_q4_k;
pub(crate) mod gemm_q5_0;
pub(crate) mod gemm_q5_k;
pub(crate) mod gemm_q6_k;
pub(crate) mod gemm_q8_0;
pub(crate) mod gemv_float;
pub(crate) mod gemv_q4_0;
pub(crate) mod gemv_q4_1;
pub(crate) mod gemv_q4_k;
pub(crate) mod gemv_q5_0;
pub(crate) mod gemv_q5_k;
pub(crate) mod gemv_q6_k;
pub(crate) mod gemv_q8_0;
mod lanes;
pub(crate) mod multiply_panels;
pub(crate) mod panels;
pub(crate) mod roofline;

/// The 64 bytes of `x`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn load<T: Pod>(x: &T) -> __m512i {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: reads the 64 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm512_loadu_si512((x as *const T).cast()) }
}

/// Writes the 64 bytes of `x`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn store<T: Pod>(x: __m512i, out: &mut T) {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: writes the 64 bytes of an exclusively borrowed plain value; no alignment is asked.
    unsafe { _mm512_storeu_si512((out as *mut T).cast(), x) }
}

/// The 32 bytes of `x`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn load256<T: Pod>(x: &T) -> __m256i {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: reads the 32 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm256_loadu_si256((x as *const T).cast()) }
}

/// The 16 bytes of `x`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn load128<T: Pod>(x: &T) -> __m128i {
    const { assert!(size_of::<T>() == 16) };
    // SAFETY: reads the 16 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm_loadu_si128((x as *const T).cast()) }
}

/// Four runs of 16 bytes, one after the other.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn join4<T: Pod>(x: [&T; 4]) -> __m512i {
    let joined = _mm512_castsi128_si512(load128(x[0]));
    let joined = _mm512_inserti32x4::<1>(joined, load128(x[1]));
    let joined = _mm512_inserti32x4::<2>(joined, load128(x[2]));
    _mm512_inserti32x4::<3>(joined, load128(x[3]))
}

/// Two runs of 32 bytes, one after the other.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn join2<T: Pod>(x: [&T; 2]) -> __m512i {
    let joined = _mm512_castsi256_si512(load256(x[0]));
    _mm512_inserti64x4::<1>(joined, load256(x[1]))
}

/// The low and the high nibbles of bytes.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn nibbles(x: __m512i) -> (__m512i, __m512i) {
    let mask = _mm512_set1_epi8(15);
    let high = _mm512_srli_epi16::<4>(x);
    (_mm512_and_si512(x, mask), _mm512_and_si512(high, mask))
}

/// The half floats at 16 places (in units of 2 bytes) of `x`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn halves_at<T: Pod>(places: &[u16; 32], x: &T) -> __m512 {
    let halves = _mm512_permutexvar_epi16(load(places), load(x));
    _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
}

/// Indices for a permutation: lane `i` takes `first + step * (i / each)`.
const fn lanes(first: u32, step: u32, each: u32) -> [u32; 16] {
    let mut lanes = [0; 16];
    let mut i = 0;
    while i < 16 {
        lanes[i] = first + step * (i as u32 / each);
        i += 1;
    }
    lanes
}

/// Places for `halves_at`: lane `i` takes `first + step * (i / each)`.
pub(in crate::backend::cpu) const fn places(first: u16, step: u16, each: u16) -> [u16; 32] {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 16 {
        places[i] = first + step * (i as u16 / each);
        i += 1;
    }
    places
}

/// The 128 activations of four blocks of 32, as the formats with nibbles meet them: of each block the first 16, then
/// of each block the last 16.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Acts4 {
    low: __m512i,
    high: __m512i,
    /// Scales, four lanes to a block.
    pub(in crate::backend::cpu) d: __m512,
    /// Scaled sums likewise.
    pub(in crate::backend::cpu) s: __m512,
}

impl Acts4 {
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn new(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Self {
        let [a, b] = bytemuck::cast_ref::<_, [[i8; 64]; 2]>(q);
        let (a, b) = (load(a), load(b));
        Self {
            low: _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            high: _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            d: spread4(d),
            s: spread4(s),
        }
    }

    /// `start` plus the products with unsigned weights, four lanes to a block.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(in crate::backend::cpu) fn dot(
        &self,
        start: __m512i,
        (low, high): (__m512i, __m512i),
    ) -> __m512i {
        _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, low, self.low), high, self.high)
    }
}

/// Each of four floats in four lanes.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn spread4(x: &[f32; 4]) -> __m512 {
    let x = _mm512_castps128_ps512(_mm_castsi128_ps(load128(x)));
    _mm512_permutexvar_ps(load(const { &lanes(0, 1, 4) }), x)
}

/// The sums of the runs of four lanes of four rows' products, of each run row after row: one conversion and one scale
/// for all of them. Sums of two lanes must fit in 16 bits.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn fold_rows(dots: [__m512i; 4]) -> __m512 {
    let ones = _mm512_set1_epi16(1);
    let ab = _mm512_madd_epi16(_mm512_packs_epi32(dots[0], dots[1]), ones);
    let cd = _mm512_madd_epi16(_mm512_packs_epi32(dots[2], dots[3]), ones);
    _mm512_cvtepi32_ps(_mm512_madd_epi16(_mm512_packs_epi32(ab, cd), ones))
}

/// Of four rows, each `x` and where in it the half floats of four blocks are (as for `halves_at`, four lanes each): of
/// each block row after row.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(in crate::backend::cpu) fn halves_of_rows<T: Pod>(places: &[u16; 32], x: [&T; 4]) -> __m512 {
    let places = load(places);
    let halves = _mm512_permutexvar_epi16(places, load(x[0]));
    let halves = _mm512_mask_permutexvar_epi16(halves, 0x2222, places, load(x[1]));
    let halves = _mm512_mask_permutexvar_epi16(halves, 0x4444, places, load(x[2]));
    let halves = _mm512_mask_permutexvar_epi16(halves, 0x8888, places, load(x[3]));
    _mm512_cvtph_ps(_mm512_castsi512_si256(halves))
}

/// A half float in all lanes.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn splat_half(bits: u16) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(bits as i16))
}

/// The 256 activations of a super-block with eight scales of 32 weights.
struct Acts8 {
    /// The first and the last 16 of the even groups, then of the odd ones.
    q: [__m512i; 4],
    /// Scales, then scaled sums, of the eight groups.
    d_s: __m512,
}

impl Acts8 {
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn new(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Self {
        let [a, b, c, e] = bytemuck::cast_ref::<_, [[i8; 64]; 4]>(q)
            .each_ref()
            .map(|q| load(q));
        // Runs of 16: `even` of the even groups 0, 2 and 4, 6, `odd` likewise.
        let even = [
            _mm512_shuffle_i32x4::<0b01_00_01_00>(a, b),
            _mm512_shuffle_i32x4::<0b01_00_01_00>(c, e),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0b11_10_11_10>(a, b),
            _mm512_shuffle_i32x4::<0b11_10_11_10>(c, e),
        ];
        Self {
            q: [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(even[0], even[1]),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(odd[0], odd[1]),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(odd[0], odd[1]),
            ],
            d_s: _mm512_castsi512_ps(_mm512_inserti64x4::<1>(
                _mm512_castsi256_si512(load256(d)),
                load256(s),
            )),
        }
    }

    /// Adds the products with the unsigned weights `q`, in the order of the activations.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add(&self, scales: &Scales, q: [__m512i; 4], sum: __m512) -> __m512 {
        let zero = _mm512_setzero_si512();
        let even = _mm512_dpbusd_epi32(zero, q[0], self.q[0]);
        let even = _mm512_dpbusd_epi32(even, q[1], self.q[1]);
        let odd = _mm512_dpbusd_epi32(zero, q[2], self.q[2]);
        let odd = _mm512_dpbusd_epi32(odd, q[3], self.q[3]);
        let even_scales = _mm512_permutexvar_ps(load(const { &lanes(0, 2, 4) }), scales.0);
        let odd_scales = _mm512_permutexvar_ps(load(const { &lanes(1, 2, 4) }), scales.0);
        let sum = _mm512_mask_add_ps(sum, 0xff00, sum, scales.0);
        let sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(even), even_scales, sum);
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(odd), odd_scales, sum)
    }
}

/// Of a super-block of Q4_K or Q5_K, times the activations': eight scales, then the products of minus the minima.
struct Scales(__m512);

impl Scales {
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn new(d: u16, dmin: u16, packed: &[u8; 12], x: &Acts8) -> Self {
        let [a, b, c] = bytemuck::cast::<_, [[u8; 4]; 3]>(*packed).map(u32::from_le_bytes);
        let scales = a & 0x3f3f_3f3f;
        let mins = b & 0x3f3f_3f3f;
        let scales_4 = c & 0x0f0f_0f0f | (a >> 2) & 0x3030_3030;
        let mins_4 = (c >> 4) & 0x0f0f_0f0f | (b >> 2) & 0x3030_3030;
        let bytes = _mm_set_epi64x(
            (u64::from(mins) | u64::from(mins_4) << 32) as i64,
            (u64::from(scales) | u64::from(scales_4) << 32) as i64,
        );
        let scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        // Minus dmin: the sign of a half float is its top bit.
        let d = _mm256_setr_m128i(
            _mm_set1_epi16(d as i16),
            _mm_set1_epi16((dmin ^ 0x8000) as i16),
        );
        Self(_mm512_mul_ps(
            _mm512_mul_ps(scales, _mm512_cvtph_ps(d)),
            x.d_s,
        ))
    }
}
