//! The loops that measure what a machine can do at most.

use std::arch::x86_64::*;
use std::hint::black_box;

use super::load;
use crate::backend::cpu::table::{Line, Products};
use crate::backend::cpu::x86::roofline::reads;

type V = [__m256i; 2];

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn zero() -> V {
    [_mm256_setzero_si256(); 2]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn xor(sum: V, line: &Line) -> V {
    let [low, high]: &[[u8; 32]; 2] = bytemuck::cast_ref(line);
    [
        _mm256_xor_si256(sum[0], load(low)),
        _mm256_xor_si256(sum[1], load(high)),
    ]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fold(sum: V) -> u64 {
    let sum = _mm256_xor_si256(sum[0], sum[1]);
    let sum = _mm_xor_si128(
        _mm256_castsi256_si128(sum),
        _mm256_extracti128_si256::<1>(sum),
    );
    (_mm_cvtsi128_si64(sum) ^ _mm_extract_epi64::<1>(sum)) as u64
}

reads!("avx2,fma,f16c");

/// Four lines, each of two vectors.
type Halves<T, const N: usize> = [[[T; N]; 2]; 4];

/// Two products of bytes are added in 16 bits before they are widened, as the kernels of this level do it.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn products_i8(p: &mut Products<u8, i8, 64>) {
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); 4];
    for _ in 0..p.rounds {
        // Else the products would be taken out of the loop.
        let (w, x): (&Halves<u8, 32>, &Halves<i8, 32>) =
            black_box((bytemuck::cast_ref(p.w), bytemuck::cast_ref(p.x)));
        for i in 0..4 {
            for x in x {
                let low = _mm256_maddubs_epi16(load(&w[i][0]), load(&x[0]));
                let high = _mm256_maddubs_epi16(load(&w[i][1]), load(&x[1]));
                let pairs = _mm256_madd_epi16(_mm256_add_epi16(low, high), ones);
                sums[i] = _mm256_add_epi32(sums[i], pairs);
            }
        }
    }
    for sum in sums {
        p.sum += sum_pd(_mm256_add_pd(
            _mm256_cvtepi32_pd(_mm256_castsi256_si128(sum)),
            _mm256_cvtepi32_pd(_mm256_extracti128_si256::<1>(sum)),
        ));
    }
}

/// Eight sums, just enough: with twelve the compiler keeps some in memory, and is slower by a quarter.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn products_f32(p: &mut Products<f32, f32, 16>) {
    let w: &Halves<f32, 8> = bytemuck::cast_ref(p.w);
    let x: &Halves<f32, 8> = bytemuck::cast_ref(p.x);
    let mut sums = [[_mm256_setzero_ps(); 2]; 4];
    for _ in 0..p.rounds {
        for x in x {
            for i in 0..4 {
                for half in 0..2 {
                    let w = _mm256_castsi256_ps(load(&w[i][half]));
                    let x = _mm256_castsi256_ps(load(&x[half]));
                    sums[i][half] = _mm256_fmadd_ps(w, x, sums[i][half]);
                }
            }
        }
    }
    for sum in sums.as_flattened() {
        p.sum += sum_pd(_mm256_add_pd(
            _mm256_cvtps_pd(_mm256_castps256_ps128(*sum)),
            _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(*sum)),
        ));
    }
}

/// The sum of four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_pd(x: __m256d) -> f64 {
    let x = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd::<1>(x));
    _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)))
}
