//! Blocks of 64 keys by their pooled keys: the selector of InfLLM-V2 (MiniCPM4, arXiv:2506.07900), here on models that were
//! not trained for it.
//!
//! Keys are pooled by means of 32, every 16. The scores of a token's queries with these become probabilities by softmax,
//! summed over the queries that share the head of keys; a block has the best of the means that reach into it. The first
//! block and the last keys are always read, the best blocks between up to the budget.

use super::{Sparsity, place};
use crate::backend::select::{Ask, Plan};

/// Keys of a block.
pub const BLOCK: usize = 64;

/// Keys from one mean to the next; a mean is over two of these.
pub const STRIDE: usize = 16;

const PER_BLOCK: usize = BLOCK / STRIDE;

const _: () = assert!(PER_BLOCK == 4, "see `select::By::Blocks`");

/// See [`Select::select`](crate::backend::select::Select::select).
pub(super) fn select(sparsity: &Sparsity, ask: &Ask, plan: &mut Plan) {
    let seen = &ask.seen;
    // Blocks that end before the last keys, the first block and those that the model's window hides left out.
    let end = seen.end.saturating_sub(sparsity.local) / BLOCK;
    let first = (seen.start / BLOCK).max(1);
    let n_sums = ask.chunks.n_known(seen.end).min(end * PER_BLOCK + 1);
    let group = ask.attention.n_heads / ask.attention.n_kv_heads;
    let n_means = n_sums.saturating_sub(1);
    plan.weights.clear();
    plan.weights.resize(n_means, 0.0);
    for query in 0..group {
        let scale = 1.0 / (2 * STRIDE) as f32;
        plan.scores.clear();
        plan.scores.extend_from_slice(&ask.scores(query)[..n_sums]);
        let means = |i: usize| (plan.scores[i] + plan.scores[i + 1]) * scale;
        let max = (0..n_means).map(means).fold(f32::NEG_INFINITY, f32::max);
        // In place: a mean needs the products from its own on.
        let mut total = 0.0;
        for i in 0..n_means {
            let weight = ((plan.scores[i] + plan.scores[i + 1]) * scale - max).exp();
            plan.scores[i] = weight;
            total += weight;
        }
        let inverse = 1.0 / total;
        let probabilities = plan.weights.iter_mut().zip(&plan.scores);
        probabilities.for_each(|(sum, weight)| *sum += weight * inverse);
    }
    plan.scores.clear();
    plan.scores.extend((0..end).map(|block| {
        let reach = (block * PER_BLOCK).saturating_sub(1)..(block + 1) * PER_BLOCK;
        let means = &plan.weights[reach.start.min(n_means)..reach.end.min(n_means)];
        means.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }));
    plan.order.clear();
    let blocks = (first.min(end)..end).map(|block| place(&plan.scores, block));
    plan.order.extend(blocks);
    // The block in which the last keys begin is read whole.
    let n_read = BLOCK + (seen.end - (end * BLOCK).max(seen.start));
    let k = sparsity.budget_of(seen.len()).saturating_sub(n_read) / BLOCK;
    let last = match k.min(plan.order.len()) {
        0 => 0,
        k => *plan.order.select_nth_unstable(k - 1).1,
    };
    plan.push(seen.start..BLOCK.min(seen.end));
    for block in first..end {
        if place(&plan.scores, block) <= last {
            plan.push((block * BLOCK).max(seen.start)..(block + 1) * BLOCK);
        }
    }
    plan.push((end * BLOCK).max(seen.start)..seen.end);
}
