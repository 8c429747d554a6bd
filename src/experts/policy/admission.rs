//! For less memory than the experts of one token take: there every policy that makes room for each newcomer ends up
//! with experts that are dropped before their turn comes. Here newcomers pass through a ring of slots, and the others
//! keep experts that stay until a newcomer is clearly used more.

use super::{Decayed, EvictPolicy};
use crate::experts::Key;

/// How many times as much as the least used of those that stay a newcomer must have been used to take its place. More
/// than one: uses of one token count anew one after the other, and equals must not push each other out in turn.
const CLEARLY: f64 = 1.1;

/// See the module.
pub struct Admission {
    used: Decayed,
    /// How many experts may stay.
    room: usize,
    n_stay: usize,
    stays: Vec<bool>,
    /// When each got its slot.
    admitted: Vec<u64>,
    tick: u64,
}

impl Admission {
    /// With `room` slots for experts that stay.
    pub fn new(used: Decayed, room: usize) -> Self {
        let n = used.n_experts();
        Self {
            used,
            room,
            n_stay: 0,
            stays: vec![false; n],
            admitted: vec![0; n],
            tick: 0,
        }
    }

    fn stay(&mut self, key: Key) {
        self.stays[key as usize] = true;
        self.n_stay += 1;
    }
}

impl EvictPolicy for Admission {
    fn name(&self) -> &'static str {
        "admission"
    }

    fn on_use(&mut self, key: Key, weight: f32, now: u64) {
        self.used.on_use(key, weight, now);
    }

    fn on_admit(&mut self, key: Key) {
        self.tick += 1;
        self.admitted[key as usize] = self.tick;
        if self.n_stay < self.room {
            self.stay(key);
        }
    }

    fn on_evict(&mut self, key: Key) {
        if std::mem::take(&mut self.stays[key as usize]) {
            self.n_stay -= 1;
        }
    }

    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key> {
        let (mut oldest, mut least): (Option<Key>, Option<Key>) = (None, None);
        for key in evictable {
            if self.stays[key as usize] {
                if least.is_none_or(|least| self.used.order(key, least).is_lt()) {
                    least = Some(key);
                }
            } else if oldest
                .is_none_or(|oldest| self.admitted[key as usize] < self.admitted[oldest as usize])
            {
                oldest = Some(key);
            }
        }
        match (oldest, least) {
            (Some(passing), Some(staying)) if self.used.exceeds(passing, staying, CLEARLY) => {
                // It takes the place when the other is evicted.
                self.stay(passing);
                Some(staying)
            }
            (Some(passing), _) => Some(passing),
            (None, staying) => staying,
        }
    }
}
