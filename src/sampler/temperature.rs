//! Divides the logits: `p_i ~ exp(logit_i / t)`.

use super::candidates::Candidates;
use crate::error::Result;

/// `t > 0`.
pub(super) fn apply(candidates: &mut Candidates, t: f32) -> Result<()> {
    // From the largest one: a tiny temperature sends the others to minus infinity, not the best to infinity.
    let max = candidates.max()?;
    candidates.map_logits(|x| (x - max) / t);
    Ok(())
}
