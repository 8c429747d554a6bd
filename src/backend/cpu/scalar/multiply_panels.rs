//! Products of queries with turned rows, in their definition's order.

use crate::backend::cpu::table::{PANEL_ROWS, PanelProducts};

/// See [`PanelProducts`].
pub(crate) fn multiply(products: &mut PanelProducts) {
    let n = products.n_in;
    let panels = products.panels.as_chunks::<PANEL_ROWS>().0;
    let n_out = panels.len() / n * PANEL_ROWS;
    let rows = products.out.chunks_exact_mut(n_out);
    for (query, out) in products.queries.chunks_exact(n).zip(rows) {
        let out = out.as_chunks_mut::<PANEL_ROWS>().0;
        for (panel, sums) in panels.chunks_exact(n).zip(out) {
            *sums = [0.0; PANEL_ROWS];
            for (q, rows) in query.iter().zip(panel) {
                sums.iter_mut().zip(rows).for_each(|(sum, x)| *sum += q * x);
            }
        }
    }
}
