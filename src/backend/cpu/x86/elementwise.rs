//! Elementwise kernels over a level's vectors.

/// Defines the elementwise kernels of a level.
macro_rules! elementwise {
    ($features:literal) => {
        /// `x[i] = d * q[i]`, `d = max|x| / 127` per 32, `s = d * sum(q)`, `n` the sums of 16 `q`, `u = q + 128`; the same
        /// numbers as the scalar row's.
        #[target_feature(enable = $features)]
        pub(crate) fn quantize(x: &[f32], row: &mut Q8RowMut) {
            let x = x.as_chunks::<Q8_LEN>().0.iter();
            let q = row.q.as_chunks_mut::<Q8_LEN>().0.iter_mut();
            let n = row.n.as_chunks_mut::<2>().0.iter_mut();
            let scales = row.d.iter_mut().zip(&mut *row.s).zip(n);
            for ((x, q), ((d, s), n)) in x.zip(q).zip(scales) {
                let x = x.as_chunks::<{ v::LANES }>().0;
                let mut top = v::splat(0.0);
                for x in x {
                    let x = v::load(x);
                    top = v::max(top, v::max(x, v::sub(v::splat(0.0), x)));
                }
                let max = v::max_of(top);
                *d = max / 127.0;
                let inverse = v::splat(if max > 0.0 { 127.0 / max } else { 0.0 });
                let mut sums = [v::splat(0.0); 2];
                for (i, (x, q)) in x
                    .iter()
                    .zip(q.as_chunks_mut::<{ v::LANES }>().0)
                    .enumerate()
                {
                    let rounded = v::round(v::mul(v::load(x), inverse));
                    v::store_i8(rounded, q);
                    // Exact: whole numbers, 32 of at most 127.
                    let half = i / (16 / v::LANES);
                    sums[half] = v::add(sums[half], rounded);
                }
                let sums = [v::sum(sums[0]), v::sum(sums[1])];
                *n = [sums[0] as i32, sums[1] as i32];
                *s = *d * (sums[0] + sums[1]);
            }
            scalar::raise(row);
        }

        /// `y = x / sqrt(mean(x^2) + eps) * gain`.
        #[target_feature(enable = $features)]
        pub(crate) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) {
            scalar::rms_norm(x, gain, eps, y)
        }

        /// Pairs `(x[i], x[i + n])`.
        #[target_feature(enable = $features)]
        pub(crate) fn rope_halves(x: &mut [f32], cos: &[f32], sin: &[f32]) {
            scalar::rope_halves(x, cos, sin)
        }

        /// Pairs `(x[2i], x[2i + 1])`.
        #[target_feature(enable = $features)]
        pub(crate) fn rope_neighbours(x: &mut [f32], cos: &[f32], sin: &[f32]) {
            scalar::rope_neighbours(x, cos, sin)
        }

        /// `weights[i] = exp(logits[i] - max)`.
        #[target_feature(enable = $features)]
        pub(crate) fn weigh(logits: &[f32], max: f32, weights: &mut [f32]) {
            logits::weigh(logits, max, weights)
        }

        /// See [`Largest`].
        #[target_feature(enable = $features)]
        pub(crate) fn largest(logits: &[f32], found: &mut Largest) {
            logits::largest(logits, found)
        }

        /// See [`ranking::rank`].
        #[target_feature(enable = $features)]
        pub(crate) fn rank(scores: &[f32], keys: &mut [i32]) {
            ranking::rank(scores, keys)
        }

        /// See [`ranking::divide`].
        #[target_feature(enable = $features)]
        pub(crate) fn divide(keys: &[i32], at: i32, sides: &mut ranking::Sides) {
            ranking::divide(keys, at, sides)
        }

        /// See [`ranking::mark`].
        #[target_feature(enable = $features)]
        pub(crate) fn mark(keys: &[i32], least: i32, words: &mut [u64]) {
            let (blocks, rest) = keys.as_chunks::<{ u64::BITS as usize }>();
            let (words, last) = words.split_at_mut(blocks.len());
            for (word, keys) in words.iter_mut().zip(blocks) {
                let lanes = keys.as_chunks::<{ v::LANES }>().0.iter().enumerate();
                *word = lanes.fold(0, |bits, (i, keys)| {
                    bits | u64::from(v::at_least(keys, least)) << (i * v::LANES)
                });
            }
            ranking::mark(rest, least, last)
        }

        /// `x += y`.
        #[target_feature(enable = $features)]
        pub(crate) fn add(x: &mut [f32], y: &[f32]) {
            scalar::add(x, y)
        }

        /// See [`ShortConvRows`].
        #[target_feature(enable = $features)]
        pub(crate) fn short_conv(rows: &mut ShortConvRows) {
            short_conv::short_conv(rows)
        }

        /// `gate = activation(gate) * up`.
        #[target_feature(enable = $features)]
        pub(crate) fn glu(activation: Activation, gate: &mut [f32], up: &[f32]) {
            match activation {
                Activation::Silu => {
                    for_each(gate, up, |g, u| v::mul(v::mul(g, v::sigmoid(g)), u));
                }
                Activation::GeluTanh => for_each(gate, up, |g, u| {
                    // tanh(z) = 2 sigmoid(2z) - 1.
                    let cubic = v::fma(v::mul(g, g), v::splat(0.044_715), v::splat(1.0));
                    let twice = v::mul(v::mul(g, v::splat(2.0 * 0.797_884_6)), cubic);
                    v::mul(v::mul(g, v::sigmoid(twice)), u)
                }),
                Activation::Relu => scalar::glu(activation, gate, up),
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn for_each(x: &mut [f32], y: &[f32], f: impl Fn(v::V, v::V) -> v::V) {
            let n = x.len().min(y.len());
            let (x, x_rest) = x[..n].as_chunks_mut::<{ v::LANES }>();
            let (y, y_rest) = y[..n].as_chunks::<{ v::LANES }>();
            for (x, y) in x.iter_mut().zip(y) {
                let z = f(v::load(x), v::load(y));
                v::store(z, x);
            }
            if !x_rest.is_empty() {
                let (mut x, mut y) = ([0.0; v::LANES], [0.0; v::LANES]);
                x[..x_rest.len()].copy_from_slice(x_rest);
                y[..y_rest.len()].copy_from_slice(y_rest);
                let z = f(v::load(&x), v::load(&y));
                v::store(z, &mut x);
                x_rest.copy_from_slice(&x[..x_rest.len()]);
            }
        }

        /// Floats to half floats, nearest even.
        #[target_feature(enable = $features)]
        pub(crate) fn to_f16(x: &[f32], y: &mut [u16]) {
            let n = x.len().min(y.len());
            let (x, x_rest) = x[..n].as_chunks::<{ v::LANES }>();
            let (y, y_rest) = y[..n].as_chunks_mut::<{ v::LANES }>();
            for (x, y) in x.iter().zip(y) {
                v::store_f16(v::load(x), y);
            }
            scalar::to_f16(x_rest, y_rest);
        }
    };
}
pub(in crate::backend::cpu) use elementwise;
