//! `y[t, r] = sum_k w[r, k] x[t, k]` over panels: their blocks are taken out row by row.

use super::gemv;
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::panels::{Panel, ROWS};
use crate::backend::cpu::pool::OutCols;

/// Activations in 8 bits.
pub(crate) fn q8<B: Panel>(w: &[u8], x: &Acts, y: &mut OutCols) {
    let panels: &[B::Packed] = bytemuck::cast_slice(w);
    for (i, panel) in panels.chunks_exact(x.n_in / B::LEN).enumerate() {
        for row in 0..ROWS {
            let blocks: Vec<B> = panel.iter().map(|packed| B::unpack(packed, row)).collect();
            let mut out = vec![0.0; x.n_tokens];
            gemv::q8::<B>(
                bytemuck::cast_slice(&blocks),
                x,
                &mut OutCols::whole(&mut out, 1),
            );
            for (t, out) in out.into_iter().enumerate() {
                y.row(t)[i * ROWS + row] = out;
            }
        }
    }
}
