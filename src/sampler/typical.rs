//! Locally typical sampling (Meister et al., arXiv:2202.00666): keeps the tokens whose surprise `-ln p_i` is nearest to
//! the entropy, until their probabilities sum to more than `p`.

use super::candidates::{Candidate, Candidates, by_logit};
use crate::error::Result;

/// Tokens sorted at first; most typical sets are smaller.
const FIRST: usize = 64;

pub(super) fn apply(candidates: &mut Candidates, p: f32) -> Result<()> {
    let max = candidates.max()?;
    let list = candidates.list();
    let (mut total, mut mean) = (0.0f64, 0.0f64);
    for c in list.iter() {
        let weight = f64::from((c.logit - max).exp());
        total += weight;
        if weight > 0.0 {
            mean += weight * f64::from(c.logit - max);
        }
    }
    // With l = logit - max: ln p = l - ln total, so the entropy is ln total - E[l], and the distance of a token's
    // surprise from it is |E[l] - l|.
    let mean = (mean / total) as f32;
    let distance = |c: &Candidate| (mean - (c.logit - max)).abs();
    let nearest = |a: &Candidate, b: &Candidate| {
        let order = distance(a).total_cmp(&distance(b));
        order.then_with(|| by_logit(a, b))
    };

    let wanted = f64::from(p) * total;
    let (mut n_sorted, mut step) = (0, FIRST);
    let (mut kept, mut sum) = (0, 0.0);
    while kept < list.len() {
        if kept == n_sorted {
            let rest = &mut list[n_sorted..];
            let step_now = step.min(rest.len());
            if step_now < rest.len() {
                rest.select_nth_unstable_by(step_now, nearest);
            }
            rest[..step_now].sort_unstable_by(nearest);
            n_sorted += step_now;
            step *= 4;
        }
        sum += f64::from((list[kept].logit - max).exp());
        kept += 1;
        if sum > wanted {
            break;
        }
    }
    list.truncate(kept);
    candidates.set_sorted(false);
    Ok(())
}
