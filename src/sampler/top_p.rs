//! Keeps the smallest set of likeliest tokens whose probabilities sum to at least `p` (Holtzman et al.,
//! arXiv:1904.09751).

use super::candidates::{Candidates, by_logit, keep_first};
use crate::error::Result;

pub(super) fn apply(candidates: &mut Candidates, p: f32) -> Result<()> {
    let max = candidates.max()?;
    let wanted = f64::from(p) * candidates.weigh(max);
    if candidates.all().is_some() {
        // Of a vocabulary, first those near the likeliest, if they suffice: they are few.
        let mut distances = [2.0, 4.0, 8.0, 16.0].into_iter();
        let near = distances.find(|d| candidates.weight_where(|x| x >= max - d) >= wanted);
        if let Some(distance) = near {
            candidates.keep_at_least(max - distance);
        }
    }
    let n_sorted = if candidates.sorted() {
        candidates.len()
    } else {
        0
    };
    keep_first(candidates.list(), n_sorted, by_logit, max, |sum| {
        sum >= wanted
    });
    candidates.set_sorted(true);
    Ok(())
}
