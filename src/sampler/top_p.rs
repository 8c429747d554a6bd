//! Keeps the smallest set of likeliest tokens whose probabilities sum to at least `p` (Holtzman et al.,
//! arXiv:1904.09751).

use super::candidates::{Candidates, by_logit};
use crate::error::Result;

/// Tokens sorted at first; most nuclei are smaller.
const FIRST: usize = 64;

pub(super) fn apply(candidates: &mut Candidates, p: f32) -> Result<()> {
    let max = candidates.max()?;
    let sorted = candidates.sorted();
    let list = candidates.list();
    let weight = |logit: f32| f64::from((logit - max).exp());
    let total: f64 = list.iter().map(|c| weight(c.logit)).sum();
    let wanted = f64::from(p) * total;

    let (mut n_sorted, mut step) = (if sorted { list.len() } else { 0 }, FIRST);
    let (mut kept, mut sum) = (0, 0.0);
    while kept < list.len() {
        if kept == n_sorted {
            let rest = &mut list[n_sorted..];
            let step_now = step.min(rest.len());
            if step_now < rest.len() {
                rest.select_nth_unstable_by(step_now, by_logit);
            }
            rest[..step_now].sort_unstable_by(by_logit);
            n_sorted += step_now;
            step *= 4;
        }
        sum += weight(list[kept].logit);
        kept += 1;
        if sum >= wanted {
            break;
        }
    }
    list.truncate(kept);
    candidates.set_sorted(true);
    Ok(())
}
