//! x86-64 with AVX2, FMA and F16C.
//!
//! `maddubs` multiplies unsigned by signed bytes and adds pairs in 16 bits: weights are the unsigned side. Where a
//! format stores them with an offset, the offset times the activations is subtracted there, which rows share. No sum
//! leaves 16 bits: two pairs of 31 * 127, or one of 63 * 127 or 128 * 127.
#![allow(unsafe_code, reason = "loads and stores through array references")]

use std::arch::x86_64::*;

use bytemuck::Pod;

pub(crate) mod attend;
mod attend_chosen;
pub(crate) mod attend_lanes;
pub(crate) mod elementwise;
mod floats;
pub(in crate::backend::cpu) mod gemm;
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
pub(crate) mod gemv_unpacked;
mod lanes;
pub(crate) mod multiply_panels;
pub(crate) mod panels;
pub(crate) mod roofline;
pub(in crate::backend::cpu) mod unpack;

/// The 32 bytes of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load<T: Pod>(x: &T) -> __m256i {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: reads the 32 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm256_loadu_si256((x as *const T).cast()) }
}

/// Writes the 32 bytes of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store<T: Pod>(x: __m256i, out: &mut T) {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: writes the 32 bytes of an exclusively borrowed plain value; no alignment is asked.
    unsafe { _mm256_storeu_si256((out as *mut T).cast(), x) }
}

/// The 16 bytes of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load128<T: Pod>(x: &T) -> __m128i {
    const { assert!(size_of::<T>() == 16) };
    // SAFETY: reads the 16 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm_loadu_si128((x as *const T).cast()) }
}

/// Two runs of 16 bytes, one after the other.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn join2<T: Pod>(a: &T, b: &T) -> __m256i {
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(load128(a)), load128(b))
}

/// The low and the high nibbles of bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(x: __m256i) -> (__m256i, __m256i) {
    let mask = _mm256_set1_epi8(15);
    let high = _mm256_srli_epi16::<4>(x);
    (_mm256_and_si256(x, mask), _mm256_and_si256(high, mask))
}

/// 16 wherever one of the 32 `bits` is set.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen_where(bits: u32) -> __m256i {
    let which = _mm256_setr_epi64x(
        0,
        0x0101_0101_0101_0101,
        0x0202_0202_0202_0202,
        0x0303_0303_0303_0303,
    );
    let each = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), which);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
    _mm256_and_si256(set, _mm256_set1_epi8(16))
}

/// Sums of pairs of 16 bits, as floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pairs(x: __m256i) -> __m256 {
    _mm256_cvtepi32_ps(_mm256_madd_epi16(x, _mm256_set1_epi16(1)))
}

/// Four half floats.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(bits: [u16; 4]) -> __m128 {
    let [a, b, c, d] = bits.map(u64::from);
    _mm_cvtph_ps(_mm_cvtsi64_si128((a | b << 16 | c << 32 | d << 48) as i64))
}

/// A half float in all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn splat_half(bits: u16) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(bits as i16))
}

/// Lanes `A` and `B` of `x`, four times each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn spread<const A: i32, const B: i32>(x: __m256) -> __m256 {
    _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(A, A, A, A, B, B, B, B))
}

/// The 128 activations of four blocks of 32, as the formats with nibbles meet them: for each two blocks the first 16 of
/// both, and the last 16 of both.
struct Acts4 {
    low: [__m256i; 2],
    high: [__m256i; 2],
    /// Scales of each two blocks, four lanes to a block.
    d: [__m256; 2],
    /// Scaled sums likewise.
    s: [__m256; 2],
}

impl Acts4 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(q: &[i8; 128], d: &[f32; 4], s: &[f32; 4]) -> Self {
        let [a, b, c, e] = bytemuck::cast_ref::<_, [[i8; 32]; 4]>(q)
            .each_ref()
            .map(|q| load(q));
        let each = |x: &[f32; 4]| {
            let x = _mm256_castps128_ps256(_mm_castsi128_ps(load128(x)));
            [spread::<0, 1>(x), spread::<2, 3>(x)]
        };
        Self {
            low: [
                _mm256_permute2x128_si256::<0x20>(a, b),
                _mm256_permute2x128_si256::<0x20>(c, e),
            ],
            high: [
                _mm256_permute2x128_si256::<0x31>(a, b),
                _mm256_permute2x128_si256::<0x31>(c, e),
            ],
            d: each(d),
            s: each(s),
        }
    }

    /// Products of two blocks with unsigned weights in 16 bits, pairs summed.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot(&self, which: usize, (low, high): (__m256i, __m256i)) -> __m256i {
        let low = _mm256_maddubs_epi16(low, self.low[which]);
        _mm256_add_epi16(low, _mm256_maddubs_epi16(high, self.high[which]))
    }

    /// `offset` times the activations, in the lanes of `dot`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn offset(&self, offset: i8) -> [__m256i; 2] {
        let offset = _mm256_set1_epi8(offset);
        [self.dot(0, (offset, offset)), self.dot(1, (offset, offset))]
    }
}

/// The sums of two blocks' products of four rows, of each block row after row: one conversion and one scale for all of
/// them. A whole block must fit in 16 bits twice.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold_rows(dots: [__m256i; 4]) -> __m256 {
    let ones = _mm256_set1_epi16(1);
    let [a, b, c, d] = dots.map(|dot| _mm256_madd_epi16(dot, ones));
    let ab = _mm256_madd_epi16(_mm256_packs_epi32(a, b), ones);
    let cd = _mm256_madd_epi16(_mm256_packs_epi32(c, d), ones);
    _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_packs_epi32(ab, cd), ones))
}

/// Half floats of two blocks of four rows, of each block row after row.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves_of_rows(bits: [[u16; 2]; 4]) -> __m256 {
    let block = |i: usize| {
        let [a, b, c, d] = bits.map(|bits| u64::from(bits[i]));
        (a | b << 16 | c << 32 | d << 48) as i64
    };
    _mm256_cvtph_ps(_mm_set_epi64x(block(1), block(0)))
}

/// The 256 activations of a super-block with eight scales of 32 weights.
struct Acts8 {
    /// For each two pairs of groups (0, 1 and 2, 3; 4, 5 and 6, 7): the first and the last 16 of the even groups, then
    /// of the odd ones.
    q: [[__m256i; 4]; 2],
    d: __m256,
    s: __m256,
}

impl Acts8 {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Self {
        let groups: &[[i8; 32]; 8] = bytemuck::cast_ref(q);
        let mut q = [[_mm256_setzero_si256(); 4]; 2];
        for (q, groups) in q.iter_mut().zip(groups.as_chunks::<4>().0) {
            let (even, even_2) = (load(&groups[0]), load(&groups[2]));
            let (odd, odd_2) = (load(&groups[1]), load(&groups[3]));
            *q = [
                _mm256_permute2x128_si256::<0x20>(even, even_2),
                _mm256_permute2x128_si256::<0x31>(even, even_2),
                _mm256_permute2x128_si256::<0x20>(odd, odd_2),
                _mm256_permute2x128_si256::<0x31>(odd, odd_2),
            ];
        }
        Self {
            q,
            d: _mm256_castsi256_ps(load(d)),
            s: _mm256_castsi256_ps(load(s)),
        }
    }

    /// Adds the products with the unsigned weights `q`, in the order of the activations.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(
        &self,
        (d, dmin, packed): (u16, u16, &[u8; 12]),
        q: [[__m256i; 4]; 2],
        sum: __m256,
    ) -> __m256 {
        let (scales, mins) = unpack_scales(packed);
        let scales = _mm256_mul_ps(_mm256_mul_ps(scales, splat_half(d)), self.d);
        let mins = _mm256_mul_ps(mins, splat_half(dmin));
        let sum = _mm256_fnmadd_ps(mins, self.s, sum);
        let sum = _mm256_fmadd_ps(self.dot(&q, 0, 0), spread::<0, 2>(scales), sum);
        let sum = _mm256_fmadd_ps(self.dot(&q, 0, 2), spread::<1, 3>(scales), sum);
        let sum = _mm256_fmadd_ps(self.dot(&q, 1, 0), spread::<4, 6>(scales), sum);
        _mm256_fmadd_ps(self.dot(&q, 1, 2), spread::<5, 7>(scales), sum)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot(&self, q: &[[__m256i; 4]; 2], i: usize, at: usize) -> __m256 {
        let first = _mm256_maddubs_epi16(q[i][at], self.q[i][at]);
        let last = _mm256_maddubs_epi16(q[i][at + 1], self.q[i][at + 1]);
        pairs(_mm256_add_epi16(first, last))
    }
}

/// The eight 6-bit scales and the eight minima of Q4_K and Q5_K.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_scales(packed: &[u8; 12]) -> (__m256, __m256) {
    let [a, b, c] = bytemuck::cast::<_, [[u8; 4]; 3]>(*packed).map(u32::from_le_bytes);
    let first = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32) as i64;
    let scales = first(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | (a >> 2) & 0x3030_3030);
    let mins = first(
        b & 0x3f3f_3f3f,
        (c >> 4) & 0x0f0f_0f0f | (b >> 2) & 0x3030_3030,
    );
    let wide = |x: i64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x)));
    (wide(scales), wide(mins))
}
