//! The loops that measure what a machine can do at most.

use std::arch::x86_64::*;

use super::load;
use crate::backend::cpu::table::{Line, Products};
use crate::backend::cpu::x86::roofline::reads;

type V = __m512i;

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn zero() -> V {
    _mm512_setzero_si512()
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn xor(sum: V, line: &Line) -> V {
    _mm512_xor_si512(sum, load(line))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fold(sum: V) -> u64 {
    let sum = _mm512_xor_si512(sum, _mm512_shuffle_i64x2::<0b01_00_11_10>(sum, sum));
    let sum = _mm512_xor_si512(sum, _mm512_shuffle_i64x2::<0b10_11_00_01>(sum, sum));
    let sum = _mm512_xor_si512(sum, _mm512_shuffle_epi32::<0b01_00_11_10>(sum));
    _mm_cvtsi128_si64(_mm512_castsi512_si128(sum)) as u64
}

reads!("avx512bw,avx512dq,avx512vl,avx512vnni");

/// Sixteen sums in registers: enough to wait for none.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn products_i8(p: &mut Products<u8, i8, 64>) {
    let [mut w, mut x] = [[_mm512_setzero_si512(); 4]; 2];
    for i in 0..4 {
        (w[i], x[i]) = (load(&p.w[i]), load(&p.x[i]));
    }
    let mut sums = [[_mm512_setzero_si512(); 4]; 4];
    for _ in 0..p.rounds {
        for i in 0..4 {
            for j in 0..4 {
                sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], w[i], x[j]);
            }
        }
    }
    for sum in sums.as_flattened() {
        p.sum += _mm512_reduce_add_pd(_mm512_add_pd(
            _mm512_cvtepi32_pd(_mm512_castsi512_si256(*sum)),
            _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64::<1>(*sum)),
        ));
    }
}

/// As `products_i8`.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(crate) fn products_f32(p: &mut Products<f32, f32, 16>) {
    let [mut w, mut x] = [[_mm512_setzero_ps(); 4]; 2];
    for i in 0..4 {
        w[i] = _mm512_castsi512_ps(load(&p.w[i]));
        x[i] = _mm512_castsi512_ps(load(&p.x[i]));
    }
    let mut sums = [[_mm512_setzero_ps(); 4]; 4];
    for _ in 0..p.rounds {
        for i in 0..4 {
            for j in 0..4 {
                sums[i][j] = _mm512_fmadd_ps(w[i], x[j], sums[i][j]);
            }
        }
    }
    for sum in sums.as_flattened() {
        p.sum += _mm512_reduce_add_pd(_mm512_add_pd(
            _mm512_cvtps_pd(_mm512_castps512_ps256(*sum)),
            _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(*sum)),
        ));
    }
}
