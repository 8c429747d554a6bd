//! Attention over one span of keys with running softmax sums: sixteen keys share a maximum, four a pass over `out`.

use std::arch::aarch64::*;

use super::elementwise::exp;
use super::{halves, load_f32, load_u16, padded, splat_half, store_f32};
use crate::backend::cpu::table::{AttendSpan, Rows};
use crate::quant::{BlockQ4_0, BlockQ8_0};

/// Keys that share a maximum.
const KEYS: usize = 16;

/// Elements that are taken at a time.
const LEN: usize = 8;

/// Defines what is done with rows of one type: how many elements one `$element` holds, and how the `$at`th eight of a
/// row become floats, with zeros where it ends.
macro_rules! rows {
    ($($name:ident: $element:ty, $held:literal, |$row:ident, $at:ident| $load:expr;)*) => {$(
        mod $name {
            use super::*;

            #[inline]
            #[target_feature(enable = "neon")]
            fn load($row: &[$element], $at: usize) -> [float32x4_t; 2] {
                $load
            }

            fn row(rows: &[$element], i: usize, n: usize) -> &[$element] {
                &rows[i * (n / $held)..][..n / $held]
            }

            #[inline]
            #[target_feature(enable = "neon")]
            fn scores_of<const K: usize>(q: &[f32], keys: &[$element], first: usize) -> [f32; K] {
                let rows: [_; K] = std::array::from_fn(|i| row(keys, first + i, q.len()));
                let mut sums = [[vdupq_n_f32(0.0); 2]; K];
                for c in 0..q.len().div_ceil(LEN) {
                    let q = floats(q, c);
                    for i in 0..K {
                        let k = load(rows[i], c);
                        sums[i][0] = vfmaq_f32(sums[i][0], q[0], k[0]);
                        sums[i][1] = vfmaq_f32(sums[i][1], q[1], k[1]);
                    }
                }
                sums.map(|[a, b]| vaddvq_f32(vaddq_f32(a, b)))
            }

            #[inline]
            #[target_feature(enable = "neon")]
            fn add<const K: usize>(
                weights: &[f32; K],
                values: &[$element],
                first: usize,
                out: &mut [f32],
            ) {
                let rows: [_; K] = std::array::from_fn(|i| row(values, first + i, out.len()));
                for c in 0..out.len().div_ceil(LEN) {
                    let mut sums = floats(out, c);
                    for i in 0..K {
                        let v = load(rows[i], c);
                        sums[0] = vfmaq_n_f32(sums[0], v[0], weights[i]);
                        sums[1] = vfmaq_n_f32(sums[1], v[1], weights[i]);
                    }
                    let mut last = [0.0; LEN];
                    let out = &mut out[c * LEN..];
                    match out.first_chunk_mut() {
                        Some(out) => store_f32x8(out, sums),
                        None => {
                            store_f32x8(&mut last, sums);
                            out.copy_from_slice(&last[..out.len()]);
                        }
                    }
                }
            }

            /// The products of `q` with keys from `first`.
            #[inline]
            #[target_feature(enable = "neon")]
            pub(super) fn scores(q: &[f32], keys: &[$element], first: usize, out: &mut [f32]) {
                let (fours, rest) = out.as_chunks_mut::<4>();
                let n = 4 * fours.len();
                for (i, out) in fours.iter_mut().enumerate() {
                    *out = scores_of(q, keys, first + 4 * i);
                }
                for (i, out) in rest.iter_mut().enumerate() {
                    [*out] = scores_of(q, keys, first + n + i);
                }
            }

            /// Adds values from `first`, weighted, to `out`.
            #[inline]
            #[target_feature(enable = "neon")]
            pub(super) fn add_values(
                weights: &[f32],
                values: &[$element],
                first: usize,
                out: &mut [f32],
            ) {
                let (fours, rest) = weights.as_chunks::<4>();
                let n = 4 * fours.len();
                for (i, weights) in fours.iter().enumerate() {
                    add(weights, values, first + 4 * i, out);
                }
                for (i, weight) in rest.iter().enumerate() {
                    add(&[*weight], values, first + n + i, out);
                }
            }
        }
    )*};
}

rows! {
    f32_rows: f32, 1, |row, at| floats(row, at);
    f16_rows: u16, 1, |row, at| {
        let row = &row[at * LEN..];
        let x = match row.first_chunk() {
            Some(x) => load_u16(x),
            None => load_u16(&padded(row)),
        };
        [halves(vget_low_u16(x)), halves(vget_high_u16(x))]
    };
    q8_0_rows: BlockQ8_0, 32, |row, at| {
        let block = &row[at / 4];
        let q = bytemuck::cast_ref::<_, [[u8; LEN]; 4]>(&block.qs)[at % 4];
        scaled(vcreate_s8(u64::from_le_bytes(q)), block.d)
    };
    q4_0_rows: BlockQ4_0, 32, |row, at| {
        let block = &row[at / 4];
        let q = bytemuck::cast_ref::<_, [[u8; LEN]; 2]>(&block.qs)[at % 2];
        // Low nibbles are the first two eights.
        let q = u64::from_le_bytes(q) >> (4 * (at / 2 % 2)) & 0x0f0f_0f0f_0f0f_0f0f;
        scaled(vsub_s8(vcreate_s8(q), vdup_n_s8(8)), block.d)
    };
}

/// Eight floats of `x`, zeros where it ends.
#[inline]
#[target_feature(enable = "neon")]
fn floats(x: &[f32], at: usize) -> [float32x4_t; 2] {
    let x = &x[at * LEN..];
    match x.first_chunk() {
        Some(x) => load_f32x8(x),
        None => load_f32x8(&padded(x)),
    }
}

/// Eight codes times the half float `d`.
#[inline]
#[target_feature(enable = "neon")]
fn scaled(q: int8x8_t, d: u16) -> [float32x4_t; 2] {
    let (q, d) = (vmovl_s8(q), splat_half(d));
    let low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(q)));
    [
        vmulq_f32(low, d),
        vmulq_f32(vcvtq_f32_s32(vmovl_high_s16(q)), d),
    ]
}

/// See [`AttendSpan`].
#[target_feature(enable = "neon")]
pub(crate) fn attend(span: &mut AttendSpan) {
    let n = span.head_dim;
    for (i, q) in span.q.chunks_exact(n).enumerate() {
        let out = &mut span.out[i * n..][..n];
        let (mut max, mut sum) = (span.max[i], span.sum[i]);
        let (start, end) = span.visible[i];
        for first in (start..end).step_by(KEYS) {
            let n_keys = KEYS.min(end - first);
            // Keys that are not there weigh nothing.
            let mut weights = [f32::NEG_INFINITY; KEYS];
            let scores = &mut weights[..n_keys];
            match span.k {
                Rows::F32(k) => f32_rows::scores(q, k, first, scores),
                Rows::F16(k) => f16_rows::scores(q, k, first, scores),
                Rows::Q8_0(k) => q8_0_rows::scores(q, k, first, scores),
                Rows::Q4_0(k) => q4_0_rows::scores(q, k, first, scores),
            }

            let [a, b, c, d] = bytemuck::cast_ref::<_, [[f32; 4]; 4]>(&weights)
                .each_ref()
                .map(|s| load_f32(s));
            let highest = vmaxq_f32(vmaxq_f32(a, b), vmaxq_f32(c, d));
            let highest = vmaxvq_f32(highest);
            if highest > max {
                let shrink = vgetq_lane_f32::<0>(exp(vdupq_n_f32(max - highest)));
                sum *= shrink;
                out.iter_mut().for_each(|o| *o *= shrink);
                max = highest;
            }
            let [a, b, c, d] = [a, b, c, d].map(|s| exp(vsubq_f32(s, vdupq_n_f32(max))));
            sum += vaddvq_f32(vaddq_f32(vaddq_f32(a, b), vaddq_f32(c, d)));
            let [to_a, to_b, to_c, to_d]: &mut [[f32; 4]; 4] = bytemuck::cast_mut(&mut weights);
            store_f32(to_a, a);
            store_f32(to_b, b);
            store_f32(to_c, c);
            store_f32(to_d, d);

            let weights = &weights[..n_keys];
            match span.v {
                Rows::F32(v) => f32_rows::add_values(weights, v, first, out),
                Rows::F16(v) => f16_rows::add_values(weights, v, first, out),
                Rows::Q8_0(v) => q8_0_rows::add_values(weights, v, first, out),
                Rows::Q4_0(v) => q4_0_rows::add_values(weights, v, first, out),
            }
        }
        (span.max[i], span.sum[i]) = (max, sum);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32x8(x: &[f32; 8]) -> [float32x4_t; 2] {
    let [a, b] = bytemuck::cast_ref::<_, [[f32; 4]; 2]>(x);
    [load_f32(a), load_f32(b)]
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f32x8(y: &mut [f32; 8], x: [float32x4_t; 2]) {
    let [a, b]: &mut [[f32; 4]; 2] = bytemuck::cast_mut(y);
    store_f32(a, x[0]);
    store_f32(b, x[1]);
}
