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
use crate::backend::cpu::ranking::order;
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
    let count = |least: i32, of: &[i32]| match chunking {
        // All but the first and the last are whole.
        Chunking::Fixed(n) => {
            let mut n_chosen = 0;
            ranking.count.run(of, least, &mut n_chosen);
            let missing = |i: usize| match of.get(i).is_some_and(|key| *key >= least) {
                true => n - n_keys(i),
                false => 0,
            };
            let ends = if of.len() > 1 {
                missing(of.len() - 1)
            } else {
                0
            };
            n * n_chosen - missing(0) - ends
        }
        Chunking::Shift(_) | Chunking::Labels(_) | Chunking::Predict(_) => {
            let chosen = (0..of.len()).filter(|i| of[*i] >= least);
            chosen.map(n_keys).sum()
        }
    };
    let few = match chunking {
        Chunking::Fixed(n) => n,
        Chunking::Shift(n) | Chunking::Labels(n) | Chunking::Predict(n) => n / 2,
    };
    plan.push(seen.start..sink);
    let all = std::mem::take(&mut plan.keys);
    let mut words = std::mem::take(&mut plan.words);
    let of = &all[between.start..];
    if let Some(cut) = Cut::find(of, (left, few), &count, &n_keys) {
        let (first, rest) = of.split_at(cut.last + 1);
        let mut push_from = |at: usize, of: &[i32], least: i32, plan: &mut Plan| {
            words.clear();
            words.resize(of.len().div_ceil(u64::BITS as usize), 0);
            ranking.mark.run(of, least, &mut words);
            for_runs(&words, &mut |run| {
                plan.push(keys(at + run.start).start..keys(at + run.end - 1).end);
            });
        };
        push_from(between.start, first, cut.least, plan);
        if let Some(span) = plan.spans.last_mut() {
            span.end -= cut.n_cut;
        }
        let at = between.start + first.len();
        push_from(at, rest, cut.least.saturating_add(1), plan);
    }
    (plan.keys, plan.words) = (all, words);
    plan.push(local..seen.end);
}

/// Where chunks that are read end in the order of their scores.
struct Cut {
    /// The least score that is read, as [`order`] has it.
    least: i32,
    /// The last chunk of that score that is read,
    last: usize,
    /// but for so many keys at its end.
    n_cut: usize,
}

impl Cut {
    /// The best chunks of `of` with `left` keys in all, of equals the first; `None` for none. `count` tells the keys of
    /// those from a score on, `n_keys` those of one; all but the first and the last have at least `few`.
    fn find(
        of: &[i32],
        (left, few): (usize, usize),
        count: &dyn Fn(i32, &[i32]) -> usize,
        n_keys: &dyn Fn(usize) -> usize,
    ) -> Option<Self> {
        let (worst, best) = of.iter().fold((i32::MAX, i32::MIN), |(least, most), key| {
            (least.min(*key), most.max(*key))
        });
        if of.is_empty() || left == 0 {
            return None;
        }
        // From `low` on there are `left` keys, and so many more, or all; from above `high` fewer.
        let (mut low, mut high, mut more) = (worst, best, usize::MAX);
        while low < high && more >= few {
            // Halfway, rounded up.
            let middle = high - ((i64::from(high) - i64::from(low)) / 2) as i32;
            match count(middle, of).checked_sub(left) {
                Some(found) => (low, more) = (middle, found),
                None => high = middle - 1,
            }
        }
        // The least there is from there on, unless it is a short one that is not needed.
        let above = loop {
            low = of
                .iter()
                .map(|key| if *key >= low { *key } else { best })
                .fold(best, i32::min);
            let above = low.checked_add(1).map_or(0, |above| count(above, of));
            if above < left {
                break above;
            }
            low += 1;
        };
        let mut left = left - above;
        let mut cut = None;
        for i in (0..of.len()).filter(|i| of[*i] == low) {
            let n_cut = n_keys(i).saturating_sub(left);
            left -= n_keys(i) - n_cut;
            cut = Some(Self {
                least: low,
                last: i,
                n_cut,
            });
            if left == 0 {
                break;
            }
        }
        cut
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
