//! The working set of a chain: all logits of the vocabulary, and from the first selection on a list of candidates.

use std::cmp::Ordering;

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
    /// Scratch of samplers that weigh the list.
    pub(super) weights: Vec<f32>,
}

impl Candidates {
    /// Starts over with the whole vocabulary.
    ///
    /// # Errors
    /// If a logit is not a number.
    pub(super) fn fill(&mut self, logits: &[f32]) -> Result<()> {
        check(logits)?;
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
        let all = if self.selected { &[] } else { &self.logits[..] };
        let all = all.iter().enumerate().map(|(id, &logit)| Candidate {
            id: id as u32,
            logit,
        });
        self.list.iter().copied().chain(all)
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
        let max = if self.selected {
            let logits = self.list.iter().map(|c| c.logit);
            logits.fold(f32::NEG_INFINITY, f32::max)
        } else {
            max(&self.logits)
        };
        if max.is_finite() {
            Ok(max)
        } else {
            Err(Error::BadModel(format!(
                "logits: the largest of {} is {max}, expected a finite one",
                self.len()
            )))
        }
    }

    /// Keeps those with at least `threshold`.
    pub(super) fn keep_at_least(&mut self, threshold: f32) {
        if self.selected {
            self.list.retain(|c| c.logit >= threshold);
            return;
        }
        self.selected = true;
        for (base, run) in runs(&self.logits) {
            // Nearly every run has none: one comparison per vector, no branch per logit.
            if run.iter().fold(false, |any, x| any | (*x >= threshold)) {
                let found = run.iter().enumerate().filter(|(_, x)| **x >= threshold);
                self.list.extend(found.map(|(i, &logit)| Candidate {
                    id: (base + i) as u32,
                    logit,
                }));
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
        for (base, run) in runs(&self.logits) {
            // Later ids lose against equals, so `>` is exact once there are k.
            if full && !run.iter().fold(false, |any, x| any | (*x > threshold)) {
                continue;
            }
            for (i, &logit) in run.iter().enumerate() {
                if full && logit <= threshold {
                    continue;
                }
                let id = (base + i) as u32;
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

    /// The list and the scratch, for samplers that need both.
    pub(super) fn list_and_weights(&mut self) -> (&mut Vec<Candidate>, &mut Vec<f32>) {
        self.list();
        (&mut self.list, &mut self.weights)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        4 * (self.logits.capacity() + self.weights.capacity())
            + size_of::<Candidate>() * self.list.capacity()
    }
}

/// Runs of 32 logits, each with the index of its first.
fn runs(logits: &[f32]) -> impl Iterator<Item = (usize, &[f32])> {
    logits.chunks(32).enumerate().map(|(i, run)| (32 * i, run))
}

/// The largest number, in eight lanes that the compiler keeps in registers.
pub(super) fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (eights, rest) = x.as_chunks::<8>();
    let lanes = eights.iter().fold([f32::NEG_INFINITY; 8], |mut m, x| {
        m.iter_mut().zip(x).for_each(|(m, x)| *m = larger(*m, *x));
        m
    });
    let lanes = lanes.into_iter().chain(rest.iter().copied());
    lanes.fold(f32::NEG_INFINITY, larger)
}

/// That all logits are numbers.
pub(super) fn check(logits: &[f32]) -> Result<()> {
    let (eights, rest) = logits.as_chunks::<8>();
    let lanes = eights.iter().fold([false; 8], |mut bad, x| {
        bad.iter_mut()
            .zip(x)
            .for_each(|(bad, x)| *bad |= x.is_nan());
        bad
    });
    if lanes.contains(&true) || rest.iter().any(|x| x.is_nan()) {
        let id = logits.iter().position(|x| x.is_nan()).unwrap_or(0);
        return Err(Error::BadModel(format!(
            "logits: expected numbers, found NaN for token {id} of {}",
            logits.len()
        )));
    }
    Ok(())
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
        assert_eq!(
            c.iter().map(|c| c.id).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 6]
        );
    }

    #[test]
    fn nan_is_an_error_that_names_the_token() {
        let mut logits = vec![0.0; 100];
        logits[77] = f32::NAN;
        let error = Candidates::default().fill(&logits).unwrap_err().to_string();
        assert!(error.contains("token 77 of 100"), "{error}");
        let masked = filled(&[f32::NEG_INFINITY; 9]);
        assert!(masked.max().is_err());
        assert!(filled(&[0.0, f32::INFINITY]).max().is_err());
    }
}
