//! `y[t, r] = sum_k w[r, k] x[t, k]` for every format: weights are dequantized block by block.

use crate::backend::cpu::acts::{Acts, Q8_LEN, Q8Row};
use crate::backend::cpu::pool::OutCols;
use crate::quant::{Block, QK_K, blocks};

/// Activations in floats.
pub(crate) fn f32<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols) {
    for t in 0..x.n_tokens {
        let x = x.row(t);
        let rows = blocks::<B>(w).chunks_exact(x.len() / B::LEN);
        for (y, row) in y.row(t).iter_mut().zip(rows) {
            let mut weights = [0.0; QK_K];
            *y = 0.0;
            for (block, x) in row.iter().zip(x.chunks_exact(B::LEN)) {
                block.dequantize(&mut weights[..B::LEN]);
                *y += weights.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
            }
        }
    }
}

/// Activations in 8 bits.
pub(crate) fn q8<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols) {
    for t in 0..x.n_tokens {
        let Q8Row { q, d, .. } = x.q8_row(t);
        let rows = blocks::<B>(w).chunks_exact(x.n_in / B::LEN);
        for (y, row) in y.row(t).iter_mut().zip(rows) {
            let mut weights = [0.0; QK_K];
            *y = 0.0;
            let x = q.chunks_exact(B::LEN).zip(d.chunks_exact(B::LEN / Q8_LEN));
            for (block, (q, d)) in row.iter().zip(x) {
                block.dequantize(&mut weights[..B::LEN]);
                let groups = weights.chunks_exact(Q8_LEN).zip(q.chunks_exact(Q8_LEN));
                for ((w, q), d) in groups.zip(d) {
                    let products = w.iter().zip(q).map(|(w, q)| w * f32::from(*q));
                    *y += d * products.sum::<f32>();
                }
            }
        }
    }
}

/// The rows `picks` of the same for one token.
pub(crate) fn q8_picked<B: Block>(w: &[u8], picks: &[u32], x: &Acts, y: &mut [f32]) {
    let row_bytes = x.n_in / B::LEN * size_of::<B>();
    for (pick, y) in picks.iter().zip(y) {
        let row = &w[*pick as usize * row_bytes..][..row_bytes];
        q8::<B>(row, x, &mut OutCols::whole(std::slice::from_mut(y), 1));
    }
}
