//! Passes over scores of chunks, for a policy that reads the best of them. One body for all levels but where the compiler
//! finds no vectors, the same numbers from each.

use super::logits::{Largest, largest};

/// A whole number for a score: the greater, the better, in the order of numbers, zeros and NaNs that `total_cmp` has.
#[inline(always)]
pub fn order(score: f32) -> i32 {
    let bits = score.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// `keys[i] = max(keys[i], order(scores[i] - max))` with the largest of the scores; one that is no number changes nothing.
#[inline(always)]
pub(super) fn rank(scores: &[f32], keys: &mut [i32]) {
    let mut found = Largest::default();
    largest(scores, &mut found);
    for (key, score) in keys.iter_mut().zip(scores) {
        let below = score - found.max;
        let own = if below <= 0.0 { order(below) } else { i32::MIN };
        *key = if own > *key { own } else { *key };
    }
}

/// The score of a whole number.
#[inline(always)]
pub fn score(order: i32) -> f32 {
    f32::from_bits((order ^ ((order >> 31) as u32 >> 1) as i32) as u32)
}

/// What lies on the two sides of a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sides {
    /// How many are at least as great,
    pub n: usize,
    /// the least of them, the greatest number there is if there is none,
    pub least: i32,
    /// and the greatest of the others, likewise the least.
    pub most: i32,
}

/// What lies on the two sides of `at`.
#[inline(always)]
pub(super) fn divide(keys: &[i32], at: i32, sides: &mut Sides) {
    let (mut n, mut least, mut most) = (0u32, i32::MAX, i32::MIN);
    for key in keys {
        let is_above = *key >= at;
        let (above, below) = match is_above {
            true => (*key, i32::MIN),
            false => (i32::MAX, *key),
        };
        n += u32::from(is_above);
        least = if above < least { above } else { least };
        most = if below > most { below } else { most };
    }
    *sides = Sides {
        n: n as usize,
        least,
        most,
    };
}

/// Bit `i % 64` of word `i / 64`: whether key `i` is at least `least`.
#[inline(always)]
pub(super) fn mark(keys: &[i32], least: i32, words: &mut [u64]) {
    for (word, keys) in words.iter_mut().zip(keys.chunks(u64::BITS as usize)) {
        let bits = keys.iter().enumerate();
        *word = bits.fold(0, |bits, (i, key)| bits | u64::from(*key >= least) << i);
    }
}
