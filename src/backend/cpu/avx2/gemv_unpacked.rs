//! Formats without a kernel of their own by Q8 activations: weights are unpacked to signed bytes, 32 at a time. The sign
//! of `w` moves to `x`, since `maddubs` wants one side unsigned; |w| <= 127 and |x| <= 127 keep pairs in 16 bits.

use std::arch::x86_64::*;

use super::gemm::{Scales, float};
use super::{floats, load, pairs, unpack};
use crate::quant;

/// The activations of `N` groups of 32.
struct Groups<const N: usize> {
    q: [__m256i; N],
    d: [f32; N],
    s: [f32; N],
}

impl<const N: usize> Groups<N> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn new(x: &[[i8; 32]; N], d: &[f32; N], s: &[f32; N]) -> Self {
        let mut q = [_mm256_setzero_si256(); N];
        for (q, x) in q.iter_mut().zip(x) {
            *q = load(x);
        }
        Self { q, d: *d, s: *s }
    }

    /// The products of group `i`: four lanes to the first 16 weights, four to the last.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot(&self, i: usize, w: __m256i) -> __m256 {
        pairs(_mm256_maddubs_epi16(
            _mm256_abs_epi8(w),
            _mm256_sign_epi8(self.q[i], w),
        ))
    }
}

/// A float in the lower four lanes, another in the upper.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves([low, high]: [f32; 2]) -> __m256 {
    _mm256_setr_m128(_mm_set1_ps(low), _mm_set1_ps(high))
}

/// Defines the module of a format: `$unit` blocks at a time, of which each has `$groups` groups.
macro_rules! formats {
    ($($format:ident: $block:ident, $unit:literal x $groups:literal, $unpack:expr;)*) => {$(
        pub(crate) mod $format {
            use super::*;

            const N: usize = $unit * $groups;

            type Prepared = Groups<N>;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn prepare(q: &[i8; 32 * N], d: &[f32; N], s: &[f32; N]) -> Prepared {
                Groups::new(bytemuck::cast_ref(q), d, s)
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::modulo_one, reason = "formats with one group a block")]
            fn dot(w: &[quant::$block; $unit], x: &Prepared, mut sum: __m256) -> __m256 {
                let mut mins = 0.0;
                for i in 0..N {
                    let (q, scales): (_, Scales) = $unpack(&w[i / $groups], i % $groups);
                    let scale = _mm256_mul_ps(halves(scales.d), _mm256_set1_ps(x.d[i]));
                    sum = _mm256_fmadd_ps(x.dot(i, q), scale, sum);
                    mins += scales.m * x.s[i];
                }
                _mm256_add_ps(sum, _mm256_zextps128_ps256(_mm_set_ss(mins)))
            }

            crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", quant::$block, $unit);
        }
    )*};
}

formats! {
    q5_1: BlockQ5_1, 4 x 1, |w, i| unpack::q5_1(w, i);
    q3_k: BlockQ3K, 1 x 8, |w, i| unpack::q3_k(w, i);
    iq4_nl: BlockIQ4NL, 4 x 1, |w, i| unpack::iq4_nl(w, i);
    iq4_xs: BlockIQ4XS, 1 x 8, |w, i| unpack::iq4_xs(w, i);
    mxfp4: BlockMXFP4, 4 x 1, |w, i| unpack::mxfp4(w, i);
    tq2_0: BlockTQ2_0, 1 x 8, |w, i| unpack::tq2_0(w, i);
}

/// Q2_K, whose minima are of 16 weights each.
pub(crate) mod q2_k {
    use super::*;
    use crate::quant::BlockQ2K;

    /// The activations, and their sums in the lanes of [`Groups::dot`], scaled.
    struct Prepared {
        x: Groups<8>,
        sums: [__m256; 8],
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn prepare(q: &[i8; 256], d: &[f32; 8], s: &[f32; 8]) -> Prepared {
        let x = Groups::new(bytemuck::cast_ref(q), d, s);
        let mut sums = [_mm256_setzero_ps(); 8];
        for (i, sum) in sums.iter_mut().enumerate() {
            let ones = x.dot(i, _mm256_set1_epi8(1));
            *sum = _mm256_mul_ps(ones, _mm256_set1_ps(x.d[i]));
        }
        Prepared { x, sums }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn dot(w: &[BlockQ2K; 1], x: &Prepared, mut sum: __m256) -> __m256 {
        let [w] = w;
        let (d, dmin) = (float(w.d), float(w.dmin));
        for i in 0..8 {
            let [a, b] = [w.scales[2 * i], w.scales[2 * i + 1]];
            let scale = halves([a, b].map(|x| d * f32::from(x & 15)));
            let min = halves([a, b].map(|x| dmin * f32::from(x >> 4)));
            let scale = _mm256_mul_ps(scale, _mm256_set1_ps(x.x.d[i]));
            let products = x.x.dot(i, unpack::two_bits(&w.qs, i));
            sum = _mm256_fmadd_ps(products, scale, sum);
            sum = _mm256_fnmadd_ps(min, x.sums[i], sum);
        }
        sum
    }

    crate::backend::cpu::x86::gemv::gemv!("avx2,fma,f16c", BlockQ2K, 1);
}
