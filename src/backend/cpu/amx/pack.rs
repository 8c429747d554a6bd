//! Activations to tiles of pairs of bf16: see `acts.rs`.

use std::arch::x86_64::*;

use super::{load, store, to_bf16, transpose};
use crate::backend::cpu::acts::{BF16_LEN, BF16_TOKENS, Tile};

/// `x`: (n_tokens, n_in), at most 32 tokens; the others become zeros.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn pack(x: &[f32], n_in: usize, group: &mut [[Tile; 2]]) {
    assert_eq!(group.len() * BF16_LEN, n_in);
    let n_tokens = x.len() / n_in;
    for (k, tiles) in group.iter_mut().enumerate() {
        for (half, tile) in tiles.iter_mut().enumerate() {
            let mut rows = [_mm512_setzero_si512(); BF16_TOKENS / 2];
            let first = half * rows.len();
            for i in 0..rows.len().min(n_tokens.saturating_sub(first)) {
                let x = &x[(first + i) * n_in + k * BF16_LEN..][..BF16_LEN];
                let (low, high) = x.split_first_chunk::<16>().expect("32 floats");
                let high: &[f32; 16] = high.first_chunk().expect("16 floats");
                rows[i] = to_bf16(
                    _mm512_castsi512_ps(load(low)),
                    _mm512_castsi512_ps(load(high)),
                );
            }
            let pairs = transpose(rows);
            for i in 0..pairs.len() {
                store(pairs[i], &mut tile.0[i]);
            }
        }
    }
}
