//! Least recently used: what the published engine does. It keeps nothing at all when the experts of one token do not
//! fit, since each is dropped just before its turn comes.

use super::EvictPolicy;
use crate::experts::Key;

/// See the module.
pub struct Lru {
    /// When each was last used, counted in uses.
    last: Vec<u64>,
    tick: u64,
}

impl Lru {
    /// For `n_experts` experts in all.
    pub fn new(n_experts: usize) -> Self {
        Self {
            last: vec![0; n_experts],
            tick: 0,
        }
    }
}

impl EvictPolicy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn on_use(&mut self, key: Key, _weight: f32, _now: u64) {
        self.tick += 1;
        self.last[key as usize] = self.tick;
    }

    fn on_admit(&mut self, _key: Key) {}

    fn on_evict(&mut self, _key: Key) {}

    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key> {
        evictable.min_by_key(|key| self.last[*key as usize])
    }
}
