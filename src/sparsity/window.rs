//! The first keys and the last (StreamingLLM, arXiv:2309.17453, without leaving anything out of the cache): blind to what
//! keys say, so it sets the bar for the others.

use super::Sparsity;
use crate::backend::select::{Ask, Plan};

/// See [`Select::select`](crate::backend::select::Select::select).
pub(super) fn select(sparsity: &Sparsity, ask: &Ask, plan: &mut Plan) {
    let seen = &ask.seen;
    let sink = sparsity.sink.clamp(seen.start, seen.end);
    let n_last = sparsity.budget_of(seen.len()) - (sink - seen.start);
    plan.push(seen.start..sink);
    plan.push(seen.end.saturating_sub(n_last).max(sink)..seen.end);
}
