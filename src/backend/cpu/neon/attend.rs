//! Attention over one span of keys with running softmax sums: sixteen keys share a maximum, four a pass over `out`.

use std::arch::aarch64::*;

use super::elementwise::exp;
use super::{halves, load_f32, load_u16, padded, store_f32};
use crate::backend::cpu::table::AttendSpan;

/// Keys that share a maximum.
const KEYS: usize = 16;

macro_rules! attend {
    ($name:ident, $cached:ty, $load:ident) => {
        /// See [`AttendSpan`].
        #[target_feature(enable = "neon")]
        pub(crate) fn $name(span: &mut AttendSpan) {
            /// The products of `q` with the `K` keys.
            #[inline]
            #[target_feature(enable = "neon")]
            fn scores<const K: usize>(q: &[f32], keys: &[$cached]) -> [f32; K] {
                let n = q.len();
                let (q, q_rest) = q.as_chunks::<8>();
                let rows: [(&[[$cached; 8]], &[$cached]); K] = std::array::from_fn(|i| {
                    let (chunks, rest) = keys[i * n..][..n].as_chunks();
                    (&chunks[..q.len()], rest)
                });
                let mut sums = [[vdupq_n_f32(0.0); 2]; K];
                let mut add = |i: usize, q: &[float32x4_t; 2], k: &[$cached; 8]| {
                    let k = $load(k);
                    sums[i][0] = vfmaq_f32(sums[i][0], q[0], k[0]);
                    sums[i][1] = vfmaq_f32(sums[i][1], q[1], k[1]);
                };
                for c in 0..q.len() {
                    let q = load_f32x8(&q[c]);
                    for i in 0..K {
                        add(i, &q, &rows[i].0[c]);
                    }
                }
                if !q_rest.is_empty() {
                    let q = load_f32x8(&padded(q_rest));
                    for i in 0..K {
                        add(i, &q, &padded(rows[i].1));
                    }
                }
                sums.map(|[a, b]| vaddvq_f32(vaddq_f32(a, b)))
            }

            /// Adds the `K` values, weighted, to `out`.
            #[inline]
            #[target_feature(enable = "neon")]
            fn add_values<const K: usize>(weights: &[f32; K], values: &[$cached], out: &mut [f32]) {
                let n = out.len();
                let (out, out_rest) = out.as_chunks_mut::<8>();
                let rows: [(&[[$cached; 8]], &[$cached]); K] = std::array::from_fn(|i| {
                    let (chunks, rest) = values[i * n..][..n].as_chunks();
                    (&chunks[..out.len()], rest)
                });
                let add = |out: &mut [f32; 8], values: [[float32x4_t; 2]; K]| {
                    let mut sums = load_f32x8(out);
                    for (v, weight) in values.into_iter().zip(weights) {
                        sums[0] = vfmaq_n_f32(sums[0], v[0], *weight);
                        sums[1] = vfmaq_n_f32(sums[1], v[1], *weight);
                    }
                    store_f32x8(out, sums);
                };
                for c in 0..out.len() {
                    add(&mut out[c], std::array::from_fn(|i| $load(&rows[i].0[c])));
                }
                if !out_rest.is_empty() {
                    let mut last = padded(out_rest);
                    add(&mut last, rows.map(|row| $load(&padded(row.1))));
                    out_rest.copy_from_slice(&last[..out_rest.len()]);
                }
            }

            let n = span.head_dim;
            let k: &[$cached] = bytemuck::cast_slice(span.k);
            let v: &[$cached] = bytemuck::cast_slice(span.v);
            for (i, q) in span.q.chunks_exact(n).enumerate() {
                let out = &mut span.out[i * n..][..n];
                let (mut max, mut sum) = (span.max[i], span.sum[i]);
                let (first, end) = span.visible[i];
                let keys = k[first * n..end.max(first) * n].chunks(KEYS * n);
                let values = v[first * n..end.max(first) * n].chunks(KEYS * n);
                for (keys, values) in keys.zip(values) {
                    // Keys that are not there weigh nothing.
                    let mut weights = [f32::NEG_INFINITY; KEYS];
                    let (fours, rest) = weights[..keys.len() / n].as_chunks_mut::<4>();
                    let (keys, keys_rest) = keys.split_at(fours.len() * 4 * n);
                    for (to, keys) in fours.iter_mut().zip(keys.chunks_exact(4 * n)) {
                        *to = scores(q, keys);
                    }
                    for (to, key) in rest.iter_mut().zip(keys_rest.chunks_exact(n)) {
                        [*to] = scores(q, key);
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
                    let [to_a, to_b, to_c, to_d]: &mut [[f32; 4]; 4] =
                        bytemuck::cast_mut(&mut weights);
                    store_f32(to_a, a);
                    store_f32(to_b, b);
                    store_f32(to_c, c);
                    store_f32(to_d, d);

                    let (fours, rest) = weights[..values.len() / n].as_chunks::<4>();
                    let (values, values_rest) = values.split_at(fours.len() * 4 * n);
                    for (weights, values) in fours.iter().zip(values.chunks_exact(4 * n)) {
                        add_values(weights, values, out);
                    }
                    for (weight, value) in rest.iter().zip(values_rest.chunks_exact(n)) {
                        add_values(&[*weight], value, out);
                    }
                }
                (span.max[i], span.sum[i]) = (max, sum);
            }
        }
    };
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

#[inline]
#[target_feature(enable = "neon")]
fn load_f16x8(x: &[u16; 8]) -> [float32x4_t; 2] {
    let x = load_u16(x);
    [halves(vget_low_u16(x)), halves(vget_high_u16(x))]
}

attend!(f16, u16, load_f16x8);
attend!(f32, f32, load_f32x8);
