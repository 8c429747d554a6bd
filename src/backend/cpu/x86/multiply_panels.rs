//! Products of queries with turned rows, over a level's vectors.

/// Defines the kernel of a level: a panel stays in the first-level cache while queries pass by, and no sum crosses lanes.
macro_rules! multiply_panels {
    ($features:literal) => {
        /// Vectors of a row of a panel.
        const WIDE: usize = PANEL_ROWS / v::LANES;

        /// Queries that share what is loaded of a panel.
        const QUERIES: usize = 8;

        /// See [`PanelProducts`].
        #[target_feature(enable = $features)]
        pub(crate) fn multiply(products: &mut PanelProducts) {
            let n = products.n_in;
            let panels = products.panels.as_chunks::<PANEL_ROWS>().0;
            let n_out = panels.len() / n * PANEL_ROWS;
            for (i, panel) in panels.chunks_exact(n).enumerate() {
                let queries = products.queries.chunks(QUERIES * n);
                let out = products.out.chunks_mut(QUERIES * n_out);
                for (queries, out) in queries.zip(out) {
                    let out = &mut out[i * PANEL_ROWS..];
                    match queries.len() == QUERIES * n {
                        true => some::<QUERIES>(queries, panel, out, n_out),
                        false => {
                            let rows = out.chunks_mut(n_out);
                            for (query, out) in queries.chunks_exact(n).zip(rows) {
                                some::<1>(query, panel, out, n_out);
                            }
                        }
                    }
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn some<const Q: usize>(
            queries: &[f32],
            panel: &[[f32; PANEL_ROWS]],
            out: &mut [f32],
            n_out: usize,
        ) {
            let queries: [&[f32]; Q] =
                std::array::from_fn(|i| &queries[i * panel.len()..][..panel.len()]);
            let mut sums = [[v::splat(0.0); WIDE]; Q];
            for (c, rows) in panel.iter().enumerate() {
                let rows = rows.as_chunks::<{ v::LANES }>().0;
                for i in 0..Q {
                    let q = v::splat(queries[i][c]);
                    for w in 0..WIDE {
                        sums[i][w] = v::fma(q, v::load(&rows[w]), sums[i][w]);
                    }
                }
            }
            for i in 0..Q {
                let out = out[i * n_out..].as_chunks_mut::<{ v::LANES }>().0;
                for w in 0..WIDE {
                    v::store(sums[i][w], &mut out[w]);
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use multiply_panels;
