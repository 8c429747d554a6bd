//! F16, BF16 and F32 by float activations, 64 weights at a time.

use std::arch::x86_64::*;

use bytemuck::Pod;

use super::{load256, loadf, prefetch};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::quant::{Block, BlockBF16, BlockF16, BlockF32, blocks};

macro_rules! gemv {
    ($name:ident, $block:ty, $widen:expr) => {
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
        pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
            #[inline]
            #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
            fn products<const R: usize>(w: &[$block], x: &[f32]) -> [f32; R] {
                let n = x.len();
                assert_eq!(w.len(), R * n);
                let (x, x_rest) = x.as_chunks::<16>();
                let n_units = x.len();
                let rows: [(&[[$block; 16]], &[$block]); R] = std::array::from_fn(|r| {
                    let (units, rest) = w[r * n..][..n].as_chunks();
                    (&units[..n_units], &rest[..x_rest.len()])
                });
                let ahead = (R * n * size_of::<$block>()).max(super::AHEAD);
                // Two sums a row: the chain of one would wait for itself.
                let mut sums = [[_mm512_setzero_ps(); 2]; R];
                for i in 0..n_units {
                    let x = loadf(&x[i]);
                    for r in 0..R {
                        let w = &rows[r].0[i];
                        prefetch(w, ahead);
                        sums[r][i % 2] = _mm512_fmadd_ps($widen(w), x, sums[r][i % 2]);
                    }
                }
                std::array::from_fn(|r| {
                    let mut rest = 0.0;
                    for (w, x) in rows[r].1.iter().zip(x_rest) {
                        let mut weight = [0.0];
                        w.dequantize(&mut weight);
                        rest += weight[0] * x;
                    }
                    _mm512_reduce_add_ps(_mm512_add_ps(sums[r][0], sums[r][1])) + rest
                })
            }
            let w = blocks::<$block>(w);
            for t in 0..x.n_tokens {
                let (fours, rest) = y.row(t).as_chunks_mut::<4>();
                for (y, w) in fours.iter_mut().zip(w.chunks_exact(4 * x.n_in)) {
                    *y = products::<4>(w, x.row(t));
                }
                let done = fours.len() * 4 * x.n_in;
                for (y, w) in rest.iter_mut().zip(w[done..].chunks_exact(x.n_in)) {
                    [*y] = products::<1>(w, x.row(t));
                }
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn widen_f16<T: Pod>(w: &T) -> __m512 {
    _mm512_cvtph_ps(load256(w))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn widen_bf16<T: Pod>(w: &T) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(load256(w))))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn widen_f32(w: &[BlockF32; 16]) -> __m512 {
    loadf(bytemuck::cast_ref::<_, [f32; 16]>(w))
}

gemv!(f16, BlockF16, widen_f16);
gemv!(bf16, BlockBF16, widen_bf16);
gemv!(f32, BlockF32, widen_f32);
