//! `y[t, r] = sum_k w[r, k] x[t, k]` for every format: weights are dequantized block by block.

use crate::backend::cpu::acts::{Acts, Q8_LEN};
use crate::backend::cpu::pool::OutCols;
use crate::quant::{Block, QK_K, blocks};

/// Activations in floats.
pub(crate) fn f32<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols) {
    for t in 0..x.n_tokens {
        product::<B>(w, x.row(t), y.row(t));
    }
}

/// Activations in 8 bits.
pub(crate) fn q8<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols) {
    let mut row = vec![0.0; x.n_in];
    for t in 0..x.n_tokens {
        let x = x.q8_row(t);
        for ((row, q), d) in row
            .chunks_exact_mut(Q8_LEN)
            .zip(x.q.chunks_exact(Q8_LEN))
            .zip(x.d)
        {
            row.iter_mut()
                .zip(q)
                .for_each(|(x, q)| *x = d * f32::from(*q));
        }
        product::<B>(w, &row, y.row(t));
    }
}

fn product<B: Block>(w: &[u8], x: &[f32], y: &mut [f32]) {
    let rows = blocks::<B>(w).chunks_exact(x.len() / B::LEN);
    let mut weights = [0.0; QK_K];
    for (row, y) in rows.zip(y) {
        let mut sum = 0.0;
        for (block, x) in row.iter().zip(x.chunks_exact(B::LEN)) {
            block.dequantize(&mut weights[..B::LEN]);
            sum += weights[..B::LEN]
                .iter()
                .zip(x)
                .map(|(w, x)| w * x)
                .sum::<f32>();
        }
        *y = sum;
    }
}
