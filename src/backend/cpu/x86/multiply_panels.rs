//! Products of queries with turned rows, over a level's vectors.

/// Defines the kernel of a level: a panel stays in the first-level cache while queries pass by, and no sum crosses lanes.
macro_rules! multiply_panels {
    ($features:literal) => {
        /// Vectors of a row of a panel.
        const WIDE: usize = PANEL_ROWS / v::LANES;

        /// Queries that share what is loaded of a panel: more sums than the units are deep, and no more than registers.
        const QUERIES: usize = if WIDE == 1 { 12 } else { 6 };

        /// Of those that are left.
        const FEW: usize = QUERIES / 3;

        /// Channels that are added without looking whether there are more.
        const DEEP: usize = 16;

        /// See [`PanelProducts`].
        #[target_feature(enable = $features)]
        pub(crate) fn multiply(products: &mut PanelProducts) {
            let n = products.n_in;
            let panels = products.panels.as_chunks::<PANEL_ROWS>().0;
            let n_out = panels.len() / n * PANEL_ROWS;
            let n_queries = products.queries.len() / n;
            for (i, panel) in panels.chunks_exact(n).enumerate() {
                let mut at = 0;
                while at < n_queries {
                    let queries = &products.queries[at * n..];
                    let out = &mut products.out[at * n_out + i * PANEL_ROWS..];
                    at += match n_queries - at {
                        QUERIES.. => some::<QUERIES>(queries, panel, out, n_out),
                        FEW.. => some::<FEW>(queries, panel, out, n_out),
                        _ => some::<1>(queries, panel, out, n_out),
                    };
                }
            }
        }

        /// The first `Q` of `queries`.
        #[inline]
        #[target_feature(enable = $features)]
        fn some<const Q: usize>(
            queries: &[f32],
            panel: &[[f32; PANEL_ROWS]],
            out: &mut [f32],
            n_out: usize,
        ) -> usize {
            let n = panel.len();
            let mut sums = [[v::splat(0.0); WIDE]; Q];
            let (deep, rest) = panel.as_chunks::<DEEP>();
            for (at, rows) in deep.iter().enumerate() {
                let queries: [&[f32; DEEP]; Q] = std::array::from_fn(|i| {
                    let query = queries[i * n + at * DEEP..].first_chunk();
                    query.expect("a query has as many channels as a panel")
                });
                add(queries, rows, &mut sums);
            }
            for (at, rows) in rest.iter().enumerate() {
                let channel = deep.len() * DEEP + at;
                let queries =
                    std::array::from_fn(|i| std::array::from_ref(&queries[i * n + channel]));
                add(queries, std::array::from_ref(rows), &mut sums);
            }
            for i in 0..Q {
                let out = out[i * n_out..].as_chunks_mut::<{ v::LANES }>().0;
                for w in 0..WIDE {
                    v::store(sums[i][w], &mut out[w]);
                }
            }
            Q
        }

        /// Adds the products of `D` channels.
        #[inline]
        #[target_feature(enable = $features)]
        fn add<const Q: usize, const D: usize>(
            queries: [&[f32; D]; Q],
            rows: &[[f32; PANEL_ROWS]; D],
            sums: &mut [[v::V; WIDE]; Q],
        ) {
            for c in 0..D {
                let rows = rows[c].as_chunks::<{ v::LANES }>().0;
                for i in 0..Q {
                    let q = v::splat(queries[i][c]);
                    for w in 0..WIDE {
                        sums[i][w] = v::fma(q, v::load(&rows[w]), sums[i][w]);
                    }
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use multiply_panels;
