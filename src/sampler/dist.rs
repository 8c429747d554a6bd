//! A seeded draw from the softmax of what is left.

use super::candidates::Candidates;
use super::rng::Rng;
use crate::error::Result;

/// One number of `rng` per token, whatever the candidates.
pub(super) fn choose(candidates: &mut Candidates, rng: &mut Rng) -> Result<u32> {
    let max = candidates.max()?;
    let total = candidates.weigh(max);
    let chosen = candidates.at_share(rng.next_f64(), total);
    Ok(chosen.expect("the likeliest candidate weighs 1").id)
}
