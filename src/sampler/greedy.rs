//! The likeliest token; of equals the one with the lowest id.

use super::candidates::{Candidates, max};
use crate::error::{Error, Result};

/// The likeliest of all tokens.
///
/// # Errors
/// If the largest logit is infinite or there is none.
pub(super) fn argmax(logits: &[f32]) -> Result<u32> {
    let max = max(logits);
    match logits.iter().position(|x| *x == max) {
        Some(id) if max.is_finite() => Ok(id as u32),
        _ => Err(Error::BadModel(format!(
            "logits: the largest of {} is {max}, expected a finite one",
            logits.len()
        ))),
    }
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
