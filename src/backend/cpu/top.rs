//! The largest logits, by the maxima of runs of them: into most runs nobody looks twice.

use std::cmp::Ordering;

use super::logits::Largest;
use super::table::Logits;

/// Logits of a run.
const RUN: usize = 128;

/// Memory of [`Top::find`].
#[derive(Default)]
pub(super) struct Top {
    /// The largest of each run; infinity of one that holds what is no number.
    maxima: Vec<f32>,
    /// The same by size, as far as needed.
    ordered: Vec<f32>,
}

impl Top {
    /// See [`Backend::read_top`](crate::backend::Backend::read_top). `false`: there are fewer runs than are wanted.
    pub(super) fn find(&mut self, logits: &[f32], k: usize, out: &mut Vec<(u32, f32)>) -> bool {
        if k == 0 || k > logits.len().div_ceil(RUN) {
            return false;
        }
        let largest = Logits::best().largest;
        self.maxima.clear();
        self.maxima.extend(logits.chunks(RUN).map(|run| {
            let mut found = Largest::default();
            largest.run(run, &mut found);
            if found.has_nan {
                f32::INFINITY
            } else {
                found.max
            }
        }));
        self.ordered.clone_from(&self.maxima);
        // There are k runs with this much or more, so the k largest have it too.
        let descending = |a: &f32, b: &f32| b.total_cmp(a);
        let (_, threshold, _) = self.ordered.select_nth_unstable_by(k - 1, descending);

        out.clear();
        for (i, run) in logits.chunks(RUN).enumerate() {
            if self.maxima[i] < *threshold {
                continue;
            }
            if out.len() >= k + RUN {
                keep(out, k); // many are equal
            }
            let ids = (i * RUN) as u32..;
            let wanted = ids.zip(run.iter().copied());
            out.extend(wanted.filter(|(_, x)| *x >= *threshold || x.is_nan()));
        }
        keep(out, k);
        out.sort_unstable_by(order);
        true
    }
}

/// Drops all but the `k` first.
fn keep(pairs: &mut Vec<(u32, f32)>, k: usize) {
    if k < pairs.len() {
        pairs.select_nth_unstable_by(k, order);
        pairs.truncate(k);
    }
}

/// What is no number, then the larger, of equals the one that stands first.
fn order(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    let numbers = a.1.is_nan().cmp(&b.1.is_nan()).reverse();
    let larger = || b.1.total_cmp(&a.1);
    numbers.then_with(larger).then_with(|| a.0.cmp(&b.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Few values, so that many are equal, and now and then something odd.
    fn logit() -> impl Strategy<Value = f32> {
        prop_oneof![
            20 => -1e3f32..1e3,
            20 => (-3i8..3).prop_map(f32::from),
            1 => Just(f32::NEG_INFINITY),
            1 => Just(f32::INFINITY),
            1 => Just(f32::NAN),
        ]
    }

    proptest! {
        #[test]
        fn the_first_of_all_in_order(
            logits in prop::collection::vec(logit(), 1..5000),
            flat in prop::bool::weighted(0.1),
            k in 1usize..20,
        ) {
            let logits: Vec<f32> = logits.iter().map(|x| if flat { 1.5 } else { *x }).collect();
            let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            all.sort_by(order);
            let mut found = vec![(7, 7.0)];
            let enough = Top::default().find(&logits, k, &mut found);
            prop_assert_eq!(enough, k <= logits.len().div_ceil(RUN));
            if enough {
                let bits = |pairs: &[(u32, f32)]| -> Vec<_> {
                    pairs.iter().map(|(id, x)| (*id, x.to_bits())).collect()
                };
                prop_assert_eq!(bits(&found), bits(&all[..k]));
            }
        }
    }
}
