//! Q6_K by Q8 activations: `d * scale * dx * (dot(q, x) - 32 * sum(x))`, four lanes to a scale of 16 weights.

use std::arch::x86_64::*;

use super::{lanes, load, load128, load256, nibbles, splat_half};
use crate::quant::BlockQ6K;

struct Prepared {
    /// The activations of 64 weights.
    q: [__m512i; 4],
    offset: [__m512i; 4],
    /// The scales, each twice.
    d: __m512,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn prepare(q: &[i8; 256], d: &[f32; 8], _: &[f32; 8]) -> Prepared {
    let q = bytemuck::cast_ref::<_, [[i8; 64]; 4]>(q)
        .each_ref()
        .map(|q| load(q));
    let offset = q.map(|q| {
        let sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(32), q);
        _mm512_sub_epi32(_mm512_setzero_si512(), sums)
    });
    let d = _mm512_castps256_ps512(_mm256_castsi256_ps(load256(d)));
    let d = _mm512_permutexvar_ps(load(const { &lanes(0, 1, 2) }), d);
    Prepared { q, offset, d }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(w: &[BlockQ6K; 1], x: &Prepared, mut sum: __m512) -> __m512 {
    let [w] = w;
    let scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(&w.scales)));
    let scales = _mm512_mul_ps(_mm512_mul_ps(scales, splat_half(w.d)), x.d);
    let each4 = const {
        &[
            lanes(0, 1, 4),
            lanes(4, 1, 4),
            lanes(8, 1, 4),
            lanes(12, 1, 4),
        ]
    };
    let ql: &[[u8; 64]; 2] = bytemuck::cast_ref(&w.ql);
    let qh: &[[u8; 32]; 2] = bytemuck::cast_ref(&w.qh);
    let upper = _mm512_set1_epi8(0x30);
    // Half the lanes of 64 weights take their upper bits from two places further up.
    let by = |a, b| _mm512_inserti64x4::<1>(_mm512_set1_epi16(a), _mm256_set1_epi16(b));
    for half in 0..2 {
        let (low, high) = nibbles(load(&ql[half]));
        let bits = _mm512_broadcast_i64x4(load256(&qh[half]));
        // 0xf8: first or (second and third).
        let first = _mm512_sllv_epi16(bits, by(4, 2));
        let first = _mm512_ternarylogic_epi32::<0xf8>(low, first, upper);
        let last = _mm512_srlv_epi16(bits, by(0, 2));
        let last = _mm512_ternarylogic_epi32::<0xf8>(high, last, upper);
        for (i, q) in [first, last].into_iter().enumerate() {
            let i = 2 * half + i;
            let dot = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.offset[i], q, x.q[i]));
            let scale = _mm512_permutexvar_ps(load(&each4[i]), scales);
            sum = _mm512_fmadd_ps(dot, scale, sum);
        }
    }
    sum
}

crate::backend::cpu::x86::gemv::gemv!("avx512bw,avx512dq,avx512vl,avx512vnni", BlockQ6K, 1);
