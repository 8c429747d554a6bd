//! Which expert gives up its slot: policies behind one trait. A policy knows experts by their keys and remembers of
//! them what it likes, those that are not in memory included; it is asked to choose among those that may go.

mod adaptive;
mod admission;
mod decayed;
mod lru;

pub use adaptive::Adaptive;
pub use admission::Admission;
pub use decayed::Decayed;
pub use lru::Lru;

use super::Key;

/// Decides which expert is dropped for another.
pub trait EvictPolicy: Send {
    /// As reports call it.
    fn name(&self) -> &'static str;

    /// The router has chosen `key` with `weight` for token `now`. Tokens come in order. A weight of zero is a use that
    /// says nothing about the future, such as one of an early token of a prompt.
    fn on_use(&mut self, key: Key, weight: f32, now: u64);

    /// `key` has got a slot.
    fn on_admit(&mut self, key: Key);

    /// `key` has lost its slot.
    fn on_evict(&mut self, key: Key);

    /// The one of `evictable` that goes; `None` if there are none.
    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key>;
}

/// The policies that can be chosen by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PolicyKind {
    /// Who was not used for longest goes.
    Lru,
    /// Who was used least goes; a use counts half after 32 tokens.
    Decayed,
    /// The same, each use counted by its router weight.
    RouterWeighted,
    /// What of recency, counts and admission would have missed least of late.
    #[default]
    Adaptive,
}

impl PolicyKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Lru,
        Self::Decayed,
        Self::RouterWeighted,
        Self::Adaptive,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Decayed => "decayed",
            Self::RouterWeighted => "router-weighted",
            Self::Adaptive => "adaptive",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// Whether uses count by their router weight.
    pub fn is_weighted(self) -> bool {
        self == Self::RouterWeighted
    }

    /// The policy for `n_slots` slots: this kind, or [`Admission`] by its measure of use if there are fewer than
    /// `cycle_slots`. `used` is what is known of the past at token `now`.
    pub fn build(
        self,
        used: &Decayed,
        now: u64,
        n_slots: usize,
        min_slots: usize,
        cycle_slots: usize,
    ) -> Box<dyn EvictPolicy> {
        let room = n_slots.saturating_sub(min_slots);
        let fits = n_slots >= cycle_slots;
        match self {
            // Where all fit none ever goes.
            Self::Adaptive if n_slots < used.n_experts() => {
                Box::new(Adaptive::new(used, now, n_slots, room, fits))
            }
            _ if !fits => Box::new(Admission::new(used.clone(), room)),
            Self::Lru => Box::new(Lru::new(used.n_experts())),
            Self::Decayed | Self::RouterWeighted | Self::Adaptive => Box::new(used.clone()),
        }
    }
}
