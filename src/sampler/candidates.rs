//! The working set of a chain: all logits of the vocabulary, and from the first selection on a list of candidates.
//!
//! Passes over the vocabulary go in lanes that the compiler keeps in vectors, the longest by way of the kernel table: the
//! choice of a token may not cost a noticeable part of the forward pass before it.

use std::cmp::Ordering;

use crate::backend::cpu::logits::{Largest, exp};
use crate::backend::cpu::table::Logits;
use crate::error::{Error, Result};

/// A token that may still be chosen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// Its logit so far.
    pub logit: f32,
}

/// The likelier one first, of equals the one with the lower id.
pub(super) fn by_logit(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// What is left of the vocabulary.
#[derive(Clone, Debug, Default)]
pub struct Candidates {
    /// `(n_vocab)`: the whole vocabulary, while nothing has been selected.
    logits: Vec<f32>,
    /// The selected ones, in the order of `by_logit` or of their ids.
    list: Vec<Candidate>,
    selected: bool,
    sorted: bool,
    /// Of each candidate, by [`Candidates::weigh`].
    weights: Vec<f32>,
}

/// Logits that are taken together.
const LANES: usize = 8;

/// Logits between two looks at a sum.
const RUN: usize = 32;

impl Candidates {
    /// Starts over with the whole vocabulary.
    ///
    /// # Errors
    /// If a logit is not a number.
    pub(super) fn fill(&mut self, logits: &[f32]) -> Result<()> {
        max_number(logits)?;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        // Room for all of them at once, not when some logits are flat; pages that are not used cost nothing.
        self.list.clear();
        self.list.reserve(logits.len());
        self.weights.clear();
        self.weights.reserve(logits.len());
        self.selected = false;
        self.sorted = false;
        Ok(())
    }

    /// Starts over with the likeliest of `n` tokens, in their order.
    ///
    /// # Errors
    /// If a logit is not a number.
    pub(super) fn fill_top(&mut self, top: &[(u32, f32)], n: usize) -> Result<()> {
        if let Some((id, _)) = top.iter().find(|(_, logit)| logit.is_nan()) {
            return Err(not_a_number(*id as usize, n));
        }
        self.list.clear();
        let list = top.iter().map(|&(id, logit)| Candidate { id, logit });
        self.list.extend(list);
        self.selected = true;
        self.sorted = true;
        Ok(())
    }

    /// Number of candidates.
    pub fn len(&self) -> usize {
        if self.selected {
            self.list.len()
        } else {
            self.logits.len()
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The candidates: by falling logit after a top-k or top-p, else by rising id.
    pub fn iter(&self) -> impl Iterator<Item = Candidate> + '_ {
        (0..self.len()).map(|i| self.at(i))
    }

    /// Candidate `i` of [`Candidates::iter`].
    pub(super) fn at(&self, i: usize) -> Candidate {
        if self.selected {
            self.list[i]
        } else {
            let id = i as u32;
            let logit = self.logits[i];
            Candidate { id, logit }
        }
    }

    /// The whole vocabulary, if nothing has been selected yet.
    pub(super) fn all(&self) -> Option<&[f32]> {
        (!self.selected).then_some(&self.logits[..])
    }

    /// The whole vocabulary to change, if nothing has been selected yet.
    pub(super) fn all_mut(&mut self) -> Option<&mut [f32]> {
        (!self.selected).then_some(&mut self.logits[..])
    }

    /// Changes each logit by a function that keeps their order.
    pub(super) fn map_logits(&mut self, f: impl Fn(f32) -> f32) {
        if self.selected {
            self.list.iter_mut().for_each(|c| c.logit = f(c.logit));
        } else {
            self.logits.iter_mut().for_each(|x| *x = f(*x));
        }
    }

    /// The largest logit.
    ///
    /// # Errors
    /// If it is infinite or there is none: no distribution can be made of that.
    pub(super) fn max(&self) -> Result<f32> {
        if !self.selected {
            return finite(max_number(&self.logits)?, self.logits.len());
        }
        let logits = self.list.iter().map(|c| c.logit);
        finite(logits.fold(f32::NEG_INFINITY, f32::max), self.list.len())
    }

    /// Gives each candidate the weight `exp(logit - max)`. Returns their sum.
    pub(super) fn weigh(&mut self, max: f32) -> f64 {
        self.weights.clear();
        if self.selected {
            let logits = self.list.iter().map(|c| c.logit);
            self.weights.extend(logits.map(|x| exp(x - max)));
        } else {
            self.weights.resize(self.logits.len(), 0.0);
            let kernel = Logits::best().weigh;
            kernel.run(&self.logits, max, &mut self.weights);
        }
        self.weights.chunks(RUN).map(sum).sum()
    }

    /// The sum of the weights of those whose logits are wanted, while nothing has been selected.
    pub(super) fn weight_where(&self, wanted: impl Fn(f32) -> bool) -> f64 {
        self.sum_weighed(|logit| if wanted(logit) { 1.0 } else { 0.0 })
    }

    /// The sum of weights times `f(logit)`, over all that have a weight.
    pub(super) fn sum_weighed(&self, f: impl Fn(f32) -> f32) -> f64 {
        let term = |logit: f32, weight: f32| {
            let product = f64::from(weight) * f64::from(f(logit));
            if weight > 0.0 { product } else { 0.0 }
        };
        if self.selected {
            let pairs = self.list.iter().zip(&self.weights);
            return pairs.map(|(c, w)| term(c.logit, *w)).sum();
        }
        let (logits, more_logits) = self.logits.as_chunks::<LANES>();
        let (weights, more_weights) = self.weights.as_chunks::<LANES>();
        let mut lanes = [0.0f64; LANES];
        for (logits, weights) in logits.iter().zip(weights) {
            for i in 0..LANES {
                lanes[i] += term(logits[i], weights[i]);
            }
        }
        let more = more_logits.iter().zip(more_weights);
        lanes.iter().sum::<f64>() + more.map(|(l, w)| term(*l, *w)).sum::<f64>()
    }

    /// The candidate at which the sum of weights first exceeds `share` of their sum `total`.
    pub(super) fn at_share(&self, share: f64, total: f64) -> Option<Candidate> {
        let mut left = share * total;
        let mut last = None;
        for (run, weights) in self.weights.chunks(RUN).enumerate() {
            let weight = sum(weights);
            if weight <= left {
                left -= weight;
                // Rounding may leave a rest behind the very last one.
                last = weights
                    .iter()
                    .rposition(|w| *w > 0.0)
                    .map(|i| run * RUN + i)
                    .or(last);
                continue;
            }
            for (i, weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                last = Some(run * RUN + i);
                left -= f64::from(*weight);
                if left < 0.0 {
                    break;
                }
            }
            break;
        }
        last.map(|i| self.at(i))
    }

    /// Keeps those with at least `threshold`.
    pub(super) fn keep_at_least(&mut self, threshold: f32) {
        self.keep_where(|logit| logit >= threshold);
    }

    /// Keeps those whose logits are wanted, in their order.
    pub(super) fn keep_where(&mut self, wanted: impl Fn(f32) -> bool) {
        if self.selected {
            self.list.retain(|c| wanted(c.logit));
            return;
        }
        self.selected = true;
        for (run, logits) in self.logits.chunks(RUN).enumerate() {
            // Nearly every run has none: one comparison per vector, no branch per logit.
            if logits.iter().fold(false, |any, x| any | wanted(*x)) {
                let ids = (run * RUN) as u32..;
                let pairs = ids.zip(logits).filter(|(_, x)| wanted(**x));
                self.list
                    .extend(pairs.map(|(id, &logit)| Candidate { id, logit }));
            }
        }
    }

    /// Keeps the `k` likeliest, sorted; of equals those with lower ids.
    pub(super) fn keep_top(&mut self, k: usize) {
        if !self.selected && k < self.logits.len() {
            self.select_top(k);
        }
        self.list();
        if !self.sorted {
            if k < self.list.len() {
                self.list.select_nth_unstable_by(k, by_logit);
                self.list.truncate(k);
            }
            self.list.sort_unstable_by(by_logit);
            self.sorted = true;
        }
        self.list.truncate(k);
    }

    /// Collects the `k` largest of the vocabulary: whatever beats the `k`-th so far goes to a list of at most `2 k`.
    fn select_top(&mut self, k: usize) {
        self.selected = true;
        let (mut threshold, mut full) = (f32::NEG_INFINITY, false);
        for (run, logits) in self.logits.chunks(RUN).enumerate() {
            // Later ids lose against equals, so `>` is exact once there are k.
            if full && !logits.iter().fold(false, |any, x| any | (*x > threshold)) {
                continue;
            }
            for (i, &logit) in logits.iter().enumerate() {
                if full && logit <= threshold {
                    continue;
                }
                let id = (run * RUN + i) as u32;
                self.list.push(Candidate { id, logit });
                if self.list.len() >= 2 * k.max(1) {
                    self.list.select_nth_unstable_by(k, by_logit);
                    self.list.truncate(k);
                    threshold = match self.list.iter().max_by(|a, b| by_logit(a, b)) {
                        Some(last) => last.logit,
                        None => f32::INFINITY, // k = 0
                    };
                    full = true;
                }
            }
        }
    }

    /// The candidates as a list; tokens of no probability leave it.
    pub(super) fn list(&mut self) -> &mut Vec<Candidate> {
        if !self.selected {
            self.keep_at_least(f32::MIN);
        }
        &mut self.list
    }

    /// Whether the list is by falling logit.
    pub(super) fn sorted(&self) -> bool {
        self.selected && self.sorted
    }

    /// Says that the list is by falling logit, or not.
    pub(super) fn set_sorted(&mut self, sorted: bool) {
        self.sorted = sorted;
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        4 * (self.logits.capacity() + self.weights.capacity())
            + size_of::<Candidate>() * self.list.capacity()
    }
}

/// Keeps the first candidates of `order` until their weights `exp(logit - max)` sum to `wanted`, which `enough` compares
/// with the sum. Sorts no more of them than it must.
pub(super) fn keep_first(
    list: &mut Vec<Candidate>,
    n_sorted: usize,
    order: impl Fn(&Candidate, &Candidate) -> Ordering,
    max: f32,
    enough: impl Fn(f64) -> bool,
) {
    /// Sorted at first; most sets are smaller.
    const FIRST: usize = 64;
    let (mut n_sorted, mut step) = (n_sorted, FIRST);
    let (mut kept, mut sum) = (0, 0.0);
    while kept < list.len() {
        if kept == n_sorted {
            let rest = &mut list[n_sorted..];
            let n = step.min(rest.len());
            if n < rest.len() {
                rest.select_nth_unstable_by(n, &order);
            }
            rest[..n].sort_unstable_by(&order);
            n_sorted += n;
            step *= 4;
        }
        sum += f64::from(exp(list[kept].logit - max));
        kept += 1;
        if enough(sum) {
            break;
        }
    }
    list.truncate(kept);
}

/// The sum of a run of weights.
fn sum(weights: &[f32]) -> f64 {
    let (lanes, rest) = weights.as_chunks::<LANES>();
    let mut sums = [0.0f64; LANES];
    for weights in lanes {
        for i in 0..LANES {
            sums[i] += f64::from(weights[i]);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|w| f64::from(*w)).sum::<f64>()
}

/// The largest of `logits`; minus infinity if there is none.
///
/// # Errors
/// If one is not a number.
pub(super) fn max_number(logits: &[f32]) -> Result<f32> {
    let mut found = Largest::default();
    Logits::best().largest.run(logits, &mut found);
    if found.has_nan {
        let id = logits.iter().position(|x| x.is_nan());
        return Err(not_a_number(id.unwrap_or_default(), logits.len()));
    }
    Ok(found.max)
}

fn not_a_number(id: usize, n: usize) -> Error {
    Error::BadModel(format!(
        "logits: expected numbers, found NaN for token {id} of {n}"
    ))
}

/// `max`, the largest of `n` logits, if it is finite.
pub(super) fn finite(max: f32, n: usize) -> Result<f32> {
    if max.is_finite() {
        Ok(max)
    } else {
        Err(Error::BadModel(format!(
            "logits: the largest of {n} is {max}, expected a finite one"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(logits: &[f32]) -> Candidates {
        let mut c = Candidates::default();
        c.fill(logits).unwrap();
        c
    }

    #[test]
    fn top_of_equals_has_the_lowest_ids() {
        let mut c = filled(&[1.0; 1000]);
        c.keep_top(7);
        let ids: Vec<u32> = c.iter().map(|c| c.id).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn nan_is_an_error_that_names_the_token() {
        for at in [0, 31, 32, 77, 99] {
            let mut logits = vec![0.0; 100];
            logits[at] = f32::NAN;
            let error = Candidates::default().fill(&logits).unwrap_err().to_string();
            assert!(error.contains(&format!("token {at} of 100")), "{error}");
        }
        assert!(filled(&[f32::NEG_INFINITY; 9]).max().is_err());
        assert!(filled(&[0.0, f32::INFINITY]).max().is_err());
        assert!(filled(&[]).max().is_err());
    }

    #[test]
    fn shares_find_their_candidates() {
        let mut logits = vec![f32::NEG_INFINITY; 100];
        for at in [3, 40, 41, 97] {
            logits[at] = 0.0;
        }
        let mut c = filled(&logits);
        let total = c.weigh(0.0);
        assert_eq!(total, 4.0);
        let at = |share| c.at_share(share, total).map(|c| c.id);
        assert_eq!(at(0.0), Some(3));
        assert_eq!(at(0.24), Some(3));
        assert_eq!(at(0.25), Some(40));
        assert_eq!(at(0.74), Some(41));
        assert_eq!(at(0.999), Some(97));
        assert_eq!(at(1.0), Some(97), "a rest that rounding left");
    }
}
