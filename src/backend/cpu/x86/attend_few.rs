//! Attention of a few queries that see the same keys, as in decode, over a level's vectors.

/// Defines such an attention over keys and values of `$element`, which `$load` widens.
///
/// With few queries there is nothing to gain from widened tiles: keys and values are widened in registers. The scores
/// of a whole block of keys come before their softmax, whose long chain of dependent steps is then walked once a block
/// and not once a tile; and sums of weighted values stay in registers through the block.
macro_rules! attend_few {
    ($features:literal, $name:ident, $element:ty, $load:path) => {
        pub(super) mod $name {
            use super::v;
            use crate::backend::cpu::table::AttendSpan;
            use crate::backend::cpu::x86::prefetch;

            /// Keys whose scores are held at a time.
            const BLOCK: usize = 256;

            /// Keys or values, heads of `C` vectors.
            type Rows<'a, const C: usize> = &'a [[[$element; v::LANES]; C]];

            /// Queries that share a pass over keys and values, and their sums.
            struct Group<'a, const C: usize, const Q: usize> {
                q: &'a [[[f32; v::LANES]; C]; Q],
                max: &'a mut [f32; Q],
                sum: &'a mut [f32; Q],
                out: &'a mut [[[f32; v::LANES]; C]; Q],
            }

            /// See [`AttendSpan`]; all queries see what the first does.
            #[target_feature(enable = $features)]
            pub(in super::super) fn attend<const C: usize>(span: &mut AttendSpan) {
                let rows = |bytes| {
                    let elements: &[$element] = bytemuck::cast_slice(bytes);
                    elements.as_chunks::<{ v::LANES }>().0.as_chunks::<C>().0
                };
                let (start, end) = span.visible[0];
                let (keys, values) = (&rows(span.k)[..end], &rows(span.v)[..end]);
                let mut q = span.q.as_chunks::<{ v::LANES }>().0.as_chunks::<C>().0;
                let out = span.out.as_chunks_mut::<{ v::LANES }>().0;
                let mut out = out.as_chunks_mut::<C>().0;
                let (mut max, mut sum) = (&mut *span.max, &mut *span.sum);
                macro_rules! take {
                    ($n:literal) => {{
                        let group;
                        let group_out;
                        let group_max;
                        let group_sum;
                        (group, q) = q.split_first_chunk::<$n>().expect("counted");
                        (group_out, out) = out.split_first_chunk_mut::<$n>().expect("one a query");
                        (group_max, max) = max.split_first_chunk_mut::<$n>().expect("one a query");
                        (group_sum, sum) = sum.split_first_chunk_mut::<$n>().expect("one a query");
                        add_keys::<C, $n>(
                            Group {
                                q: group,
                                max: group_max,
                                sum: group_sum,
                                out: group_out,
                            },
                            keys,
                            values,
                            start,
                        );
                    }};
                }
                while start < end && !q.is_empty() {
                    match q.len() {
                        1 => take!(1),
                        2 => take!(2),
                        3 => take!(3),
                        _ => take!(4),
                    }
                }
            }

            #[inline]
            #[target_feature(enable = $features)]
            fn add_keys<const C: usize, const Q: usize>(
                group: Group<C, Q>,
                keys: Rows<C>,
                values: Rows<C>,
                start: usize,
            ) {
                let n_keys = keys.len().min(values.len());
                let mut weights = [[0.0f32; BLOCK]; Q];
                let mut first = start;
                while first < n_keys {
                    let end = n_keys.min(first + BLOCK);
                    scores(group.q, &keys[..end], values, first, &mut weights);
                    let mut shrink = [0.0; Q];
                    for r in 0..Q {
                        let (max, sum) = (&mut group.max[r], &mut group.sum[r]);
                        shrink[r] = softmax(&mut weights[r], end - first, max, sum);
                    }
                    add_values(&weights, shrink, &values[first..end], group.out);
                    first = end;
                }
            }

            /// The products of each query with the keys from `first`; those beyond the last key repeat its product.
            #[inline]
            #[target_feature(enable = $features)]
            fn scores<const C: usize, const Q: usize>(
                q: &[[[f32; v::LANES]; C]; Q],
                keys: Rows<C>,
                values: Rows<C>,
                first: usize,
                out: &mut [[f32; BLOCK]; Q],
            ) {
                for g in 0..(keys.len() - first)
                    .div_ceil(v::LANES)
                    .min(BLOCK / v::LANES)
                {
                    let mut sums = [[v::splat(0.0); v::LANES]; Q];
                    for j in 0..v::LANES {
                        let at = (first + g * v::LANES + j).min(keys.len() - 1);
                        let key = &keys[at];
                        for line in 0..size_of_val(key) / 64 {
                            prefetch(&values[at], 64 * line);
                        }
                        let mut sum = [v::splat(0.0); Q];
                        for i in 0..C {
                            let key = $load(&key[i]);
                            for r in 0..Q {
                                sum[r] = v::fma(key, v::load(&q[r][i]), sum[r]);
                            }
                        }
                        for r in 0..Q {
                            sums[r][j] = sum[r];
                        }
                    }
                    for r in 0..Q {
                        let out = &mut out[r].as_chunks_mut::<{ v::LANES }>().0[g];
                        v::store(v::fold(sums[r]), out);
                    }
                }
            }

            /// The first `n` scores to weights. Returns the factor that what was summed before must take.
            #[inline]
            #[target_feature(enable = $features)]
            fn softmax(scores: &mut [f32; BLOCK], n: usize, max: &mut f32, sum: &mut f32) -> f32 {
                let groups = scores.as_chunks_mut::<{ v::LANES }>().0;
                let groups = &mut groups[..n.div_ceil(v::LANES)];
                let mut top = v::splat(f32::NEG_INFINITY);
                for g in 0..groups.len() {
                    let end = (n - g * v::LANES).min(v::LANES);
                    let visible = v::only(v::load(&groups[g]), 0, end);
                    top = v::max(top, visible);
                    v::store(visible, &mut groups[g]);
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
                let shrink = v::first(v::exp(v::splat(*max - new_max)));
                *sum = *sum * shrink + v::sum(total);
                *max = new_max;
                shrink
            }

            /// `out = out * shrink + weights * values` for each query.
            #[inline]
            #[target_feature(enable = $features)]
            fn add_values<const C: usize, const Q: usize>(
                weights: &[[f32; BLOCK]; Q],
                shrink: [f32; Q],
                values: Rows<C>,
                out: &mut [[[f32; v::LANES]; C]; Q],
            ) {
                const W: usize = v::WIDTH;
                for at in (0..C).step_by(W) {
                    let mut sums = [[v::splat(0.0); W]; Q];
                    for r in 0..Q {
                        for w in 0..W {
                            let old = v::load(&out[r][at + w]);
                            sums[r][w] = v::mul(old, v::splat(shrink[r]));
                        }
                    }
                    for key in 0..values.len().min(BLOCK) {
                        let row = &values[key];
                        let mut value = [v::splat(0.0); W];
                        for w in 0..W {
                            value[w] = $load(&row[at + w]);
                        }
                        for r in 0..Q {
                            let weight = v::splat(weights[r][key]);
                            for w in 0..W {
                                sums[r][w] = v::fma(weight, value[w], sums[r][w]);
                            }
                        }
                    }
                    for r in 0..Q {
                        for w in 0..W {
                            v::store(sums[r][w], &mut out[r][at + w]);
                        }
                    }
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use attend_few;
