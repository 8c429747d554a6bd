//! F16, BF16 and F32 by float activations, eight weights at a time.

use std::arch::aarch64::*;

use super::{halves, load_f32, load_u16, padded};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::{Block, BlockBF16, BlockF16, BlockF32, blocks};

macro_rules! gemv {
    ($name:ident, $block:ty, $widen:ident) => {
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = "neon")]
        pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
            #[inline]
            #[target_feature(enable = "neon")]
            fn products<const R: usize>(w: &[$block], x: &[f32]) -> [f32; R] {
                let n = x.len();
                let (x, x_rest) = x.as_chunks::<8>();
                let rows: [(&[[$block; 8]], &[$block]); R] = std::array::from_fn(|r| {
                    let (units, rest) = w[r * n..][..n].as_chunks();
                    (&units[..x.len()], rest)
                });
                // Two sums a row: the chain of one would wait for itself.
                let mut sums = [[vdupq_n_f32(0.0); 2]; R];
                let mut add = |r: usize, w: &[$block; 8], x: &[float32x4_t; 2]| {
                    let w = $widen(w);
                    sums[r][0] = vfmaq_f32(sums[r][0], w[0], x[0]);
                    sums[r][1] = vfmaq_f32(sums[r][1], w[1], x[1]);
                };
                for i in 0..x.len() {
                    let x = pair(&x[i]);
                    for r in 0..R {
                        add(r, &rows[r].0[i], &x);
                    }
                }
                if !x_rest.is_empty() {
                    let x = pair(&padded(x_rest));
                    for r in 0..R {
                        add(r, &padded(rows[r].1), &x);
                    }
                }
                sums.map(|[a, b]| vaddvq_f32(vaddq_f32(a, b)))
            }

            let w = blocks::<$block>(w);
            let n = x.n_in / <$block>::LEN;
            for t in 0..x.n_tokens {
                let x = x.row(t);
                let (fours, rest) = y.row(t).as_chunks_mut::<4>();
                let (w, w_rest) = w.split_at(4 * n * fours.len());
                for (y, w) in fours.iter_mut().zip(w.chunks_exact(4 * n)) {
                    *y = products::<4>(w, x);
                }
                for (y, w) in rest.iter_mut().zip(w_rest.chunks_exact(n)) {
                    [*y] = products::<1>(w, x);
                }
            }
        }
    };
}

/// Eight floats.
#[inline]
#[target_feature(enable = "neon")]
fn pair(x: &[f32; 8]) -> [float32x4_t; 2] {
    let [a, b] = bytemuck::cast_ref::<_, [[f32; 4]; 2]>(x);
    [load_f32(a), load_f32(b)]
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_f32(w: &[BlockF32; 8]) -> [float32x4_t; 2] {
    pair(bytemuck::cast_ref(w))
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_f16(w: &[BlockF16; 8]) -> [float32x4_t; 2] {
    let w = load_u16(bytemuck::cast_ref(w));
    [halves(vget_low_u16(w)), halves(vget_high_u16(w))]
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_bf16(w: &[BlockBF16; 8]) -> [float32x4_t; 2] {
    let w = load_u16(bytemuck::cast_ref(w));
    [
        vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(w))),
        vreinterpretq_f32_u32(vshll_high_n_u16::<16>(w)),
    ]
}

gemv!(f32, BlockF32, widen_f32);
gemv!(f16, BlockF16, widen_f16);
gemv!(bf16, BlockBF16, widen_bf16);
