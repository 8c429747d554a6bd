//! Attention of a few queries that see the same keys, as in decode, over a level's vectors.

/// Defines such an attention, `few`.
///
/// With few queries there is nothing to gain from widened tiles: keys and values are widened in registers. The scores
/// of a whole block of keys come before their softmax, whose long chain of dependent steps is then walked once a block
/// and not once a tile; and sums of weighted values stay in registers through the block.
macro_rules! attend_few {
    ($features:literal) => {
        $crate::backend::cpu::x86::attend_few::attend_few! { $features:
            F32, f32_rows, [[f32; v::LANES]; IN_BLOCK], |block, i| v::load(&block[i]);
            F16, f16_rows, [[u16; v::LANES]; IN_BLOCK], |block, i| v::load_f16(&block[i]);
            Q8_0, q8_0_rows, crate::quant::BlockQ8_0, |block, i| v::load_q8_0(block, i);
            Q4_0, q4_0_rows, crate::quant::BlockQ4_0, |block, i| v::load_q4_0(block, i);
        }
    };
    ($features:literal: $($rows:ident, $name:ident, $block:ty, |$at:ident, $i:ident| $load:expr;)*) => {
        mod few {
            use super::v;
            use crate::backend::cpu::table::{AttendSpan, Rows};
            use crate::backend::cpu::x86::prefetch;

            /// Elements of a head that are taken together: a block of the quantized types.
            pub(super) const LEN: usize = 32;

            /// Vectors of so many.
            const IN_BLOCK: usize = LEN / v::LANES;

            /// Keys whose scores are held at a time.
            const KEYS: usize = 256;

            /// Bytes of values, at least, of which all columns are summed before the next ones.
            const BLOCK: usize = 8192;

            /// Bytes from what is multiplied to what is asked for. It is a constant, and each line is looked for by itself:
            /// what is faster than that from the cache was slower from memory.
            const AHEAD: usize = 8192;

            /// What is read one after the other, so that it can be asked for in that order.
            #[derive(Clone, Copy)]
            struct Stream<'a>([&'a [u8]; 2]);

            impl<'a> Stream<'a> {
                fn new<T: bytemuck::Pod>(rows: &'a [T], then: &'a [u8]) -> Self {
                    Self([bytemuck::cast_slice(rows), then])
                }

                /// Asks for the lines that begin [`AHEAD`] of the bytes `from..end`.
                #[inline]
                #[target_feature(enable = $features)]
                fn ask(self, from: usize, end: usize) {
                    let Self([first, then]) = self;
                    for line in (AHEAD + from).div_ceil(64)..(AHEAD + end).div_ceil(64) {
                        let at = 64 * line;
                        if at < first.len() {
                            prefetch(&first[at], 0);
                        } else if at - first.len() < then.len() {
                            prefetch(&then[at - first.len()], 0);
                        }
                    }
                }
            }

            /// Queries, or their sums: heads of `H` blocks.
            type Heads<const H: usize, const Q: usize> = [[[[f32; v::LANES]; IN_BLOCK]; H]; Q];

            /// Queries that share a pass over keys and values, and their sums.
            struct Group<'a, const H: usize, const Q: usize> {
                q: &'a Heads<H, Q>,
                max: &'a mut [f32; Q],
                sum: &'a mut [f32; Q],
                out: &'a mut Heads<H, Q>,
            }

            /// See [`AttendSpan`]; all queries see what the first does.
            #[target_feature(enable = $features)]
            pub(super) fn attend<const H: usize>(span: &mut AttendSpan) {
                let q = span.q.as_chunks::<{ v::LANES }>().0;
                let mut q = q.as_chunks::<IN_BLOCK>().0.as_chunks::<H>().0;
                let out = span.out.as_chunks_mut::<{ v::LANES }>().0;
                let mut out = out.as_chunks_mut::<IN_BLOCK>().0.as_chunks_mut::<H>().0;
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
                        add_keys::<H, $n>(
                            Group {
                                q: group,
                                max: group_max,
                                sum: group_sum,
                                out: group_out,
                            },
                            (span.k, span.v, span.next),
                            span.visible[0],
                        );
                    }};
                }
                while !q.is_empty() {
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
            fn add_keys<const H: usize, const Q: usize>(
                group: Group<H, Q>,
                (keys, values, next): (Rows, Rows, &[u8]),
                (mut first, n_keys): (usize, usize),
            ) {
                let mut weights = [[0.0f32; KEYS]; Q];
                while first < n_keys {
                    let end = n_keys.min(first + KEYS);
                    match keys {
                        $(Rows::$rows(keys) => {
                            $name::scores(group.q, keys, values.bytes(), first..end, &mut weights)
                        })*
                    }
                    let mut shrink = [0.0; Q];
                    for r in 0..Q {
                        let (max, sum) = (&mut group.max[r], &mut group.sum[r]);
                        shrink[r] = softmax(&mut weights[r], end - first, max, sum);
                    }
                    match values {
                        $(Rows::$rows(values) => {
                            let next = if end == n_keys { next } else { &[] };
                            $name::add_values(&weights, shrink, (values, next), first..end, group.out)
                        })*
                    }
                    first = end;
                }
            }

            /// The first `n` scores to weights. Returns the factor that what was summed before must take.
            #[inline]
            #[target_feature(enable = $features)]
            fn softmax(scores: &mut [f32; KEYS], n: usize, max: &mut f32, sum: &mut f32) -> f32 {
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

            $(mod $name {
                use std::ops::Range;

                use super::{BLOCK, Heads, IN_BLOCK, KEYS, Stream, v};

                type Block = $block;

                /// A vector of a block.
                #[inline]
                #[target_feature(enable = $features)]
                fn load($at: &Block, $i: usize) -> v::V {
                    $load
                }

                /// The products of each query with `keys`; those beyond the last key repeat its product.
                #[inline]
                #[target_feature(enable = $features)]
                pub(super) fn scores<const H: usize, const Q: usize>(
                    q: &Heads<H, Q>,
                    rows: &[impl bytemuck::Pod],
                    values: &[u8],
                    keys: Range<usize>,
                    out: &mut [[f32; KEYS]; Q],
                ) {
                    let rows = bytemuck::cast_slice::<_, Block>(rows).as_chunks::<H>().0;
                    let value_bytes = values.len() / rows.len();
                    let values = &values[keys.start * value_bytes..keys.end * value_bytes];
                    let rows = &rows[keys];
                    let stream = Stream::new(rows, values);
                    let (full, rest) = rows.as_chunks::<{ v::LANES }>();
                    for (g, out_at) in (0..full.len()).zip((0..KEYS).step_by(v::LANES)) {
                        products(q, &full[g], stream, out_at, out);
                    }
                    if let Some(last) = rest.last() {
                        let mut some = [*last; v::LANES];
                        some[..rest.len()].copy_from_slice(rest);
                        let at = full.len() * v::LANES;
                        if at < KEYS {
                            products(q, &some, stream, at, out);
                        }
                    }
                }

                /// Those with as many keys as a vector has lanes, to `at..`.
                #[inline]
                #[target_feature(enable = $features)]
                fn products<const H: usize, const Q: usize>(
                    q: &Heads<H, Q>,
                    keys: &[[Block; H]; v::LANES],
                    stream: Stream,
                    at: usize,
                    out: &mut [[f32; KEYS]; Q],
                ) {
                    let mut fours = [[v::splat(0.0); v::LANES / 4]; Q];
                    for f in 0..v::LANES / 4 {
                        let mut sums = [[v::splat(0.0); 4]; Q];
                        let keys = &keys[4 * f..4 * f + 4];
                        let start = (at + 4 * f) * size_of::<[Block; H]>();
                        for h in 0..H {
                            for i in 0..IN_BLOCK {
                                let step = h * IN_BLOCK + i;
                                let bytes = 4 * size_of::<Block>() / IN_BLOCK;
                                stream.ask(start + step * bytes, start + (step + 1) * bytes);
                                let mut qs = [v::splat(0.0); Q];
                                for r in 0..Q {
                                    qs[r] = v::load(&q[r][h][i]);
                                }
                                for j in 0..4 {
                                    let key = load(&keys[j][h], i);
                                    for r in 0..Q {
                                        sums[r][j] = v::fma(key, qs[r], sums[r][j]);
                                    }
                                }
                            }
                        }
                        for r in 0..Q {
                            fours[r][f] = v::fold4(sums[r]);
                        }
                    }
                    for r in 0..Q {
                        let out = &mut out[r].as_chunks_mut::<{ v::LANES }>().0[at / v::LANES];
                        v::store(v::fold_fours(fours[r]), out);
                    }
                }

                /// `out = out * shrink + weights * values` for each query, while `next` is asked for.
                #[inline]
                #[target_feature(enable = $features)]
                pub(super) fn add_values<const H: usize, const Q: usize>(
                    weights: &[[f32; KEYS]; Q],
                    shrink: [f32; Q],
                    (rows, next): (&[impl bytemuck::Pod], &[u8]),
                    keys: Range<usize>,
                    out: &mut Heads<H, Q>,
                ) {
                    const W: usize = v::WIDTH;
                    let rows = bytemuck::cast_slice::<_, Block>(rows).as_chunks::<H>().0;
                    let rows = &rows[keys];
                    let stream = Stream::new(rows, next);
                    let row_bytes = size_of::<[Block; H]>();
                    let bytes = W * size_of::<Block>() / IN_BLOCK;
                    let in_block = BLOCK.div_ceil(row_bytes);
                    for first in (0..rows.len().min(KEYS)).step_by(in_block) {
                        let block = &rows[first..rows.len().min(KEYS).min(first + in_block)];
                        let mut start = first * row_bytes;
                        for at in (0..H * IN_BLOCK).step_by(W) {
                            let mut sums = [[v::splat(0.0); W]; Q];
                            for r in 0..Q {
                                let out = out[r].as_flattened();
                                for w in 0..W {
                                    sums[r][w] = v::load(&out[at + w]);
                                    if first == 0 {
                                        sums[r][w] = v::mul(sums[r][w], v::splat(shrink[r]));
                                    }
                                }
                            }
                            for (key, row) in (first..KEYS).zip(block) {
                                stream.ask(start, start + bytes);
                                start += bytes;
                                let mut value = [v::splat(0.0); W];
                                for w in 0..W {
                                    value[w] = load(&row[(at + w) / IN_BLOCK], (at + w) % IN_BLOCK);
                                }
                                for r in 0..Q {
                                    let weight = v::splat(weights[r][key]);
                                    for w in 0..W {
                                        sums[r][w] = v::fma(weight, value[w], sums[r][w]);
                                    }
                                }
                            }
                            for r in 0..Q {
                                let out = out[r].as_flattened_mut();
                                for w in 0..W {
                                    v::store(sums[r][w], &mut out[at + w]);
                                }
                            }
                        }
                    }
                }
            })*
        }
    };
}
pub(in crate::backend::cpu) use attend_few;
