//! Divides the logits: `p_i ~ exp(logit_i / t)`.

use super::candidates::Candidates;
use crate::error::Result;

/// `t > 0`.
pub(super) fn apply(candidates: &mut Candidates, t: f32) -> Result<()> {
    let max = candidates.max()?;
    if (max / t).is_finite() {
        candidates.map_logits(|x| x / t);
    } else {
        // The same distribution: the largest is 0 then, and the others go to minus infinity at worst.
        candidates.map_logits(|x| (x - max) / t);
    }
    Ok(())
}
