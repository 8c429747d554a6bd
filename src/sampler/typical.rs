//! Locally typical sampling (Meister et al., arXiv:2202.00666): keeps the tokens whose surprise `-ln p_i` is nearest to
//! the entropy, until their probabilities sum to more than `p`.

use super::candidates::{Candidate, Candidates, by_logit, keep_first};
use crate::error::Result;

pub(super) fn apply(candidates: &mut Candidates, p: f32) -> Result<()> {
    let max = candidates.max()?;
    let total = candidates.weigh(max);
    // With l = logit - max: ln p = l - ln total, so the entropy is ln total - E[l], and a token's surprise is
    // |E[l] - l| away from it.
    let mean = (candidates.sum_weighed(|x| x - max) / total) as f32;
    let distance = |logit: f32| (mean - (logit - max)).abs();
    let wanted = f64::from(p) * total;
    if candidates.all().is_some() {
        // Of a vocabulary, first those near the entropy, if they suffice.
        let mut radii = [0.25, 1.0, 4.0].into_iter();
        let near = radii.find(|r| candidates.weight_where(|x| distance(x) <= *r) > wanted);
        if let Some(radius) = near {
            candidates.keep_where(|x| distance(x) <= radius);
        }
    }
    let nearest = |a: &Candidate, b: &Candidate| {
        let order = distance(a.logit).total_cmp(&distance(b.logit));
        order.then_with(|| by_logit(a, b))
    };
    keep_first(candidates.list(), 0, nearest, max, |sum| sum > wanted);
    candidates.set_sorted(false);
    Ok(())
}
