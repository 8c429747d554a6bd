//! Attention over a level's vectors.

/// Defines the attention kernel of a level.
///
/// Keys are taken in tiles, widened to floats once for all queries. The scores of a query with [`LANES`](v::LANES) keys
/// are that many sums along the head, folded into one vector; sums and weighted values are rescaled once a tile.
/// A head that is no whole number of vectors goes to the level below.
///
/// Loops count and closures are few: an iterator's or a closure's call that is not inlined passes vectors through
/// memory.
macro_rules! attend {
    ($features:literal, $below:ident) => {
        /// Keys in a tile.
        const KEYS: usize = 32;

        /// Queries that are too few to pay for widened tiles.
        const FEW: usize = 16;

        /// Queries whose weighted values are summed together.
        const QUERIES: usize = 4;

        /// A tile of keys or values: heads of at most `C` vectors, zeros behind them.
        pub(super) type Tile<const C: usize> = [[[f32; v::LANES]; C]; KEYS];

        /// See [`AttendSpan`].
        #[target_feature(enable = $features)]
        pub(crate) fn attend(span: &mut AttendSpan) {
            match span.head_dim {
                64 if few(span) => few::attend::<{ 64 / few::LEN }>(span),
                128 if few(span) => few::attend::<{ 128 / few::LEN }>(span),
                256 if few(span) => few::attend::<{ 256 / few::LEN }>(span),
                n if !n.is_multiple_of(v::LANES) => $below::attend(span),
                ..=64 => in_tiles::<{ 64 / v::LANES }>(span),
                65..=128 => in_tiles::<{ 128 / v::LANES }>(span),
                129..=256 => in_tiles::<{ 256 / v::LANES }>(span),
                _ => $below::attend(span),
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn in_tiles<const C: usize>(span: &mut AttendSpan) {
            let n = span.head_dim;
            let n_queries = span.visible.len();
            assert!(n <= C * v::LANES && n.is_multiple_of(v::LANES));
            assert!(span.q.len() == n_queries * n && span.out.len() == n_queries * n);
            assert!(span.max.len() == n_queries && span.sum.len() == n_queries);
            let seen = union(span.visible);
            let mut key_tile: Tile<C> = [[[0.0; v::LANES]; C]; KEYS];
            let mut value_tile: Tile<C> = key_tile;
            let mut weights = [[0.0f32; KEYS]; QUERIES];
            // From a multiple: which keys share a tile must not depend on what other queries see.
            let mut start = seen.start / KEYS * KEYS;
            while start < seen.end {
                let end = seen.end.min(start + KEYS);
                widen(span.k, n, start..end, &mut key_tile);
                widen(span.v, n, start..end, &mut value_tile);
                let mut first = 0;
                while first < n_queries {
                    let queries = first..(first + QUERIES).min(n_queries);
                    let mut visible = [(0, 0); QUERIES];
                    for (visible, sees) in visible.iter_mut().zip(&span.visible[queries.clone()]) {
                        visible.0 = sees.0.clamp(start, end) - start;
                        visible.1 = sees.1.clamp(start, end) - start;
                    }
                    let seen = union(&visible);
                    if !seen.is_empty() {
                        for i in queries.clone() {
                            let weights = &mut weights[i - first];
                            scores(&span.q[i * n..][..n], &key_tile, end - start, weights);
                            let (max, sum) = (&mut span.max[i], &mut span.sum[i]);
                            let shrink = softmax(weights, visible[i - first], max, sum);
                            if shrink != 1.0 {
                                let out = &mut span.out[i * n..][..n];
                                for out in out.as_chunks_mut::<{ v::LANES }>().0 {
                                    v::store(v::mul(v::load(out), v::splat(shrink)), out);
                                }
                            }
                        }
                        let out = &mut span.out[queries.start * n..queries.end * n];
                        match &weights[..queries.len()] {
                            [a, b, c, d] => add_values([a, b, c, d], seen, &value_tile, n, out),
                            [a, b, c] => add_values([a, b, c], seen, &value_tile, n, out),
                            [a, b] => add_values([a, b], seen, &value_tile, n, out),
                            [a] => add_values([a], seen, &value_tile, n, out),
                            _ => unreachable!("one to four queries"),
                        }
                    }
                    first = queries.end;
                }
                start = end;
            }
        }

        /// Whether there are few queries and all see the same keys, those of one token.
        fn few(span: &AttendSpan) -> bool {
            span.decode
                && (1..=FEW).contains(&span.visible.len())
                && span.visible.iter().all(|keys| *keys == span.visible[0])
        }

        /// The keys that any of some queries sees.
        fn union(visible: &[(usize, usize)]) -> Range<usize> {
            let (mut start, mut last) = (usize::MAX, 0);
            for &(first, end) in visible {
                if first < end {
                    start = start.min(first);
                    last = last.max(end);
                }
            }
            start.min(last)..last
        }

        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn widen<const C: usize>(
            rows: Rows,
            n: usize,
            keys: Range<usize>,
            tile: &mut Tile<C>,
        ) {
            const IN_BLOCK: usize = 32 / v::LANES;
            let elements = keys.start * n..keys.end * n;
            let blocks = keys.start * (n / 32)..keys.end * (n / 32);
            match rows {
                Rows::F32(rows) => {
                    for (row, wide) in rows[elements].chunks_exact(n).zip(tile) {
                        for (x, wide) in row.as_chunks::<{ v::LANES }>().0.iter().zip(wide) {
                            *wide = *x;
                        }
                    }
                }
                Rows::F16(rows) => {
                    for (row, wide) in rows[elements].chunks_exact(n).zip(tile) {
                        for (x, wide) in row.as_chunks::<{ v::LANES }>().0.iter().zip(wide) {
                            v::store(v::load_f16(x), wide);
                        }
                    }
                }
                Rows::Q8_0(rows) => {
                    for (row, wide) in rows[blocks].chunks_exact(n / 32).zip(tile) {
                        for (block, wide) in row.iter().zip(wide.as_chunks_mut::<IN_BLOCK>().0) {
                            for i in 0..IN_BLOCK {
                                v::store(v::load_q8_0(block, i), &mut wide[i]);
                            }
                        }
                    }
                }
                Rows::Q4_0(rows) => {
                    for (row, wide) in rows[blocks].chunks_exact(n / 32).zip(tile) {
                        for (block, wide) in row.iter().zip(wide.as_chunks_mut::<IN_BLOCK>().0) {
                            for i in 0..IN_BLOCK {
                                v::store(v::load_q4_0(block, i), &mut wide[i]);
                            }
                        }
                    }
                }
            }
        }

        /// The products of `q` with the first `n_keys` rows of the tile; what follows is unspecified.
        #[inline]
        #[target_feature(enable = $features)]
        fn scores<const C: usize>(q: &[f32], tile: &Tile<C>, n_keys: usize, out: &mut [f32; KEYS]) {
            let q = q.as_chunks::<{ v::LANES }>().0;
            assert!(q.len() <= C);
            let groups = tile.as_chunks::<{ v::LANES }>().0;
            let outs = out.as_chunks_mut::<{ v::LANES }>().0;
            for g in 0..n_keys.div_ceil(v::LANES).min(groups.len()) {
                let keys = &groups[g];
                let mut sums = [v::splat(0.0); v::LANES];
                for i in 0..q.len() {
                    let q = v::load(&q[i]);
                    for j in 0..v::LANES {
                        sums[j] = v::fma(q, v::load(&keys[j][i]), sums[j]);
                    }
                }
                v::store(v::fold(sums), &mut outs[g]);
            }
        }

        /// Scores to weights, 0 where not visible. Returns the factor that what was summed before must take.
        #[inline]
        #[target_feature(enable = $features)]
        fn softmax(
            scores: &mut [f32; KEYS],
            (first, end): (usize, usize),
            max: &mut f32,
            sum: &mut f32,
        ) -> f32 {
            let groups = scores.as_chunks_mut::<{ v::LANES }>().0;
            let mut top = v::splat(f32::NEG_INFINITY);
            for i in 0..KEYS / v::LANES {
                let at = i * v::LANES;
                let inside = |p: usize| p.clamp(at, at + v::LANES) - at;
                let visible = v::only(v::load(&groups[i]), inside(first), inside(end));
                top = v::max(top, visible);
                v::store(visible, &mut groups[i]);
            }
            let new_max = max.max(v::max_of(top));
            if new_max == f32::NEG_INFINITY {
                scores.fill(0.0);
                return 1.0;
            }
            let mut total = v::splat(0.0);
            for i in 0..KEYS / v::LANES {
                let weights = v::exp(v::sub(v::load(&groups[i]), v::splat(new_max)));
                total = v::add(total, weights);
                v::store(weights, &mut groups[i]);
            }
            let shrink = v::first(v::exp(v::splat(*max - new_max)));
            *sum = *sum * shrink + v::sum(total);
            *max = new_max;
            shrink
        }

        /// Adds the rows `keys` of the tile times the weights of each query to its `n` sums.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_values<const C: usize, const Q: usize>(
            weights: [&[f32; KEYS]; Q],
            keys: Range<usize>,
            tile: &Tile<C>,
            n: usize,
            out: &mut [f32],
        ) {
            const W: usize = v::WIDTH;
            for at in 0..(n / v::LANES).div_ceil(W) {
                let mut sums = [[v::splat(0.0); W]; Q];
                for key in keys.start..keys.end.min(KEYS) {
                    let row = &tile[key].as_chunks::<W>().0[at];
                    let mut values = [v::splat(0.0); W];
                    for w in 0..W {
                        values[w] = v::load(&row[w]);
                    }
                    for i in 0..Q {
                        let weight = v::splat(weights[i][key]);
                        for w in 0..W {
                            sums[i][w] = v::fma(weight, values[w], sums[i][w]);
                        }
                    }
                }
                for i in 0..Q {
                    let out = out[i * n..][..n].as_chunks_mut::<{ v::LANES }>().0;
                    for (w, out) in out.iter_mut().skip(at * W).take(W).enumerate() {
                        v::store(v::add(v::load(out), sums[i][w]), out);
                    }
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use attend;
