//! Chooses among policies by what each would have read. None is best everywhere: routers that follow a topic want what
//! was used last, routers with lasting favourites want counts that are forgotten slowly, and where not even the experts
//! of one token fit, newcomers must wait. So each candidate runs a cache of keys alone, as large as the real one, and the
//! one that missed least of late decides about the real one.
//!
//! The idea is that of "Cache Modeling and Optimization using Miniature Simulations" (Waldspurger et al., ATC 2017), at
//! full size: there are only a thousand keys, and a token compares some ten thousand numbers.

use super::{Admission, Decayed, EvictPolicy, Lru};
use crate::experts::Key;

/// Tokens after which a miss counts half.
const HALF_LIFE: f64 = 64.0;

/// How much less another must have missed to take over: a policy that changes with each token is none.
const CLEARLY: f64 = 0.97;

/// Half-lives of the counts: of a paragraph, and of a conversation.
const SHORT: f64 = 8.0;
const LONG: f64 = 64.0;

/// A policy, once for the experts that are in memory and once for those that would be if it decided.
struct Candidate {
    name: &'static str,
    real: Box<dyn EvictPolicy>,
    ghost: Box<dyn EvictPolicy>,
    there: Vec<Key>,
    /// Where in `there` each key is.
    at: Vec<Option<u32>>,
    missed: f64,
}

impl Candidate {
    fn new(name: &'static str, n_experts: usize, build: impl Fn() -> Box<dyn EvictPolicy>) -> Self {
        Self {
            name,
            real: build(),
            ghost: build(),
            there: Vec::new(),
            at: vec![None; n_experts],
            missed: 0.0,
        }
    }

    /// What the cache of keys does with a use.
    fn simulate(&mut self, key: Key, weight: f32, now: u64, n_slots: usize) {
        self.ghost.on_use(key, weight, now);
        if self.at[key as usize].is_some() {
            return;
        }
        self.missed += 1.0;
        if self.there.len() >= n_slots {
            let mut keys = self.there.iter().copied();
            let Some(victim) = self.ghost.victim(&mut keys) else {
                return;
            };
            let at = self.at[victim as usize].take().expect("it is one of them");
            self.there.swap_remove(at as usize);
            if let Some(moved) = self.there.get(at as usize) {
                self.at[*moved as usize] = Some(at);
            }
            self.ghost.on_evict(victim);
        }
        self.at[key as usize] = Some(self.there.len() as u32);
        self.there.push(key);
        self.ghost.on_admit(key);
    }
}

/// See the module.
pub struct Adaptive {
    candidates: [Candidate; 4],
    decides: usize,
    n_slots: usize,
    now: u64,
}

impl Adaptive {
    /// For `n_slots` slots, of which `room` may be kept from newcomers. `used` is what is known at token `now`; `fits`:
    /// the experts of a token do.
    pub fn new(used: &Decayed, now: u64, n_slots: usize, room: usize, fits: bool) -> Self {
        let n = used.n_experts();
        let counts = |half_life| used.forgetting(half_life, now);
        Self {
            candidates: [
                Candidate::new("adaptive: lru", n, || Box::new(Lru::new(n))),
                Candidate::new("adaptive: decayed in 8", n, || Box::new(counts(SHORT))),
                Candidate::new("adaptive: decayed in 64", n, || Box::new(counts(LONG))),
                Candidate::new("adaptive: admission", n, || {
                    Box::new(Admission::new(counts(SHORT), room))
                }),
            ],
            decides: if fits { 0 } else { 3 },
            n_slots,
            now,
        }
    }
}

impl EvictPolicy for Adaptive {
    fn name(&self) -> &'static str {
        self.candidates[self.decides].name
    }

    fn on_use(&mut self, key: Key, weight: f32, now: u64) {
        if now != self.now {
            let left = (-(now.abs_diff(self.now) as f64) / HALF_LIFE).exp2();
            self.now = now;
            let mut least = self.decides;
            for (idx, candidate) in self.candidates.iter().enumerate() {
                let bar = self.candidates[least].missed;
                let bar = bar * if least == self.decides { CLEARLY } else { 1.0 };
                if candidate.missed < bar {
                    least = idx;
                }
            }
            self.decides = least;
            self.candidates.iter_mut().for_each(|c| c.missed *= left);
        }
        for candidate in &mut self.candidates {
            candidate.real.on_use(key, weight, now);
            candidate.simulate(key, weight, now, self.n_slots);
        }
    }

    fn on_admit(&mut self, key: Key) {
        self.candidates
            .iter_mut()
            .for_each(|c| c.real.on_admit(key));
    }

    fn on_evict(&mut self, key: Key) {
        self.candidates
            .iter_mut()
            .for_each(|c| c.real.on_evict(key));
    }

    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key> {
        self.candidates[self.decides].real.victim(evictable)
    }
}
