//! The likeliest token; of equals the one with the lowest id.

use super::candidates::{Candidates, finite, max_number};
use crate::error::Result;

/// The likeliest of all tokens.
///
/// # Errors
/// If a logit is not a number, the largest is infinite, or there is none.
pub(super) fn argmax(logits: &[f32]) -> Result<u32> {
    let max = finite(max_number(logits)?, logits.len())?;
    let best = logits.iter().position(|x| *x == max);
    Ok(best.expect("`max` is one of the logits") as u32)
}

/// The likeliest of the candidates.
pub(super) fn choose(candidates: &Candidates) -> Result<u32> {
    if let Some(all) = candidates.all() {
        return argmax(all);
    }
    let max = candidates.max()?;
    let best = candidates.iter().filter(|c| c.logit == max);
    let best = best.map(|c| c.id).min();
    Ok(best.expect("`max` is one of the logits"))
}
