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

use std::ops::Range;

use super::{Sparsity, best_first, dot};
use crate::backend::select::{Ask, Chunking, Plan};

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
    score(heads, ask, between.end, plan);
    let keys = |i: u32| {
        let chunk = &chunks[i as usize];
        (chunk.start as usize).max(sink)..(chunk.end as usize).min(local)
    };
    plan.order.clear();
    plan.order.extend(between.start as u32..between.end as u32);
    let always = sink - seen.start + seen.end - local;
    let mut left = sparsity.budget.saturating_sub(always);
    // So many are certain to fit; then as many more as are certain to fit into what is left.
    let (mut n, mut cut) = (0, None);
    while left > 0 && n < plan.order.len() {
        let order = &mut plan.order[n..];
        let k = (left / chunking.most()).max(1).min(order.len());
        best_first(order, &plan.scores, k);
        for &i in &order[..k] {
            let read = keys(i).len().min(left);
            if read < keys(i).len() {
                cut = Some((i, read));
            }
            left -= read;
        }
        n += k;
    }
    plan.order.truncate(n);
    plan.order.sort_unstable();
    plan.push(seen.start..sink);
    for at in 0..plan.order.len() {
        let i = plan.order[at];
        let span = keys(i);
        let end = match cut {
            Some((last, n)) if last == i => span.start + n,
            _ => span.end,
        };
        plan.push(span.start..end);
    }
    plan.push(local..seen.end);
}

/// `plan.scores`: of the first `n` chunks.
fn score(heads: Heads, ask: &Ask, n: usize, plan: &mut Plan) {
    let shape = ask.attention;
    let (group, head_dim) = (shape.n_heads / shape.n_kv_heads, shape.head_dim);
    let own = &ask.q[ask.kv_head * group * head_dim..][..group * head_dim];
    plan.scores.clear();
    plan.scores.resize(n, 0.0);
    match heads {
        Heads::Each => add_products(own, ask, ask.kv_head..ask.kv_head + 1, plan),
        Heads::Shared => add_products(ask.q, ask, 0..shape.n_kv_heads, plan),
        Heads::Vote => {
            for q in own.chunks_exact(head_dim) {
                add_probabilities(q, ask, plan);
            }
        }
    }
}

/// Adds the products of the sum of the queries `q` with the representations of chunks. Sums in place of means: a factor
/// that all chunks share.
fn add_products(q: &[f32], ask: &Ask, kv_heads: Range<usize>, plan: &mut Plan) {
    let head_dim = ask.attention.head_dim;
    plan.weights.clear();
    plan.weights.resize(head_dim, 0.0);
    for q in q.chunks_exact(head_dim) {
        let sums = plan.weights.iter_mut().zip(q);
        sums.for_each(|(sum, q)| *sum += q);
    }
    for kv_head in kv_heads {
        let products = products(&plan.weights, ask, kv_head);
        let scores = plan.scores.iter_mut().zip(products);
        scores.for_each(|(score, product)| *score += product);
    }
}

/// Adds the softmax over chunks of the products of one query with their representations.
fn add_probabilities(q: &[f32], ask: &Ask, plan: &mut Plan) {
    let n = plan.scores.len();
    let products = products(q, ask, ask.kv_head).take(n);
    plan.weights.clear();
    plan.weights
        .extend(products.map(|product| product * ask.attention.scale));
    let max = plan
        .weights
        .iter()
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for weight in &mut plan.weights {
        *weight = (*weight - max).exp();
        total += *weight;
    }
    let inverse = 1.0 / total;
    let scores = plan.scores.iter_mut().zip(&plan.weights);
    scores.for_each(|(score, weight)| *score += weight * inverse);
}

/// `q . k` for each chunk, `k = mean * sqrt(n) = sum / sqrt(n)`.
fn products<'a>(q: &'a [f32], ask: &'a Ask, kv_head: usize) -> impl Iterator<Item = f32> + 'a {
    let sums = ask.chunks.sums(kv_head).chunks_exact(q.len());
    let chunks = sums.zip(ask.chunks.chunks());
    chunks.map(move |(sum, chunk)| dot(q, sum) / (chunk.n_keys() as f32).sqrt())
}
