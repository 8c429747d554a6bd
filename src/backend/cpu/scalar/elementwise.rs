//! Norms, rotary embedding, gated units, conversions: one body for all levels.

use crate::backend::Activation;
use crate::backend::cpu::acts::{BF16_LEN, BF16_TOKENS, Tile};
use crate::backend::cpu::acts::{Q8_LEN, Q8RowMut};
use crate::quant::f32_to_f16;

/// `x[i] = d * q[i]`, `d = max|x| / 127` per 32, `s = d * sum(q)`, `n` the sums of 16 `q`, `u = q + 128`.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], row: &mut Q8RowMut) {
    let x = x.as_chunks::<Q8_LEN>().0.iter();
    let q = row.q.as_chunks_mut::<Q8_LEN>().0.iter_mut();
    let n = row.n.as_chunks_mut::<2>().0.iter_mut();
    let scales = row.d.iter_mut().zip(&mut *row.s).zip(n);
    for ((x, q), ((d, s), n)) in x.zip(q).zip(scales) {
        let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        *d = max / 127.0;
        let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
        *n = [0; 2];
        for (i, (x, q)) in x.iter().zip(q).enumerate() {
            *q = (x * inverse).round_ties_even() as i8;
            n[i / 16] += i32::from(*q);
        }
        *s = *d * (n[0] + n[1]) as f32;
    }
    raise(row);
}

/// `u = q + 128`.
#[inline(always)]
pub(crate) fn raise(row: &mut Q8RowMut) {
    let q = row.q.iter();
    row.u
        .iter_mut()
        .zip(q)
        .for_each(|(u, q)| *u = *q as u8 ^ 0x80);
}

/// `y = x / sqrt(mean(x^2) + eps) * gain`.
#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
    // Sixteen partial sums: a fixed order for every vector width up to that.
    let mut partial = [0.0f32; 16];
    let chunks = x.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for (sum, x) in partial.iter_mut().zip(chunk) {
            *sum += x * x;
        }
    }
    let mean = (partial.iter().sum::<f32>() + rest) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
        *y = x * scale * gain;
    }
}

/// Pairs `(x[i], x[i + n])`.
#[inline(always)]
pub(crate) fn rope_halves(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = x[..2 * cos.len()].split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
    }
}

/// Pairs `(x[2i], x[2i + 1])`.
#[inline(always)]
pub(crate) fn rope_neighbours(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos);
    }
}

/// `gate = activation(gate) * up`.
#[inline(always)]
pub(crate) fn glu(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u),
        Activation::GeluTanh => pairs.for_each(|(g, u)| {
            // 0.5 (1 + tanh(z)) = 1 / (1 + e^-2z), which does not cancel.
            let twice = 2.0 * 0.797_884_6 * (*g + 0.044_715 * *g * *g * *g);
            *g = *g / (1.0 + (-twice).exp()) * u;
        }),
        Activation::Relu => pairs.for_each(|(g, u)| *g = g.max(0.0) * u),
    }
}

/// `x += y`.
#[inline(always)]
pub(crate) fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// Floats to half floats, nearest even.
#[inline(always)]
pub(crate) fn to_f16(x: &[f32], y: &mut [u16]) {
    x.iter().zip(y).for_each(|(x, y)| *y = f32_to_f16(*x));
}

/// Rows of at most 32 tokens to a group of bf16 tiles, see [`acts`](crate::backend::cpu::acts).
pub(crate) fn pack_bf16(x: &[f32], n_in: usize, group: &mut [[Tile; 2]]) {
    const TOKENS: usize = BF16_TOKENS / 2;
    group.fill([Tile([[0; 64]; 16]); 2]);
    for (token, x) in x.chunks_exact(n_in).enumerate() {
        for (i, x) in x.iter().enumerate() {
            let tile = &mut group[i / BF16_LEN][token / TOKENS];
            let at = token % TOKENS * 4 + i % 2 * 2;
            tile.0[i % BF16_LEN / 2][at..at + 2]
                .copy_from_slice(&half::bf16::from_f32(*x).to_le_bytes());
        }
    }
}
