//! Attention over a level's vectors.

/// Defines the attention kernels of a level.
///
/// Keys are taken in tiles, widened to floats once for all queries. The scores of a query with [`LANES`](v::LANES) keys
/// are that many sums along the head, folded into one vector; sums and weighted values are rescaled once a tile.
/// A head that is no whole number of vectors goes to the level below.
macro_rules! attend {
    ($features:literal, $below:ident) => {
        /// Keys in a tile.
        const KEYS: usize = 32;

        /// Queries whose weighted values are summed together.
        const QUERIES: usize = 4;

        /// Over half floats, see [`AttendSpan`].
        #[target_feature(enable = $features)]
        pub(crate) fn f16(span: &mut AttendSpan) {
            let (k, v) = (bytemuck::cast_slice(span.k), bytemuck::cast_slice(span.v));
            let widen = |x: &[u16; v::LANES]| v::load_f16(x);
            match span.head_dim {
                n if !n.is_multiple_of(v::LANES) => $below::f16(span),
                ..=64 => attend::<u16, 64>(span, k, v, widen),
                65..=128 => attend::<u16, 128>(span, k, v, widen),
                129..=256 => attend::<u16, 256>(span, k, v, widen),
                _ => $below::f16(span),
            }
        }

        /// Over floats, see [`AttendSpan`].
        #[target_feature(enable = $features)]
        pub(crate) fn f32(span: &mut AttendSpan) {
            let (k, v) = (bytemuck::cast_slice(span.k), bytemuck::cast_slice(span.v));
            let widen = |x: &[f32; v::LANES]| v::load(x);
            match span.head_dim {
                n if !n.is_multiple_of(v::LANES) => $below::f32(span),
                ..=64 => attend::<f32, 64>(span, k, v, widen),
                65..=128 => attend::<f32, 128>(span, k, v, widen),
                129..=256 => attend::<f32, 256>(span, k, v, widen),
                _ => $below::f32(span),
            }
        }

        /// Heads of at most `N` elements.
        #[inline]
        #[target_feature(enable = $features)]
        fn attend<T: Copy, const N: usize>(
            span: &mut AttendSpan,
            keys: &[T],
            values: &[T],
            widen: impl Fn(&[T; v::LANES]) -> v::V + Copy,
        ) {
            let n = span.head_dim;
            let n_queries = span.visible.len();
            assert!(n <= N && n.is_multiple_of(v::LANES));
            assert!(span.q.len() == n_queries * n && span.out.len() == n_queries * n);
            assert!(span.max.len() == n_queries && span.sum.len() == n_queries);
            let seen = union(span.visible);
            let mut tile = [[0.0f32; N]; KEYS];
            let mut weights = [[0.0f32; KEYS]; QUERIES];
            for start in (seen.start..seen.end).step_by(KEYS) {
                let n_keys = KEYS.min(seen.end - start);
                let rows = start * n..(start + n_keys) * n;
                widen_rows(&keys[rows.clone()], n, &mut tile, widen);
                let values = &values[rows];
                // For few queries, widening on the way costs less than a second tile.
                let mut value_tile = None;
                if n_queries > QUERIES {
                    widen_rows(values, n, value_tile.insert([[0.0f32; N]; KEYS]), widen);
                }
                for first in (0..n_queries).step_by(QUERIES) {
                    let queries = first..(first + QUERIES).min(n_queries);
                    let in_tile = |p: usize| p.max(start).min(start + n_keys) - start;
                    let mut visible = [(0, 0); QUERIES];
                    for (visible, sees) in visible.iter_mut().zip(&span.visible[queries.clone()]) {
                        *visible = (in_tile(sees.0), in_tile(sees.1));
                    }
                    let seen = union(&visible);
                    if seen.is_empty() {
                        continue;
                    }
                    for ((i, weights), visible) in queries.clone().zip(&mut weights).zip(visible) {
                        scores(&span.q[i * n..][..n], &tile, n_keys, weights);
                        let (max, sum) = (&mut span.max[i], &mut span.sum[i]);
                        let shrink = softmax(weights, visible, max, sum);
                        if shrink != 1.0 {
                            let out = &mut span.out[i * n..][..n];
                            for out in out.as_chunks_mut::<{ v::LANES }>().0 {
                                v::store(v::mul(v::load(out), v::splat(shrink)), out);
                            }
                        }
                    }
                    let out = &mut span.out[queries.start * n..queries.end * n];
                    let weights = &weights[..queries.len()];
                    match &value_tile {
                        Some(tile) => {
                            let tile = tile.as_flattened();
                            add_values(weights, seen, tile, N, n, out, |x: &[f32; v::LANES]| {
                                v::load(x)
                            });
                        }
                        None => add_values(weights, seen, values, n, n, out, widen),
                    }
                }
            }
        }

        /// The keys that any of some queries sees.
        fn union(visible: &[(usize, usize)]) -> Range<usize> {
            let some = || visible.iter().filter(|(first, end)| first < end);
            let first = some().map(|(first, _)| *first).min().unwrap_or(0);
            first..some().map(|(_, end)| *end).max().unwrap_or(0)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn widen_rows<T, const N: usize>(
            rows: &[T],
            n: usize,
            tile: &mut [[f32; N]; KEYS],
            widen: impl Fn(&[T; v::LANES]) -> v::V,
        ) {
            for (row, wide) in rows.chunks_exact(n).zip(tile) {
                let wide = wide.as_chunks_mut::<{ v::LANES }>().0;
                for (x, wide) in row.as_chunks::<{ v::LANES }>().0.iter().zip(wide) {
                    v::store(widen(x), wide);
                }
            }
        }

        /// The products of `q` with the first `n_keys` rows of the tile; what follows is unspecified.
        #[inline]
        #[target_feature(enable = $features)]
        fn scores<const N: usize>(
            q: &[f32],
            tile: &[[f32; N]; KEYS],
            n_keys: usize,
            out: &mut [f32; KEYS],
        ) {
            let q = q.as_chunks::<{ v::LANES }>().0;
            let keys = tile.as_chunks::<{ v::LANES }>().0;
            let groups = keys.iter().zip(out.as_chunks_mut::<{ v::LANES }>().0);
            for (keys, out) in groups.take(n_keys.div_ceil(v::LANES)) {
                let keys = keys
                    .each_ref()
                    .map(|key| &key.as_chunks::<{ v::LANES }>().0[..q.len()]);
                let mut sums = [v::splat(0.0); v::LANES];
                for (i, q) in q.iter().enumerate() {
                    let q = v::load(q);
                    for (sum, key) in sums.iter_mut().zip(&keys) {
                        *sum = v::fma(q, v::load(&key[i]), *sum);
                    }
                }
                v::store(v::fold(sums), out);
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
            for (i, group) in groups.iter_mut().enumerate() {
                let at = i * v::LANES;
                let in_group = |p: usize| p.clamp(at, at + v::LANES) - at;
                let visible = v::only(v::load(group), in_group(first), in_group(end));
                top = v::max(top, visible);
                v::store(visible, group);
            }
            let new_max = max.max(v::max_of(top));
            if new_max == f32::NEG_INFINITY {
                scores.fill(0.0);
                return 1.0;
            }
            let mut total = v::splat(0.0);
            for group in groups {
                let weights = v::exp(v::sub(v::load(group), v::splat(new_max)));
                total = v::add(total, weights);
                v::store(weights, group);
            }
            let shrink = if new_max == *max {
                1.0
            } else {
                (*max - new_max).exp()
            };
            *sum = *sum * shrink + v::sum(total);
            *max = new_max;
            shrink
        }

        /// Adds the rows `keys` of `values`, `stride` apart, times the weights of each query to its `n` sums.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_values<T>(
            weights: &[[f32; KEYS]],
            keys: Range<usize>,
            values: &[T],
            stride: usize,
            n: usize,
            out: &mut [f32],
            widen: impl Fn(&[T; v::LANES]) -> v::V + Copy,
        ) {
            let values = &values[keys.start * stride..];
            let rows = || {
                values
                    .chunks(stride)
                    .map(|row| row[..n].as_chunks().0)
                    .take(keys.len())
            };
            macro_rules! queries {
                ($weights:expr) => {{
                    let mut at = 0;
                    while at + v::WIDTH <= n / v::LANES {
                        sums::<T, { v::WIDTH }, _>($weights, keys.start, rows(), at, n, out, widen);
                        at += v::WIDTH;
                    }
                    while at < n / v::LANES {
                        sums::<T, 1, _>($weights, keys.start, rows(), at, n, out, widen);
                        at += 1;
                    }
                }};
            }
            match weights {
                [a, b, c, d] => queries!([a, b, c, d]),
                [a, b, c] => queries!([a, b, c]),
                [a, b] => queries!([a, b]),
                [a] => queries!([a]),
                _ => unreachable!("one to four queries"),
            }
        }

        /// `W` vectors from vector `at` of `Q` queries.
        #[inline]
        #[target_feature(enable = $features)]
        fn sums<'a, T: 'a, const W: usize, const Q: usize>(
            weights: [&[f32; KEYS]; Q],
            first: usize,
            rows: impl Iterator<Item = &'a [[T; v::LANES]]>,
            at: usize,
            n: usize,
            out: &mut [f32],
            widen: impl Fn(&[T; v::LANES]) -> v::V,
        ) {
            let mut sums = [[v::splat(0.0); W]; Q];
            for (key, row) in rows.enumerate() {
                let row: &[[T; v::LANES]; W] = row[at..].first_chunk().expect("inside the head");
                let row = row.each_ref().map(&widen);
                for (sums, weights) in sums.iter_mut().zip(weights) {
                    let weight = v::splat(weights[(first + key) % KEYS]);
                    for (sum, v) in sums.iter_mut().zip(row) {
                        *sum = v::fma(weight, v, *sum);
                    }
                }
            }
            for (out, sums) in out.chunks_exact_mut(n).zip(sums) {
                let out = &mut out.as_chunks_mut::<{ v::LANES }>().0[at..at + W];
                for (out, sum) in out.iter_mut().zip(sums) {
                    v::store(v::add(v::load(out), sum), out);
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use attend;
