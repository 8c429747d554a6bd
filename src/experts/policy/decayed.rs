//! Decayed use: u ← u · 2^(-Δtokens / h) + w for each use, with w = 1 or the router weight and h = 32. The least used goes, of
//! equals the one not used for longest.
//!
//! Kept as log₂ u + token / h: it changes only when the expert is used, and all values compare at any time without
//! being decayed first.

use super::EvictPolicy;
use crate::experts::Key;

/// Tokens after which a use counts half.
const HALF_LIFE: f64 = 32.0;

/// See the module. Uses are remembered of all experts, whether they have a slot or not.
#[derive(Clone)]
pub struct Decayed {
    weighted: bool,
    half_life: f64,
    score: Vec<f64>,
    last: Vec<u64>,
    tick: u64,
}

impl Decayed {
    /// For `n_experts` experts in all; `weighted`: uses count by their router weight.
    pub fn new(n_experts: usize, weighted: bool) -> Self {
        Self {
            weighted,
            half_life: HALF_LIFE,
            score: vec![f64::NEG_INFINITY; n_experts],
            last: vec![0; n_experts],
            tick: 0,
        }
    }

    /// The same uses as they count at token `now`; from there on they count half after `half_life` tokens.
    pub fn forgetting(&self, half_life: f64, now: u64) -> Self {
        let mut other = self.clone();
        other.half_life = half_life;
        for key in 0..self.score.len() as Key {
            other.set_used(key, self.used(key, now), now);
        }
        other
    }

    /// How many experts there are.
    pub fn n_experts(&self) -> usize {
        self.score.len()
    }

    /// The use of `key` as it counts at token `now`.
    pub fn used(&self, key: Key, now: u64) -> f64 {
        (self.score[key as usize] - now as f64 / self.half_life).exp2()
    }

    /// Sets the use of `key` as it counts at token `now`.
    pub fn set_used(&mut self, key: Key, used: f64, now: u64) {
        self.score[key as usize] = used.log2() + now as f64 / self.half_life;
    }

    /// Orders by use, then by time.
    pub(in crate::experts) fn order(&self, a: Key, b: Key) -> std::cmp::Ordering {
        let (a, b) = (a as usize, b as usize);
        let by_use = self.score[a].total_cmp(&self.score[b]);
        by_use.then(self.last[a].cmp(&self.last[b]))
    }

    /// Whether `a` has been used at least `factor` times as much as `b`.
    pub(super) fn exceeds(&self, a: Key, b: Key, factor: f64) -> bool {
        self.score[a as usize] > self.score[b as usize] + factor.log2()
    }
}

impl EvictPolicy for Decayed {
    fn name(&self) -> &'static str {
        if self.weighted {
            "router-weighted"
        } else {
            "decayed"
        }
    }

    fn on_use(&mut self, key: Key, weight: f32, now: u64) {
        self.tick += 1;
        self.last[key as usize] = self.tick;
        let weight = f64::from(weight);
        if weight > 0.0 && weight.is_finite() {
            let one = if self.weighted { weight } else { 1.0 };
            self.set_used(key, self.used(key, now) + one, now);
        }
    }

    fn on_admit(&mut self, _key: Key) {}

    fn on_evict(&mut self, _key: Key) {}

    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key> {
        evictable.min_by(|a, b| self.order(*a, *b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_use_counts_half_after_32_tokens() {
        let mut policy = Decayed::new(2, false);
        policy.on_use(0, 0.1, 7);
        policy.on_use(0, 0.9, 7 + 32);
        assert!((policy.used(0, 7 + 32) - 1.5).abs() < 1e-9);
        assert!((policy.used(0, 7 + 64) - 0.75).abs() < 1e-9);
        assert_eq!(policy.used(1, 100), 0.0);
        policy.on_use(1, 0.0, 100);
        assert_eq!(policy.used(1, 100), 0.0, "without credit");

        let mut weighted = Decayed::new(1, true);
        weighted.on_use(0, 0.25, 0);
        weighted.on_use(0, 0.5, 32);
        assert!((weighted.used(0, 32) - 0.625).abs() < 1e-9);
    }

    #[test]
    fn it_still_tells_uses_apart_after_a_million_tokens() {
        let mut policy = Decayed::new(2, false);
        let now = 1 << 20;
        policy.on_use(0, 1.0, now);
        policy.on_use(1, 1.0, now + 1);
        let first = policy.victim(&mut [1, 0].into_iter());
        assert_eq!(first, Some(0));
    }
}
