//! Keeps the `k` likeliest tokens; 0 keeps all.

use super::candidates::Candidates;

pub(super) fn apply(candidates: &mut Candidates, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.keep_top(k);
    }
}
