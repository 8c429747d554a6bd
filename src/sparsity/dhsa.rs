//! DHSA (dynamic hierarchical sparse attention, arXiv:2510.24606): keys in chunks, chunks by a score, the best of them up to
//! a budget.
//!
//! A chunk of `n` keys is represented by their mean times `sqrt(n)`: the mean of `n` unlike keys shrinks as `1 / sqrt(n)`,
//! so short and long chunks compete alike. Its score is the product with the mean of the queries, of those that share a
//! head of keys or, as published, of all; every key has the score of its chunk, so whole chunks are read from the best on
//! and the last one is cut at its end. The first keys, the last, and the chunk that is not complete are always read.
//!
//! What differs from the published code, and why: there a block of 128 queries shares a plan, so a token's result depends
//! on tokens after it, and the question at the end of a prompt drowns in what stands before it; the last 64 tokens and all
//! decoding are dense. Here each token has its own plan, when read and when decoded, and nothing is dense. Boundaries
//! need no trained predictor: chunks end after a fixed number of keys (as in the authors' later version), where keys
//! shift the most, or where what the predictor would learn says so: where later queries, of which a sample is asked, attend
//! to the keys on one side the most times as much as to those on the other. With a
//! [predictor](crate::backend::predictor) they end where it says, in each layer by the layer's own keys; published, the
//! first layer's boundaries serve all.
//!
//! What was tried for facts far back, SmolLM2-135M over 8,000 tokens, 1,792 keys a token: the share of the attention that
//! questions give to a fact which is read (numbers of keys and queries recorded from a dense run). Chunks of 16 by the mean
//! of queries 0.74, by votes 0.80, by bounds from the least and the most of each channel (Quest) 0.81, by means and
//! variances 0.80, by four means of 4 keys 0.90; chunks of 8 by votes 0.92, by the best query 0.91, by the mean of queries
//! 0.88; chunks of 4 0.95; by the keys themselves 0.96 to 0.97. So it is the size of what is averaged that loses facts. A
//! threshold on a chunk's share of attention in place of a budget keeps more attention and loses the facts (0.74).
//! Half of what chunks of 8 lose is lost in two layers of 30, the first and the eighth, where attention goes to
//! single keys: with the eighth dense and a budget that grows with what is seen, facts are found as densely.

use std::ops::Range;

use super::{Sparsity, dot, max};
use crate::backend::cpu::ranking::{Sides, order, score};
use crate::backend::cpu::table::Ranking;
use crate::backend::select::{Ask, Chunking, Plan, Select};

/// Who shares a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Heads {
    /// Each head of keys has its own.
    #[default]
    Each,
    /// All have the same, of means over heads.
    Shared,
    /// Each has its own, by the probabilities that its queries give to chunks, summed: a query that looks for one thing
    /// is not lost in the mean with others.
    Vote,
    /// Each has its own, by the query that wants a chunk most: whose score of it is nearest to that of its best chunk. As
    /// good as votes, without a power for each chunk and query.
    Best,
}

/// See [`Select::select`](crate::backend::select::Select::select).
pub(super) fn select(
    sparsity: &Sparsity,
    (chunking, heads): (Chunking, Heads),
    ask: &Ask,
    plan: &mut Plan,
) {
    let seen = &ask.seen;
    let chunks = &ask.chunks.chunks()[..ask.chunks.n_known(seen.end)];
    let complete = chunks.last().map_or(0, |chunk| chunk.end as usize);
    let sink = sparsity.sink.clamp(seen.start, seen.end);
    let local = seen.end.saturating_sub(sparsity.local).min(complete);
    let local = local.max(sink);
    // Chunks with keys between the first and the last.
    let between = chunks.partition_point(|c| c.end as usize <= sink)
        ..chunks.partition_point(|c| (c.start as usize) < local);
    rank(sparsity, (chunking, heads), ask, between.end, plan);
    let ranking = Ranking::best();
    let keys = |i: usize| {
        let chunk = &chunks[i];
        (chunk.start as usize).max(sink)..(chunk.end as usize).min(local)
    };
    let always = sink - seen.start + seen.end - local;
    let left = sparsity.budget_of(seen.len()).saturating_sub(always);
    let n_keys = |i: usize| keys(between.start + i).len();
    plan.push(seen.start..sink);
    let all = std::mem::take(&mut plan.keys);
    let mut words = std::mem::take(&mut plan.words);
    let of = &all[between.start..];
    // What lies on the sides of a score, and the keys of chunks with it or more.
    let divide = |at: i32| {
        let mut sides = Sides::default();
        ranking.divide.run(of, at, &mut sides);
        let n_above = match chunking {
            // All but the first and the last are whole.
            Chunking::Fixed(n) => {
                let missing = |i: usize| match of.get(i).is_some_and(|key| *key >= at) {
                    true => n - n_keys(i),
                    false => 0,
                };
                let last = (of.len() > 1).then(|| missing(of.len() - 1));
                n * sides.n - missing(0) - last.unwrap_or(0)
            }
            Chunking::Shift(_) | Chunking::Labels(_) | Chunking::Predict(_) => {
                let chosen = (0..of.len()).filter(|i| of[*i] >= at);
                chosen.map(n_keys).sum()
            }
        };
        (n_above, sides)
    };
    let few = match chunking {
        Chunking::Fixed(n) => n,
        Chunking::Shift(n) | Chunking::Labels(n) | Chunking::Predict(n) => n / 2,
    };
    if let Some((least, above)) = least_read(left, few, &divide) {
        let n_words = of.len().div_ceil(u64::BITS as usize);
        words.clear();
        words.resize(2 * n_words, 0);
        let (marked, better) = words.split_at_mut(n_words);
        ranking.mark.run(of, least, marked);
        if let Some(next) = least.checked_add(1) {
            ranking.mark.run(of, next, better);
        }
        let (last, n_cut) = cut(marked, better, left - above, &n_keys);
        for_runs(marked, &mut |run| {
            let keys_of = |run: Range<usize>| {
                keys(between.start + run.start).start..keys(between.start + run.end - 1).end
            };
            if n_cut == 0 || !run.contains(&last) {
                plan.push(keys_of(run));
                return;
            }
            let cut = keys_of(run.start..last + 1);
            plan.push(cut.start..cut.end - n_cut);
            if last + 1 < run.end {
                plan.push(keys_of(last + 1..run.end));
            }
        });
    }
    (plan.keys, plan.words) = (all, words);
    plan.push(local..seen.end);
}

/// The least score of which chunks are read, and the keys of chunks with more: the greatest with which there are `left`
/// keys, or that of all. `divide` tells the keys of chunks from a score on, and the scores on its sides; all chunks but
/// the first and the last have at least `few`. `None`: no chunk is read.
fn least_read(
    left: usize,
    few: usize,
    divide: &dyn Fn(i32) -> (usize, Sides),
) -> Option<(i32, usize)> {
    let (n_all, all) = divide(i32::MIN);
    if all.n == 0 || left == 0 {
        return None;
    }
    let (_, best) = divide(i32::MAX);
    // From `low` on there are `n_low`, enough; from above `high` on `n_high`, too few.
    let (mut low, mut n_low) = (all.least, n_all);
    let (mut high, mut n_high) = match best.n {
        0 => (best.most, 0),
        _ => (best.least, 0),
    };
    let mut step = 0;
    while low < high && n_low >= left + few {
        let share = (n_low - left) as f32 / (n_low - n_high) as f32;
        match divide(between(step, (low, high), share)) {
            (n, sides) if n >= left => (low, n_low) = (sides.least, n),
            (n, sides) => (high, n_high) = (sides.most, n),
        }
        step += 1;
    }
    // A short one may not be needed.
    while low < high {
        let (n, sides) = divide(low + 1);
        if n < left {
            return Some((low, n));
        }
        low = sides.least;
    }
    Some((low, n_high))
}

/// Leaves of the chunks in `marked` that are not in `better`, all of one score, the first with `left` keys in all. Returns
/// the last of them, and how many keys at its end are too many.
fn cut(
    marked: &mut [u64],
    better: &[u64],
    mut left: usize,
    n_keys: &dyn Fn(usize) -> usize,
) -> (usize, usize) {
    let (mut last, mut n_cut) = (0, 0);
    for (word, (marked, better)) in marked.iter_mut().zip(better).enumerate() {
        let mut equal = *marked & !*better;
        while equal != 0 {
            let bit = equal.trailing_zeros();
            equal &= equal - 1;
            if left == 0 {
                *marked &= !(1 << bit);
                continue;
            }
            last = word * u64::BITS as usize + bit as usize;
            n_cut = n_keys(last).saturating_sub(left);
            left -= n_keys(last) - n_cut;
        }
    }
    (last, n_cut)
}

/// A number above `low`, and up to `high`, where to look next: by turns at `share` of the scores between, halfway of them,
/// and halfway of the numbers, so that it takes few steps whatever the scores are like.
fn between(step: usize, (low, high): (i32, i32), share: f32) -> i32 {
    let [from, to] = [low, high].map(score);
    let guess = match step % 3 {
        0 => from + share * (to - from),
        1 => from + 0.5 * (to - from),
        _ => f32::NAN,
    };
    let halfway = high - ((i64::from(high) - i64::from(low)) / 2) as i32;
    match guess.is_nan() {
        true => halfway,
        false => order(guess).clamp(low + 1, high),
    }
}

/// Calls `push` with each run of bits that are set.
fn for_runs(words: &[u64], push: &mut dyn FnMut(Range<usize>)) {
    for (word, mut bits) in words.iter().copied().enumerate() {
        let mut at = word * u64::BITS as usize;
        while bits != 0 {
            at += bits.trailing_zeros() as usize;
            bits >>= bits.trailing_zeros();
            let n = bits.trailing_ones();
            push(at..at + n as usize);
            at += n as usize;
            bits = bits.checked_shr(n).unwrap_or(0);
        }
    }
}

/// `plan.keys`: the ranks of the first `n` chunks, the greater, the better.
fn rank(
    sparsity: &Sparsity,
    (chunking, heads): (Chunking, Heads),
    ask: &Ask,
    n: usize,
    plan: &mut Plan,
) {
    let group = ask.attention.n_heads / ask.attention.n_kv_heads;
    plan.scores.clear();
    plan.scores.resize(n, 0.0);
    match heads {
        Heads::Each if sparsity.sums_queries() => products(chunking, ask, 0, &mut plan.scores),
        Heads::Each => {
            for query in 0..group {
                plan.weights.clear();
                plan.weights.resize(n, 0.0);
                products(chunking, ask, query, &mut plan.weights);
                let scores = plan.scores.iter_mut().zip(&plan.weights);
                scores.for_each(|(score, product)| *score += product);
            }
        }
        Heads::Shared => add_shared(ask, plan),
        Heads::Vote => {
            for query in 0..group {
                add_probabilities(chunking, ask, query, plan);
            }
        }
        Heads::Best => {
            plan.keys.clear();
            plan.keys.resize(n, i32::MIN);
            for query in 0..group {
                // A factor that all chunks share changes no order.
                let products = match chunking {
                    Chunking::Fixed(_) => &ask.scores(query)[..n],
                    Chunking::Shift(_) | Chunking::Labels(_) | Chunking::Predict(_) => {
                        plan.scores.fill(0.0);
                        products(chunking, ask, query, &mut plan.scores);
                        &plan.scores
                    }
                };
                Ranking::best().rank.run(products, &mut plan.keys);
            }
            return;
        }
    }
    plan.keys.clear();
    plan.keys.extend(plan.scores.iter().copied().map(order));
}

/// Adds the products of the sum of all queries with the sum over heads of the representations of chunks. Sums in place
/// of means: a factor that all chunks share.
fn add_shared(ask: &Ask, plan: &mut Plan) {
    let head_dim = ask.attention.head_dim;
    plan.weights.clear();
    plan.weights.resize(head_dim, 0.0);
    for q in ask.q.chunks_exact(head_dim) {
        let sums = plan.weights.iter_mut().zip(q);
        sums.for_each(|(sum, q)| *sum += q);
    }
    for kv_head in 0..ask.attention.n_kv_heads {
        let sums = ask.chunks.sums(kv_head).chunks_exact(head_dim);
        let chunks = sums.zip(ask.chunks.chunks());
        for (score, (sum, chunk)) in plan.scores.iter_mut().zip(chunks) {
            *score += dot(&plan.weights, sum) / (chunk.n_keys() as f32).sqrt();
        }
    }
}

/// Adds the softmax over chunks of the products of one query with their representations.
fn add_probabilities(chunking: Chunking, ask: &Ask, query: usize, plan: &mut Plan) {
    plan.weights.clear();
    plan.weights.resize(plan.scores.len(), 0.0);
    products(chunking, ask, query, &mut plan.weights);
    let max = max(&plan.weights);
    let mut total = 0.0;
    for weight in &mut plan.weights {
        *weight = (*weight - max).exp();
        total += *weight;
    }
    let inverse = 1.0 / total;
    let scores = plan.scores.iter_mut().zip(&plan.weights);
    scores.for_each(|(score, weight)| *score += weight * inverse);
}

/// `q . k` for each chunk, `k = mean * sqrt(n) = sum / sqrt(n)`, from the products with its sum.
fn products(chunking: Chunking, ask: &Ask, query: usize, out: &mut [f32]) {
    let scores = out.iter_mut().zip(ask.scores(query));
    match chunking {
        Chunking::Fixed(n) => {
            let factor = 1.0 / (n as f32).sqrt();
            scores.for_each(|(out, score)| *out = score * factor);
        }
        Chunking::Shift(_) | Chunking::Labels(_) | Chunking::Predict(_) => {
            for ((out, score), chunk) in scores.zip(ask.chunks.chunks()) {
                *out = score / (chunk.n_keys() as f32).sqrt();
            }
        }
    }
}
