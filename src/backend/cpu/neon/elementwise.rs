//! Activations to 8 bits, gated units, half floats: what the compiler does not vectorize by itself.

use std::arch::aarch64::*;

use super::{load_f32, padded, store_f32, store_i8, store_u16};
use crate::backend::Activation;
use crate::backend::cpu::acts::{Q8_LEN, Q8RowMut};
use crate::backend::cpu::scalar::elementwise as scalar;

/// The same numbers as the scalar row's: `x[i] = d * q[i]`, `d = max|x| / 127` per 32, `s = d * sum(q)`, `n` the sums of
/// 16 `q`, `u = q + 128`.
#[target_feature(enable = "neon")]
pub(crate) fn quantize(x: &[f32], row: &mut Q8RowMut) {
    let x = x.as_chunks::<Q8_LEN>().0.iter();
    let q = row.q.as_chunks_mut::<Q8_LEN>().0.iter_mut();
    let n = row.n.as_chunks_mut::<2>().0.iter_mut();
    let scales = row.d.iter_mut().zip(&mut *row.s).zip(n);
    for ((x, q), ((d, s), n)) in x.zip(q).zip(scales) {
        let x = bytemuck::cast_ref::<_, [[f32; 4]; 8]>(x)
            .each_ref()
            .map(|x| load_f32(x));
        // The greatest number: NaN is passed over.
        let max = |a: [float32x4_t; 2]| vmaxnmq_f32(a[0], a[1]);
        let [a, b, c, e] = [0, 2, 4, 6].map(|i| max([vabsq_f32(x[i]), vabsq_f32(x[i + 1])]));
        let max = vmaxnmvq_f32(max([max([a, b]), max([c, e])]));
        *d = max / 127.0;
        let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
        let codes = x.map(|x| vcvtnq_s32_f32(vmulq_n_f32(x, inverse)));
        let narrow = |i: usize| {
            let low = vqmovn_s32(codes[i]);
            vqmovn_high_s32(low, codes[i + 1])
        };
        let bytes = |i: usize| vqmovn_high_s16(vqmovn_s16(narrow(i)), narrow(i + 2));
        let codes = [bytes(0), bytes(4)];
        let [low, high]: &mut [[i8; 16]; 2] = bytemuck::cast_mut(q);
        store_i8(low, codes[0]);
        store_i8(high, codes[1]);
        *n = codes.map(|codes| i32::from(vaddlvq_s8(codes)));
        *s = *d * (n[0] + n[1]) as f32;
    }
    scalar::raise(row);
}

/// `gate = activation(gate) * up`.
#[target_feature(enable = "neon")]
pub(crate) fn glu(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => map(gate, up, |g, u| vmulq_f32(sigmoid_times(g, g), u)),
        // 0.5 (1 + tanh(z)) is the sigmoid of 2z.
        Activation::GeluTanh => map(gate, up, |g, u| {
            let cubic = vmulq_f32(vmulq_n_f32(vmulq_f32(g, g), 0.044_715), g);
            let twice = vmulq_n_f32(vaddq_f32(g, cubic), 2.0 * 0.797_884_6);
            vmulq_f32(sigmoid_times(twice, g), u)
        }),
        Activation::Relu => map(gate, up, |g, u| {
            vmulq_f32(vmaxnmq_f32(g, vdupq_n_f32(0.0)), u)
        }),
    }
}

/// `x = f(x, y)`, four at a time.
#[inline]
#[target_feature(enable = "neon")]
fn map(x: &mut [f32], y: &[f32], f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) {
    let (xs, x_rest) = x.as_chunks_mut::<4>();
    let (ys, y_rest) = y.as_chunks::<4>();
    for (x, y) in xs.iter_mut().zip(ys) {
        store_f32(x, f(load_f32(x), load_f32(y)));
    }
    let mut last = [0.0; 4];
    store_f32(
        &mut last,
        f(load_f32(&padded(x_rest)), load_f32(&padded(y_rest))),
    );
    x_rest.copy_from_slice(&last[..x_rest.len()]);
}

/// `y / (1 + exp(-x))`.
#[inline]
#[target_feature(enable = "neon")]
fn sigmoid_times(x: float32x4_t, y: float32x4_t) -> float32x4_t {
    vdivq_f32(y, vaddq_f32(vdupq_n_f32(1.0), exp(vnegq_f32(x))))
}

/// `exp(x)` within two units in the last place; 0 below -87.3 (where it is no normal number), infinity above 88.7.
///
/// `exp(x) = 2^n exp(r)`, `n = round(x / ln 2)`, `|r| <= ln(2) / 2`, with Cephes' polynomial for `exp(r)`.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn exp(x: float32x4_t) -> float32x4_t {
    const LOWEST: f32 = -87.336_54;
    const HIGHEST: f32 = 88.722_83;
    // ln 2 in two parts, of which the first times any n is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const POLYNOMIAL: [f32; 6] = [
        1.987_569_2e-4,
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ];
    let n = vrndnq_f32(vmulq_n_f32(x, std::f32::consts::LOG2_E));
    let r = vfmsq_f32(x, n, vdupq_n_f32(LN_2[0]));
    let r = vfmsq_f32(r, n, vdupq_n_f32(LN_2[1]));
    let mut p = vdupq_n_f32(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = vfmaq_f32(vdupq_n_f32(*c), p, r);
    }
    let p = vfmaq_f32(vaddq_f32(r, vdupq_n_f32(1.0)), p, vmulq_f32(r, r));
    // 2^n in two factors: n reaches 128, which one exponent cannot hold.
    let n = vcvtq_s32_f32(n);
    let half = vshrq_n_s32::<1>(n);
    let power =
        |n: int32x4_t| vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127))));
    let y = vmulq_f32(vmulq_f32(p, power(half)), power(vsubq_s32(n, half)));
    let y = vbslq_f32(
        vcgtq_f32(x, vdupq_n_f32(HIGHEST)),
        vdupq_n_f32(f32::INFINITY),
        y,
    );
    vbslq_f32(vcltq_f32(x, vdupq_n_f32(LOWEST)), vdupq_n_f32(0.0), y)
}

/// Floats to half floats, nearest even.
#[target_feature(enable = "neon")]
pub(crate) fn to_f16(x: &[f32], y: &mut [u16]) {
    let (xs, x_rest) = x.as_chunks::<4>();
    let (ys, y_rest) = y.as_chunks_mut::<4>();
    for (x, y) in xs.iter().zip(ys) {
        store_u16(y, vreinterpret_u16_f16(vcvt_f16_f32(load_f32(x))));
    }
    let mut last = [0; 4];
    let x = load_f32(&padded(x_rest));
    store_u16(&mut last, vreinterpret_u16_f16(vcvt_f16_f32(x)));
    y_rest.copy_from_slice(&last[..y_rest.len()]);
}
