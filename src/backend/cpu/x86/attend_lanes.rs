//! Attention of a batch with queries in the lanes, scores from differences of keys where asked, over a level's vectors.

/// Defines the kernel of a level.
///
/// Queries lie in the lanes, so a score of all of them is some vectors, and no softmax crosses lanes: on an EPYC with
/// AVX-512 a prompt of 4,096 tokens of SmolLM2-135M is read 1.4 times as fast as with keys in the lanes. Along a frame the
/// scores of a key are those of the key before and the products with what changed: the sums are never cleared. Where that
/// does not pay, or for queries near the frame, they are whole products. What a query gets does not depend on which others
/// are beside it.
macro_rules! attend_lanes {
    ($features:literal, $below:ident) => {
        /// Vectors of queries in a tile.
        const WIDTH: usize = 4;

        /// Keys that are weighted together.
        const KEYS: usize = 32;

        /// Keys, or elements of values, that are summed together.
        const DEEP: usize = v::LANES / 4;

        /// A number for each query of a tile.
        type Row = [[f32; v::LANES]; WIDTH];

        /// Keys or values, `C` vectors each.
        type Tile<const C: usize> = [[[f32; v::LANES]; C]; KEYS];

        /// The keys of a frame, their values, and what changes from key to key.
        struct Frame<'a, const C: usize> {
            start: usize,
            n_keys: usize,
            keys: &'a [Tile<C>],
            values: &'a [Tile<C>],
            /// Where the changes of each key end; none where they do not pay.
            ends: Option<&'a [u32]>,
            channels: &'a [u8],
            changes: &'a [f32],
            /// From this position on queries may take the changes.
            far: usize,
        }

        /// Queries of a tile, turned: `(head_dim)` rows; and their sums.
        struct Queries<'a> {
            /// Of the first, among all of the batch.
            first: usize,
            n: usize,
            q: &'a [Row],
            out: &'a mut [Row],
            max: &'a mut Row,
            sum: &'a mut Row,
        }

        /// See [`LanesBatch`].
        #[target_feature(enable = $features)]
        pub(crate) fn attend(batch: &mut LanesBatch) {
            match (batch.attend.head_dim, batch.chosen) {
                (64, None) => heads::<{ 64 / v::LANES }>(batch),
                (128, None) => heads::<{ 128 / v::LANES }>(batch),
                (256, None) => heads::<{ 256 / v::LANES }>(batch),
                (64, Some(of)) => chosen::attend::<{ 64 / v::LANES }>(batch, of),
                (128, Some(of)) => chosen::attend::<{ 128 / v::LANES }>(batch, of),
                (256, Some(of)) => chosen::attend::<{ 256 / v::LANES }>(batch, of),
                _ => $below::attend(batch),
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn heads<const C: usize>(batch: &mut LanesBatch) {
            let n = C * v::LANES;
            let (group, start) = (batch.attend.group, batch.attend.start);
            let n_tokens = batch.attend.out.n_tokens();
            let n_queries = n_tokens * group;
            let queries = WIDTH * v::LANES;
            let done = &mut batch.done;
            let mut room = &mut *batch.room;
            let mut take = |floats: usize| {
                let (taken, rest) = std::mem::take(&mut room).split_at_mut(floats);
                room = rest;
                taken
            };
            let tile_floats = (2 * n + 2) * queries;
            let tiles = take(n_queries.div_ceil(queries) * tile_floats);
            let keys = take(batch.frame * n).as_chunks_mut::<{ v::LANES }>().0;
            let keys = keys.as_chunks_mut::<C>().0.as_chunks_mut::<KEYS>().0;
            let values = take(batch.frame * n).as_chunks_mut::<{ v::LANES }>().0;
            let values = values.as_chunks_mut::<C>().0.as_chunks_mut::<KEYS>().0;
            let changes = take(batch.frame * n + v::LANES);
            let ends: &mut [u32] = bytemuck::cast_slice_mut(take(batch.frame));
            let channels: &mut [u8] =
                bytemuck::cast_slice_mut(take(batch.frame * n / 4 + v::LANES));

            for (i, floats) in tiles.chunks_exact_mut(tile_floats).enumerate() {
                let rows = floats
                    .as_chunks_mut::<{ v::LANES }>()
                    .0
                    .as_chunks_mut::<WIDTH>()
                    .0;
                let these = i * queries..n_queries.min((i + 1) * queries);
                turn(&batch.attend, these, &mut rows[..n]);
                rows[n..2 * n].fill([[0.0; v::LANES]; WIDTH]);
                rows[2 * n] = [[f32::NEG_INFINITY; v::LANES]; WIDTH];
                rows[2 * n + 1] = [[0.0; v::LANES]; WIDTH];
            }
            let end = start + n_tokens;
            let window = batch.attend.window.unwrap_or(usize::MAX);
            let mut at = (start + 1).saturating_sub(window) / batch.frame * batch.frame;
            while at < end {
                let n_keys = batch.frame.min(end - at);
                let page = (at - batch.attend.first) / batch.attend.page;
                let in_page = (at - batch.attend.first) % batch.attend.page;
                for (tile, first) in (0..n_keys).step_by(KEYS).enumerate() {
                    let span = in_page + first..in_page + n_keys.min(first + KEYS);
                    widen(batch.attend.keys[page], n, span.clone(), &mut keys[tile]);
                    widen(batch.attend.values[page], n, span, &mut values[tile]);
                }
                let far = match batch.most > 0 && at >= batch.sink {
                    true => batch.exact.is_past(at + batch.frame),
                    false => usize::MAX,
                };
                // Then no key of it is missing, whichever the exact ones are.
                let differs = far < end && {
                    let most = batch.most;
                    encode(keys, batch.thresholds, most, changes, channels, ends, done)
                };
                let frame = Frame {
                    start: at,
                    n_keys,
                    keys: &*keys,
                    values: &*values,
                    ends: differs.then_some(&*ends),
                    channels: &*channels,
                    changes: &*changes,
                    far,
                };
                for (i, floats) in tiles.chunks_exact_mut(tile_floats).enumerate() {
                    let rows = floats
                        .as_chunks_mut::<{ v::LANES }>()
                        .0
                        .as_chunks_mut::<WIDTH>()
                        .0;
                    let (q, rest) = rows.split_at_mut(n);
                    let (out, rest) = rest.split_at_mut(n);
                    let [max, sum] = rest else {
                        unreachable!("two rows")
                    };
                    let first = i * queries;
                    let n = queries.min(n_queries - first);
                    let queries = Queries {
                        first,
                        n,
                        q,
                        out,
                        max,
                        sum,
                    };
                    // Few queries are not worth a whole tile.
                    let attend = &batch.attend;
                    match n.div_ceil(v::LANES) {
                        1 => add_frame::<C, 1>(attend, done, &frame, queries),
                        2 => add_frame::<C, 2>(attend, done, &frame, queries),
                        _ => add_frame::<C, WIDTH>(attend, done, &frame, queries),
                    }
                }
                at += batch.frame;
            }
            for (i, floats) in tiles.chunks_exact(tile_floats).enumerate() {
                let rows = floats.as_chunks::<{ v::LANES }>().0.as_chunks::<WIDTH>().0;
                for lane in 0..queries.min(n_queries - i * queries) {
                    let query = i * queries + lane;
                    let (token, head) = (query / group, query % group);
                    let inverse = 1.0 / rows[2 * n + 1].as_flattened()[lane];
                    let out = &mut batch.attend.out.row(token)[head * n..][..n];
                    for (c, out) in out.iter_mut().enumerate() {
                        *out = rows[n + c].as_flattened()[lane] * inverse;
                    }
                }
            }
        }

        /// Some queries, scaled and turned; zeros beyond the last.
        #[inline]
        #[target_feature(enable = $features)]
        fn turn(attend: &AttendBatch, queries: Range<usize>, q: &mut [Row]) {
            for lane in 0..WIDTH * v::LANES {
                let query = queries.start + lane;
                let at = query / attend.group * attend.q_stride + query % attend.group * q.len();
                for c in 0..q.len() {
                    q[c].as_flattened_mut()[lane] = match query < queries.end {
                        true => attend.q[at + c] * attend.scale,
                        false => 0.0,
                    };
                }
            }
        }

        /// What changes from key to key of a whole frame; `false` if more than `most`.
        #[inline]
        #[target_feature(enable = $features)]
        fn encode<const C: usize>(
            keys: &[Tile<C>],
            thresholds: &[f32],
            most: usize,
            changes: &mut [f32],
            channels: &mut [u8],
            ends: &mut [u32],
            done: &mut DeltaWork,
        ) -> bool {
            let thresholds = thresholds.as_chunks::<{ v::LANES }>().0;
            assert!(thresholds.len() == C && keys.len() * KEYS == ends.len());
            let mut held = [v::splat(0.0); C];
            let mut n = 0;
            for (j, key) in keys.as_flattened().iter().enumerate() {
                for i in 0..C {
                    // Nothing is held before the first: all of it is new.
                    let threshold = match j {
                        0 => v::splat(-1.0),
                        _ => v::load(&thresholds[i]),
                    };
                    let changed;
                    (held[i], changed) = v::changes(
                        (v::load(&key[i]), held[i], threshold),
                        i * v::LANES,
                        changes[n..]
                            .first_chunk_mut()
                            .expect("room for all channels"),
                        channels[n..]
                            .first_chunk_mut()
                            .expect("room for all channels"),
                    );
                    n += changed;
                }
                ends[j] = n as u32;
                if n > most {
                    done.elements += ((j + 1) * C * v::LANES) as u64;
                    done.changes += n as u64;
                    return false;
                }
            }
            done.elements += (ends.len() * C * v::LANES) as u64;
            done.changes += n as u64;
            true
        }

        /// Adds a frame to the sums of some queries, `N` vectors of them.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_frame<const C: usize, const N: usize>(
            attend: &AttendBatch,
            done: &mut DeltaWork,
            frame: &Frame<C>,
            queries: Queries,
        ) {
            let (start, group) = (attend.start, attend.group);
            let window = attend.window.unwrap_or(usize::MAX);
            // The first lane of those whose positions are at least some position.
            let lane = |position: usize| {
                let query = position.saturating_sub(start).saturating_mul(group);
                query.saturating_sub(queries.first).min(queries.n)
            };
            let position = |lane: usize| start + (queries.first + lane) / group;
            let (oldest, newest) = (position(0), position(queries.n - 1));
            if frame.start > newest
                || frame.start + frame.n_keys + window.min(1 << 40) <= oldest + 1
            {
                return;
            }
            let far = lane(frame.far);
            let near = match frame.ends {
                Some(_) => far,
                None => queries.n,
            };
            let mut running = [[0.0; v::LANES]; WIDTH];
            let mut scores = [[[0.0; v::LANES]; WIDTH]; KEYS];
            let mut exact = scores;
            for first in (0..frame.n_keys).step_by(KEYS) {
                let keys = first..frame.n_keys.min(first + KEYS);
                let n_keys = keys.len();
                let tile = first / KEYS;
                let begin = frame.start + first;
                match (near, frame.ends) {
                    (0, Some(ends)) => {
                        let changes = (frame.channels, frame.changes, ends);
                        add_changes::<N>(
                            queries.q,
                            changes,
                            keys.clone(),
                            &mut running,
                            &mut scores,
                        );
                    }
                    (near, Some(ends)) if near < queries.n => {
                        let changes = (frame.channels, frame.changes, ends);
                        add_changes::<N>(
                            queries.q,
                            changes,
                            keys.clone(),
                            &mut running,
                            &mut scores,
                        );
                        multiply::<C, N>(queries.q, &frame.keys[tile], n_keys, &mut exact);
                        for (score, exact) in scores.iter_mut().zip(&exact) {
                            let exact = &exact.as_flattened()[..near];
                            score.as_flattened_mut()[..near].copy_from_slice(exact);
                        }
                    }
                    _ => multiply::<C, N>(queries.q, &frame.keys[tile], n_keys, &mut scores),
                }
                let end = begin + n_keys;
                let all = end <= oldest + 1 && newest < begin.saturating_add(window);
                let visible = |key: usize| match all {
                    true => 0..queries.n,
                    false => lane(begin + key)..lane((begin + key).saturating_add(window)),
                };
                if !all {
                    for key in 0..n_keys {
                        let seen = visible(key);
                        for w in 0..N {
                            let inside =
                                |l: usize| l.clamp(w * v::LANES, (w + 1) * v::LANES) - w * v::LANES;
                            // Lanes beyond the last query see what it sees.
                            let seen_end = match seen.end == queries.n {
                                true => WIDTH * v::LANES,
                                false => seen.end,
                            };
                            let score = &mut scores[key][w];
                            v::store(
                                v::only(v::load(score), inside(seen.start), inside(seen_end)),
                                score,
                            );
                        }
                    }
                }
                let n = (C * v::LANES) as u64;
                for key in 0..n_keys {
                    let seen = visible(key);
                    let exact = seen.start.min(near)..seen.end.min(near);
                    let (pairs, exact) = (seen.len() as u64, exact.len() as u64);
                    let changed = frame.ends.map_or(0, |ends| {
                        let before = (first + key)
                            .checked_sub(1)
                            .map_or(0, |before| ends[before]);
                        u64::from(ends[first + key] - before)
                    });
                    done.dense += pairs * n;
                    done.far += (seen.end.max(far) - seen.start.max(far)) as u64 * n;
                    done.done += exact * n + (pairs - exact) * changed;
                }
                let scores = &mut scores[..n_keys];
                let mut tops = [v::splat(0.0); N];
                for w in 0..N {
                    tops[w] = v::load(&queries.max[w]);
                    for score in scores.iter() {
                        tops[w] = v::max(tops[w], v::load(&score[w]));
                    }
                }
                let shrink = weigh::<N>(scores, tops, queries.max, queries.sum);
                add_values::<C, N>(scores, &frame.values[tile], &shrink, queries.out);
            }
        }

        /// Products of all channels with the first `n_keys` of a tile, and some after them.
        #[inline]
        #[target_feature(enable = $features)]
        fn multiply<const C: usize, const N: usize>(
            q: &[Row],
            keys: &Tile<C>,
            n_keys: usize,
            scores: &mut [Row; KEYS],
        ) {
            let scores = scores.as_chunks_mut::<DEEP>().0;
            let keys = keys.as_chunks::<DEEP>().0;
            // One vector of queries needs more sums than a group has to keep the units busy.
            let at_once = if N == 1 { 2 } else { 1 };
            for at in (0..n_keys.div_ceil(DEEP)).step_by(at_once) {
                match N {
                    1 => {
                        let keys = [&keys[at], &keys[at + 1]];
                        multiply_groups::<C, N, 2>(q, keys, &mut scores[at..at + 2]);
                    }
                    _ => {
                        let keys = [&keys[at]];
                        multiply_groups::<C, N, 1>(q, keys, &mut scores[at..=at]);
                    }
                }
            }
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn multiply_groups<const C: usize, const N: usize, const G: usize>(
            q: &[Row],
            keys: [&[[[f32; v::LANES]; C]; DEEP]; G],
            scores: &mut [[Row; DEEP]],
        ) {
            assert!(q.len() == C * v::LANES);
            let mut sums = [[[v::splat(0.0); N]; DEEP]; G];
            for c in 0..C * v::LANES {
                let mut row = [v::splat(0.0); N];
                for w in 0..N {
                    row[w] = v::load(&q[c][w]);
                }
                for g in 0..G {
                    for b in 0..DEEP {
                        let key = v::splat(keys[g][b].as_flattened()[c]);
                        for w in 0..N {
                            sums[g][b][w] = v::fma(key, row[w], sums[g][b][w]);
                        }
                    }
                }
            }
            for g in 0..G {
                for b in 0..DEEP {
                    for w in 0..N {
                        v::store(sums[g][b][w], &mut scores[g][b][w]);
                    }
                }
            }
        }

        /// Scores of `keys` of a frame: to those of the key before, `running`, the products with what changed are added.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_changes<const N: usize>(
            q: &[Row],
            (channels, changes, ends): (&[u8], &[f32], &[u32]),
            keys: Range<usize>,
            running: &mut Row,
            scores: &mut [Row; KEYS],
        ) {
            let mut sums = [v::splat(0.0); N];
            for w in 0..N {
                sums[w] = v::load(&running[w]);
            }
            let mut at = keys
                .start
                .checked_sub(1)
                .map_or(0, |before| ends[before] as usize);
            for (end, score) in ends[keys].iter().zip(scores) {
                let these = at..*end as usize;
                for (channel, change) in channels[these.clone()].iter().zip(&changes[these]) {
                    let row = &q[usize::from(*channel)];
                    let change = v::splat(*change);
                    for w in 0..N {
                        sums[w] = v::fma(change, v::load(&row[w]), sums[w]);
                    }
                }
                at = *end as usize;
                for w in 0..N {
                    v::store(sums[w], &mut score[w]);
                }
            }
            for w in 0..N {
                v::store(sums[w], &mut running[w]);
            }
        }

        /// Scores to weights, of which and of those before `tops` are the largest. Returns the factors that what was summed
        /// before must take.
        #[inline]
        #[target_feature(enable = $features)]
        fn weigh<const N: usize>(
            scores: &mut [Row],
            tops: [v::V; N],
            max: &mut Row,
            sum: &mut Row,
        ) -> [v::V; N] {
            let mut shrink = [v::splat(0.0); N];
            for w in 0..N {
                let before = v::load(&max[w]);
                v::store(tops[w], &mut max[w]);
                // Of a query that sees nothing yet all scores are minus infinity, and so must be differences.
                let top = v::max(tops[w], v::splat(f32::MIN / 2.0));
                let mut total = v::splat(0.0);
                for score in scores.iter_mut() {
                    let weight = v::exp(v::sub(v::load(&score[w]), top));
                    total = v::add(total, weight);
                    v::store(weight, &mut score[w]);
                }
                shrink[w] = v::exp(v::sub(before, top));
                v::store(v::fma(v::load(&sum[w]), shrink[w], total), &mut sum[w]);
            }
            shrink
        }

        /// `out = out * shrink + weights * values`.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_values<const C: usize, const N: usize>(
            weights: &[Row],
            values: &Tile<C>,
            shrink: &[v::V; N],
            out: &mut [Row],
        ) {
            assert!(out.len() == C * v::LANES);
            match N {
                1 => add_elements::<C, N, 2>(weights, values, shrink, out),
                _ => add_elements::<C, N, 1>(weights, values, shrink, out),
            }
        }

        /// The same, `G` times `DEEP` elements at a time.
        #[inline]
        #[target_feature(enable = $features)]
        fn add_elements<const C: usize, const N: usize, const G: usize>(
            weights: &[Row],
            values: &Tile<C>,
            shrink: &[v::V; N],
            out: &mut [Row],
        ) {
            let groups = out.as_chunks_mut::<DEEP>().0.as_chunks_mut::<G>().0;
            for (at, out) in groups.iter_mut().enumerate() {
                let mut sums = [[[v::splat(0.0); N]; DEEP]; G];
                for g in 0..G {
                    for b in 0..DEEP {
                        for w in 0..N {
                            sums[g][b][w] = v::mul(v::load(&out[g][b][w]), shrink[w]);
                        }
                    }
                }
                for (weights, value) in weights.iter().zip(values) {
                    let mut weight = [v::splat(0.0); N];
                    for w in 0..N {
                        weight[w] = v::load(&weights[w]);
                    }
                    let value = &value
                        .as_flattened()
                        .as_chunks::<DEEP>()
                        .0
                        .as_chunks::<G>()
                        .0[at];
                    for g in 0..G {
                        for b in 0..DEEP {
                            let value = v::splat(value[g][b]);
                            for w in 0..N {
                                sums[g][b][w] = v::fma(value, weight[w], sums[g][b][w]);
                            }
                        }
                    }
                }
                for g in 0..G {
                    for b in 0..DEEP {
                        for w in 0..N {
                            v::store(sums[g][b][w], &mut out[g][b][w]);
                        }
                    }
                }
            }
        }
    };
}
pub(in crate::backend::cpu) use attend_lanes;
