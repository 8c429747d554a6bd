//! Keeps tokens at least `p` times as likely as the likeliest (Nguyen et al., arXiv:2407.01082).

use super::candidates::Candidates;
use crate::error::Result;

pub(super) fn apply(candidates: &mut Candidates, p: f32) -> Result<()> {
    let threshold = candidates.max()? + p.ln();
    candidates.keep_at_least(threshold);
    Ok(())
}
