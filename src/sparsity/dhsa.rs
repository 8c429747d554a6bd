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
//! need no trained predictor: chunks end after a fixed number of keys (as in the authors' later version) or where keys
//! shift the most.
//!
//! What was tried for facts far back, SmolLM2-135M over 8,000 tokens, 1,792 keys a token: the share of the attention that
//! questions give to a fact which is read (numbers of keys and queries recorded from a dense run). Chunks of 16 by the mean
//! of queries 0.74, by votes 0.80, by bounds from the least and the most of each channel (Quest) 0.81, by means and
//! variances 0.80, by four means of 4 keys 0.90; chunks of 8 by votes 0.92, by the best query 0.91, by the mean of queries
//! 0.88; chunks of 4 0.95; by the keys themselves 0.96 to 0.97. So it is the size of what is averaged that loses facts. A
//! threshold on a chunk's share of attention in place of a budget keeps more attention and loses the facts (0.74).

use super::{Sparsity, at_place, dot, max, place};
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
    score(sparsity, (chunking, heads), ask, between.end, plan);
    let keys = |i: usize| {
        let chunk = &chunks[i];
        (chunk.start as usize).max(sink)..(chunk.end as usize).min(local)
    };
    plan.order.clear();
    let places = between.clone().map(|i| place(&plan.scores, i));
    plan.order.extend(places);
    let always = sink - seen.start + seen.end - local;
    let mut left = sparsity.budget_of(seen.len()).saturating_sub(always);
    // So many are certain to fit; then as many more as are certain to fit into what is left.
    // The last of them may be cut.
    let (mut last, mut n_cut) = (0, 0);
    let mut order = &mut plan.order[..];
    while left > 0 && !order.is_empty() {
        let k = (left / chunking.most()).max(1).min(order.len());
        last = *order.select_nth_unstable(k - 1).1;
        let (read, rest) = order.split_at_mut(k);
        for place in read {
            let n_keys = keys(at_place(*place)).len();
            n_cut = n_keys.saturating_sub(left);
            left -= n_keys - n_cut;
        }
        order = rest;
    }
    plan.push(seen.start..sink);
    for i in between {
        let place = place(&plan.scores, i);
        if place <= last {
            let span = keys(i);
            let n_cut = if place == last { n_cut } else { 0 };
            plan.push(span.start..span.end - n_cut);
        }
    }
    plan.push(local..seen.end);
}

/// `plan.scores`: of the first `n` chunks.
fn score(
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
            plan.scores.fill(f32::NEG_INFINITY);
            for query in 0..group {
                plan.weights.clear();
                plan.weights.resize(n, 0.0);
                products(chunking, ask, query, &mut plan.weights);
                let best = max(&plan.weights);
                for (score, product) in plan.scores.iter_mut().zip(&plan.weights) {
                    let below = product - best;
                    *score = if below > *score { below } else { *score };
                }
            }
        }
    }
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
        Chunking::Shift(_) => {
            for ((out, score), chunk) in scores.zip(ask.chunks.chunks()) {
                *out = score / (chunk.n_keys() as f32).sqrt();
            }
        }
    }
}
