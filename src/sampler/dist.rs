//! A seeded draw from the softmax of what is left.

use super::candidates::Candidates;
use super::rng::Rng;
use crate::error::Result;

/// One number of `rng` per token, whatever the candidates.
pub(super) fn choose(candidates: &mut Candidates, rng: &mut Rng) -> Result<u32> {
    let max = candidates.max()?;
    let uniform = rng.next_f64();
    let (list, weights) = candidates.list_and_weights();
    weights.clear();
    weights.extend(list.iter().map(|c| (c.logit - max).exp()));
    let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
    let mut left = uniform * total;
    let mut chosen = None;
    for (c, w) in list.iter().zip(weights.iter()).filter(|(_, w)| **w > 0.0) {
        chosen = Some(c.id); // rounding may leave a rest behind the last one
        left -= f64::from(*w);
        if left < 0.0 {
            break;
        }
    }
    Ok(chosen.expect("the likeliest candidate weighs 1"))
}
