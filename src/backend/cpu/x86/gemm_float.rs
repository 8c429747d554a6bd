//! GEMM over float weights: tiles of rows by tokens, vectors along the row.

/// Defines a GEMM over float activations: `$widen` loads a vector of weights.
macro_rules! gemm_float {
    ($features:literal, $name:ident, $block:ty, $widen:expr) => {
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = $features)]
        pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
            #[inline]
            #[target_feature(enable = $features)]
            fn tile<const T: usize, const R: usize>(
                w: &[$block],
                x: &Acts,
                token: usize,
                y: &mut OutCols,
                first: usize,
            ) {
                let n = x.n_in;
                let w: [_; R] = std::array::from_fn(|r| {
                    let (units, rest) = w[(first + r) * n..][..n].as_chunks::<{ v::LANES }>();
                    (&units[..n / v::LANES], rest)
                });
                let x: [_; T] = std::array::from_fn(|t| {
                    let (units, rest) = x.row(token + t).as_chunks::<{ v::LANES }>();
                    (&units[..n / v::LANES], rest)
                });
                let mut sums = [[v::splat(0.0); T]; R];
                for i in 0..n / v::LANES {
                    let x = x.each_ref().map(|x| v::load(&x.0[i]));
                    for (sums, w) in sums.iter_mut().zip(&w) {
                        let w = $widen(&w.0[i]);
                        for (sum, x) in sums.iter_mut().zip(x) {
                            *sum = v::fma(w, x, *sum);
                        }
                    }
                }
                for (t, x) in x.into_iter().enumerate() {
                    let totals = v::sums(sums.map(|sums| sums[t]));
                    let y = &mut y.row(token + t)[first..first + R];
                    for ((y, total), w) in y.iter_mut().zip(totals).zip(&w) {
                        let mut rest = 0.0;
                        for (w, x) in w.1.iter().zip(x.1) {
                            let mut weight = [0.0];
                            w.dequantize(&mut weight);
                            rest += weight[0] * x;
                        }
                        *y = total + rest;
                    }
                }
            }
            let w = blocks::<$block>(w);
            let (n_rows, n_tokens) = (y.n_cols(), x.n_tokens);
            const R: usize = v::TILE.0;
            const T: usize = v::TILE.1;
            let mut row = 0;
            while row < n_rows {
                let mut token = 0;
                while token < n_tokens {
                    match (n_rows - row >= R, n_tokens - token >= T) {
                        (true, true) => tile::<T, R>(w, x, token, y, row),
                        (true, false) => {
                            (token..n_tokens).for_each(|t| tile::<1, R>(w, x, t, y, row));
                        }
                        (false, true) => {
                            (row..n_rows).for_each(|r| tile::<T, 1>(w, x, token, y, r));
                        }
                        (false, false) => (token..n_tokens).for_each(|t| {
                            (row..n_rows).for_each(|r| tile::<1, 1>(w, x, t, y, r));
                        }),
                    }
                    token += T;
                }
                row += R;
            }
        }
    };
}
pub(in crate::backend::cpu) use gemm_float;
