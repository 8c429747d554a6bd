//! The loops of a GEMV, around what a level and a format do with a unit of blocks.

/// Defines `gemv` for a format from functions of its file: `prepare`, what rows share of the activations that meet
/// `$unit` blocks, and either `dot`, which adds the products of `$unit` blocks to a row's partial sums, or, named with
/// `together`, `dot4`, which adds those of four rows to the sums of a vector with four lanes to each.
///
/// Rows are taken four at a time: they share the preparation, and memory sees four streams. A last unit that is not
/// full reaches back over blocks that are done already; their activations get the scale 0.
macro_rules! gemv {
    ($features:literal, $block:ty, $unit:literal) => {
        type Sums = [super::floats::V; 4];

        #[inline]
        #[target_feature(enable = $features)]
        fn no_sums() -> Sums {
            [super::floats::splat(0.0); 4]
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn add(w: [&[$block; $unit]; 4], x: &Prepared, mut sums: Sums) -> Sums {
            for r in 0..4 {
                sums[r] = dot(w[r], x, sums[r]);
            }
            sums
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn totals(sums: Sums) -> [f32; 4] {
            super::floats::sum_of_4(sums)
        }

        crate::backend::cpu::x86::gemv::gemv_loops!($features, $block, $unit);
    };
    ($features:literal, $block:ty, $unit:literal, together) => {
        type Sums = super::floats::V;

        #[inline]
        #[target_feature(enable = $features)]
        fn no_sums() -> Sums {
            super::floats::splat(0.0)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn add(w: [&[$block; $unit]; 4], x: &Prepared, sums: Sums) -> Sums {
            dot4(w, x, sums)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn totals(sums: Sums) -> [f32; 4] {
            super::floats::sum_runs(sums)
        }

        crate::backend::cpu::x86::gemv::gemv_loops!($features, $block, $unit);
    };
}
pub(in crate::backend::cpu) use gemv;

/// The loops of a `gemv` around `prepare` and `add`.
macro_rules! gemv_loops {
    ($features:literal, $block:ty, $unit:literal) => {
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = $features)]
        pub(crate) fn gemv(
            w: &[u8],
            x: &crate::backend::cpu::acts::Acts,
            y: &mut crate::backend::cpu::pool::OutCols,
        ) {
            let ahead = crate::backend::cpu::x86::reads().row_ahead;
            let n_blocks = x.n_in / <$block as crate::quant::Block>::LEN;
            if n_blocks < $unit {
                return crate::backend::cpu::scalar::gemv::q8::<$block>(w, x, y);
            }
            let w = crate::quant::blocks::<$block>(w);
            // Four rows far apart, each followed by its neighbour: memory sees four long streams. Adjacent rows, four
            // short streams, came at half the speed.
            let quarter = y.n_cols() / 4;
            let (a, rest) = w.split_at(quarter * n_blocks);
            let (b, rest) = rest.split_at(quarter * n_blocks);
            let (c, rest) = rest.split_at(quarter * n_blocks);
            let (d, rest) = rest.split_at(quarter * n_blocks);
            for t in 0..x.n_tokens {
                let x = x.q8_row(t);
                let last = last(n_blocks, &x);
                let y = y.row(t);
                for r in 0..quarter {
                    let at = r * n_blocks..(r + 1) * n_blocks;
                    let rows = [&a[at.clone()], &b[at.clone()], &c[at.clone()], &d[at]];
                    // Near the end of its stream a row asks for the start of the next call's, which the thread will
                    // most likely run next.
                    let to_end = (quarter - r) * n_blocks * size_of::<$block>();
                    let beyond = if to_end > ahead {
                        0
                    } else {
                        size_of_val(w) - size_of_val(a)
                    };
                    let sums = products(rows, &x, &last, ahead + beyond);
                    for k in 0..4 {
                        y[k * quarter + r] = sums[k];
                    }
                }
                for (y, row) in y[4 * quarter..].iter_mut().zip(rest.chunks_exact(n_blocks)) {
                    // At most three rows: not worth code of their own.
                    [*y, ..] = products([row; 4], &x, &last, ahead);
                }
            }
        }

        /// `y[i] = sum_k w[picks[i], k] x[k]`: some rows of one token's product.
        #[target_feature(enable = $features)]
        pub(crate) fn gemv_picked(
            w: &[u8],
            picks: &[u32],
            x: &crate::backend::cpu::acts::Acts,
            y: &mut [f32],
        ) {
            let ahead = crate::backend::cpu::x86::reads().row_ahead;
            let n_blocks = x.n_in / <$block as crate::quant::Block>::LEN;
            if n_blocks < $unit {
                return crate::backend::cpu::scalar::gemv::q8_picked::<$block>(w, picks, x, y);
            }
            let w = crate::quant::blocks::<$block>(w);
            let x = x.q8_row(0);
            let last = last(n_blocks, &x);
            let row = |i: usize| &w[picks[i] as usize * n_blocks..][..n_blocks];
            // As above: four streams.
            let quarter = picks.len() / 4;
            for i in 0..quarter {
                let rows = [0, 1, 2, 3].map(|k| row(k * quarter + i));
                let sums = products(rows, &x, &last, ahead);
                for k in 0..4 {
                    y[k * quarter + i] = sums[k];
                }
            }
            for i in 4 * quarter..picks.len() {
                [y[i], ..] = products([row(i); 4], &x, &last, ahead);
            }
        }

        /// What rows share of the activations of a last unit that is not full.
        #[inline]
        #[target_feature(enable = $features)]
        fn last(n_blocks: usize, x: &crate::backend::cpu::acts::Q8Row) -> Prepared {
            const LEN: usize = <$block as crate::quant::Block>::LEN * $unit;
            const GROUPS: usize = LEN / crate::backend::cpu::acts::Q8_LEN;
            let first = n_blocks - $unit;
            let at = first * (LEN / $unit);
            let group = first * (GROUPS / $unit);
            let old = (n_blocks / $unit * $unit - first) * (GROUPS / $unit);
            let (mut d, mut s) = ([0.0; GROUPS], [0.0; GROUPS]);
            for i in old..GROUPS {
                d[i] = x.d[group + i];
                s[i] = x.s[group + i];
            }
            prepare(x.q[at..].first_chunk().expect("a whole unit"), &d, &s)
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn products(
            w: [&[$block]; 4],
            x: &crate::backend::cpu::acts::Q8Row,
            last: &Prepared,
            ahead: usize,
        ) -> [f32; 4] {
            const LEN: usize = <$block as crate::quant::Block>::LEN * $unit;
            const GROUPS: usize = LEN / crate::backend::cpu::acts::Q8_LEN;
            // Cache lines of a unit; where it is a little more than whole lines, the hardware finds the rest.
            const LINES: usize = (size_of::<[$block; $unit]>() + 32) / 64;
            let n_blocks = w[0].len();
            assert!(w.iter().all(|w| w.len() == n_blocks));
            let (q, d, s) = (
                x.q.as_chunks::<LEN>().0,
                x.d.as_chunks::<GROUPS>().0,
                x.s.as_chunks::<GROUPS>().0,
            );
            let n_units = q.len();
            let (d, s) = (&d[..n_units], &s[..n_units]);
            // No closures here: one that is not inlined passes its vectors through memory.
            let mut rows: [&[[$block; $unit]]; 4] = [&[]; 4];
            for (row, blocks) in rows.iter_mut().zip(w) {
                *row = &blocks.as_chunks().0[..n_units];
            }
            let mut sums = no_sums();
            for i in 0..n_units {
                let x = prepare(&q[i], &d[i], &s[i]);
                let w = [&rows[0][i], &rows[1][i], &rows[2][i], &rows[3][i]];
                for w in w {
                    for line in 0..LINES {
                        crate::backend::cpu::x86::prefetch(w, ahead + 64 * line);
                    }
                }
                sums = add(w, &x, sums);
            }
            if n_units * $unit < n_blocks {
                let mut units = [&rows[0][0]; 4];
                for (unit, w) in units.iter_mut().zip(w) {
                    *unit = w.last_chunk().expect("a whole unit");
                }
                sums = add(units, last, sums);
            }
            totals(sums)
        }
    };
}
pub(in crate::backend::cpu) use gemv_loops;

/// Defines a GEMV over float activations: `$widen` loads a vector of weights. Rows are taken as in the others.
macro_rules! gemv_float {
    ($features:literal, $name:ident, $block:ty, $widen:expr) => {
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = $features)]
        pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
            #[inline]
            #[target_feature(enable = $features)]
            fn products<const R: usize>(w: [&[$block]; R], x: &[f32], ahead: usize) -> [f32; R] {
                assert!(w.iter().all(|w| w.len() == x.len()));
                let (x, x_rest) = x.as_chunks::<{ v::LANES }>();
                let n_units = x.len();
                let mut rows: [&[[$block; v::LANES]]; R] = [&[]; R];
                for (row, w) in rows.iter_mut().zip(w) {
                    *row = &w.as_chunks().0[..n_units];
                }
                let mut sums = [v::splat(0.0); R];
                for i in 0..n_units {
                    let x = v::load(&x[i]);
                    for r in 0..R {
                        let w = &rows[r][i];
                        crate::backend::cpu::x86::prefetch(w, ahead);
                        sums[r] = v::fma($widen(w), x, sums[r]);
                    }
                }
                let mut y = v::sums(sums);
                if !x_rest.is_empty() {
                    for (y, w) in y.iter_mut().zip(w) {
                        for (w, x) in w[n_units * v::LANES..].iter().zip(x_rest) {
                            let mut weight = [0.0];
                            w.dequantize(&mut weight);
                            *y += weight[0] * x;
                        }
                    }
                }
                y
            }
            let ahead = crate::backend::cpu::x86::reads().row_ahead;
            let w = blocks::<$block>(w);
            let n = x.n_in;
            let quarter = y.n_cols() / 4;
            for t in 0..x.n_tokens {
                let (x, y) = (x.row(t), y.row(t));
                for r in 0..quarter {
                    let row = |k: usize| &w[(k * quarter + r) * n..][..n];
                    let sums = products([row(0), row(1), row(2), row(3)], x, ahead);
                    for k in 0..4 {
                        y[k * quarter + r] = sums[k];
                    }
                }
                for r in 4 * quarter..y.len() {
                    [y[r]] = products([&w[r * n..][..n]], x, ahead);
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use gemv_float;
