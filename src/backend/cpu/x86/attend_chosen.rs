//! Attention of a batch to keys that each token chooses, over a level's vectors.

/// Defines the kernel of a level.
///
/// Keys lie in the lanes of scores, elements of values in those of sums, so each token reads what it chose, by groups of
/// eight, and nothing that only its neighbours did. Frames of keys, turned, and of values stay in the first caches while
/// all tokens of the batch pass by; the heads of a token share what is loaded of both. With queries in the lanes, which read
/// what any of some five tokens chose, a whole prompt of 7,939 tokens took 3 % longer (an EPYC, Zen 5). What a token gets
/// does not depend on which others are beside it.
macro_rules! attend_chosen {
    ($features:literal) => {
        /// Keys that are read or not together: a byte of choices.
        const EIGHT: usize = 8;

        /// Eights of a vector of scores.
        const WIDE: usize = v::LANES / EIGHT;

        /// Keys of a word of choices.
        const WORD: usize = u32::BITS as usize;

        /// Words of a frame.
        const WORDS: usize = LanesBatch::FRAME_TO_CHOOSE / WORD;

        /// Vectors of scores of a frame.
        const MOST: usize = LanesBatch::FRAME_TO_CHOOSE / v::LANES;

        /// Heads that share what is loaded.
        const HEADS: usize = 4;

        /// Tokens that are looked at together: from one to the next a step has nothing to wait for.
        const TOKENS: usize = 4;

        /// Vectors of a value that are summed together: of all heads as many as there are registers.
        const DEEP: usize = v::LANES / 4;

        /// A query, a value or a sum, `C` vectors.
        type Wide<const C: usize> = [[f32; v::LANES]; C];

        /// Eight keys, turned.
        type Turned<const C: usize> = [[[f32; EIGHT]; v::LANES]; C];

        /// A frame of keys and values.
        struct Frame<'a, const C: usize> {
            keys: &'a [Turned<C>],
            values: &'a [[Wide<C>; EIGHT]],
        }

        /// What a token reads of a frame.
        #[derive(Default)]
        struct Read {
            /// The numbers of its eights,
            eights: [u8; WIDE * MOST],
            /// bits of the keys of each that it chose,
            bits: [u8; WIDE * MOST],
            /// and how many there are: whole vectors of scores.
            n: usize,
        }

        /// The queries of some tokens, `group` of each, and their sums.
        struct Queries<'a, const C: usize> {
            group: usize,
            q: &'a [Wide<C>],
            out: &'a mut [Wide<C>],
            max: &'a mut [f32],
            sum: &'a mut [f32],
        }

        /// Scores of a token's queries, then weights.
        type Scores = [[[f32; v::LANES]; MOST]; HEADS];

        /// See [`LanesBatch`].
        #[inline]
        #[target_feature(enable = $features)]
        pub(super) fn attend<const C: usize>(batch: &mut LanesBatch, chosen: Chosen) {
            let n = C * v::LANES;
            let attend = &mut batch.attend;
            let (n_tokens, group) = (attend.out.n_tokens(), attend.group);
            assert!(attend.head_dim == n && batch.frame == WORDS * WORD);
            let mut room = &mut *batch.room;
            let mut take = |floats: usize| {
                let (taken, rest) = std::mem::take(&mut room).split_at_mut(floats);
                room = rest;
                taken
            };
            let q = wide::<C>(take(n_tokens * group * n));
            let out = wide::<C>(take(n_tokens * group * n));
            let max = take(n_tokens * group);
            let sum = take(n_tokens * group);
            let keys = take(batch.frame * n).as_chunks_mut::<EIGHT>().0;
            let keys = keys
                .as_chunks_mut::<{ v::LANES }>()
                .0
                .as_chunks_mut::<C>()
                .0;
            let values = wide::<C>(take(batch.frame * n)).as_chunks_mut::<WORD>().0;
            let rows = wide::<C>(take(WORD * n)).as_chunks_mut::<WORD>().0;
            for (i, q) in q.iter_mut().enumerate() {
                let own = &attend.q[i / group * attend.q_stride + i % group * n..][..n];
                let own = own.as_chunks::<{ v::LANES }>().0;
                for (q, own) in q.iter_mut().zip(own) {
                    v::store(v::mul(v::load(own), v::splat(attend.scale)), q);
                }
            }
            out.as_flattened_mut().fill([0.0; v::LANES]);
            max.fill(f32::NEG_INFINITY);
            sum.fill(0.0);
            let mut scores = [[[[0.0; v::LANES]; MOST]; HEADS]; TOKENS];
            let end = attend.start + n_tokens - attend.first;
            for (i, words) in chosen.words.chunks_exact(WORDS * n_tokens).enumerate() {
                if words.iter().all(|word| *word == 0) {
                    continue;
                }
                let keys_of_words = keys.as_chunks_mut::<{ WORD / EIGHT }>().0;
                let rooms = keys_of_words.iter_mut().zip(&mut *values);
                for (tile, (words, (keys, values))) in
                    words.chunks_exact(n_tokens).zip(rooms).enumerate()
                {
                    if words.iter().all(|word| *word == 0) {
                        continue;
                    }
                    let first = (i * WORDS + tile) * WORD;
                    let n_keys = WORD.min(end - first);
                    let in_page = first % attend.page;
                    let (page, span) = (first / attend.page, in_page..in_page + n_keys);
                    widen(attend.keys[page], n, span.clone(), &mut rows[0]);
                    for (keys, rows) in keys.iter_mut().zip(rows[0].as_chunks().0) {
                        turn(rows, keys);
                    }
                    widen(attend.values[page], n, span, values);
                    // Of the last eight there may be keys that nobody sees, whose weights are zero.
                    values[n_keys..].fill([[0.0; v::LANES]; C]);
                }
                let frame = Frame {
                    keys: &*keys,
                    values: values.as_flattened().as_chunks().0,
                };
                for first in (0..n_tokens).step_by(TOKENS) {
                    let tokens = first..n_tokens.min(first + TOKENS);
                    let reads = std::array::from_fn(|i| match first + i < n_tokens {
                        true => read(words, n_tokens, first + i),
                        false => Read::default(),
                    });
                    let these = tokens.start * group..tokens.end * group;
                    let mut queries = Queries {
                        group,
                        q: &q[these.clone()],
                        out: &mut out[these.clone()],
                        max: &mut max[these.clone()],
                        sum: &mut sum[these],
                    };
                    for head in (0..group).step_by(HEADS) {
                        match group - head {
                            1 => add::<C, 1>(&frame, &reads, head, &mut queries, &mut scores),
                            2 => add::<C, 2>(&frame, &reads, head, &mut queries, &mut scores),
                            3 => add::<C, 3>(&frame, &reads, head, &mut queries, &mut scores),
                            _ => add::<C, HEADS>(&frame, &reads, head, &mut queries, &mut scores),
                        }
                    }
                }
            }
            for (i, (sums, sum)) in out.iter().zip(&*sum).enumerate() {
                let out = &mut attend.out.row(i / group)[i % group * n..][..n];
                let inverse = v::splat(1.0 / sum);
                let out = out.as_chunks_mut::<{ v::LANES }>().0;
                for (sums, out) in sums.iter().zip(out) {
                    v::store(v::mul(v::load(sums), inverse), out);
                }
            }
        }

        /// Rows of `C` vectors.
        fn wide<const C: usize>(floats: &mut [f32]) -> &mut [Wide<C>] {
            floats.as_chunks_mut().0.as_chunks_mut().0
        }

        /// Turns eight keys.
        #[inline]
        #[target_feature(enable = $features)]
        fn turn<const C: usize>(rows: &[Wide<C>; EIGHT], turned: &mut Turned<C>) {
            for i in 0..C {
                v::turn_eight(rows.each_ref().map(|row| &row[i]), &mut turned[i]);
            }
        }

        /// What a token reads, of `words` of all `n_tokens`.
        #[inline]
        #[target_feature(enable = $features)]
        fn read(words: &[u32], n_tokens: usize, token: usize) -> Read {
            let mut read = Read::default();
            for i in 0..WORDS {
                let mut word = words[i * n_tokens + token];
                while word != 0 {
                    let byte = word.trailing_zeros() as usize / EIGHT;
                    read.eights[read.n] = (i * (WORD / EIGHT) + byte) as u8;
                    read.bits[read.n] = (word >> (byte * EIGHT)) as u8;
                    read.n += 1;
                    word &= !(0xff << (byte * EIGHT));
                }
            }
            // A vector is filled with keys that are not read.
            while !read.n.is_multiple_of(WIDE) {
                read.eights[read.n] = read.eights[read.n - 1];
                read.n += 1;
            }
            read
        }

        /// Adds what tokens read of a frame to the sums of `H` queries of each, the first of which is `head`.
        #[inline]
        #[target_feature(enable = $features)]
        fn add<const C: usize, const H: usize>(
            frame: &Frame<C>,
            reads: &[Read; TOKENS],
            head: usize,
            queries: &mut Queries<C>,
            scores: &mut [Scores; TOKENS],
        ) {
            let first = |token: usize| token * queries.group + head;
            for (token, read) in reads.iter().enumerate().filter(|(_, read)| read.n > 0) {
                let q: &[Wide<C>; H] = queries.q[first(token)..]
                    .first_chunk()
                    .expect("so many heads");
                let vectors = read.eights[..read.n].as_chunks::<WIDE>().0;
                let keys = |i: usize| {
                    vectors[i]
                        .each_ref()
                        .map(|eight| &frame.keys[usize::from(*eight)])
                };
                let scores = &mut scores[token];
                let mut at = 0;
                while at < vectors.len() {
                    // None alone if there are two: the units would wait for its sums.
                    at += match vectors.len() - at {
                        1 => multiply::<C, H, 1>(q, [keys(at)], scores, at),
                        2 | 4 => multiply::<C, H, 2>(q, [keys(at), keys(at + 1)], scores, at),
                        _ => multiply::<C, H, 3>(
                            q,
                            [keys(at), keys(at + 1), keys(at + 2)],
                            scores,
                            at,
                        ),
                    };
                }
            }
            let mut shrink = [[v::splat(0.0); H]; TOKENS];
            for (token, read) in reads.iter().enumerate().filter(|(_, read)| read.n > 0) {
                let bits = read.bits[..read.n].as_chunks::<WIDE>().0;
                for h in 0..H {
                    let scores = &mut scores[token][h][..bits.len()];
                    let before = queries.max[first(token) + h];
                    let mut top = v::splat(before);
                    for (score, bits) in scores.iter_mut().zip(bits) {
                        let only = v::only_bits(v::load(score), bits);
                        v::store(only, score);
                        top = v::max(top, only);
                    }
                    let max = v::max_of(top);
                    queries.max[first(token) + h] = max;
                    // Where all scores are minus infinity, so must be differences.
                    let top = v::splat(max.max(f32::MIN / 2.0));
                    let mut total = v::splat(0.0);
                    for score in scores {
                        let weight = v::exp(v::sub(v::load(score), top));
                        total = v::add(total, weight);
                        v::store(weight, score);
                    }
                    let less = v::exp(v::sub(v::splat(before), top));
                    let sum = &mut queries.sum[first(token) + h];
                    *sum = *sum * v::first(less) + v::sum(total);
                    shrink[token][h] = less;
                }
            }
            for (token, read) in reads.iter().enumerate().filter(|(_, read)| read.n > 0) {
                let out = queries.out[first(token)..]
                    .first_chunk_mut()
                    .expect("so many heads");
                add_values::<C, H>(
                    &read.eights[..read.n],
                    frame.values,
                    &scores[token],
                    shrink[token],
                    out,
                );
            }
        }

        /// Products of `H` queries with `B` vectors of keys, from the vector `first` of their scores on. Those of even
        /// channels and of others are summed apart, so that there are enough sums to keep the units busy.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply<const C: usize, const H: usize, const B: usize>(
            q: &[Wide<C>; H],
            keys: [[&Turned<C>; WIDE]; B],
            scores: &mut Scores,
            first: usize,
        ) -> usize {
            let mut sums = [[[v::splat(0.0); H]; B]; 2];
            for i in 0..C {
                for pair in 0..v::LANES / 2 {
                    for odd in 0..2 {
                        let c = 2 * pair + odd;
                        for b in 0..B {
                            let key = v::join(keys[b].each_ref().map(|eight| &eight[i][c]));
                            for h in 0..H {
                                sums[odd][b][h] =
                                    v::fma(v::splat(q[h][i][c]), key, sums[odd][b][h]);
                            }
                        }
                    }
                }
            }
            for b in 0..B {
                for h in 0..H {
                    v::store(
                        v::add(sums[0][b][h], sums[1][b][h]),
                        &mut scores[h][first + b],
                    );
                }
            }
            B
        }

        /// `out = out * shrink + weights * values`.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_values<const C: usize, const H: usize>(
            eights: &[u8],
            values: &[[Wide<C>; EIGHT]],
            weights: &Scores,
            shrink: [v::V; H],
            out: &mut [Wide<C>; H],
        ) {
            for part in 0..C / DEEP {
                let mut sums = [[v::splat(0.0); DEEP]; H];
                for h in 0..H {
                    for d in 0..DEEP {
                        sums[h][d] = v::mul(v::load(&out[h][part * DEEP + d]), shrink[h]);
                    }
                }
                for (i, eight) in eights.iter().enumerate() {
                    let values = &values[usize::from(*eight)];
                    let weights: [&[f32; EIGHT]; H] =
                        std::array::from_fn(|h| &weights[h].as_flattened().as_chunks().0[i]);
                    for key in 0..EIGHT {
                        for d in 0..DEEP {
                            let value = v::load(&values[key][part * DEEP + d]);
                            for h in 0..H {
                                sums[h][d] = v::fma(v::splat(weights[h][key]), value, sums[h][d]);
                            }
                        }
                    }
                }
                for h in 0..H {
                    for d in 0..DEEP {
                        v::store(sums[h][d], &mut out[h][part * DEEP + d]);
                    }
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use attend_chosen;
