//! What other policies and other budgets had made of a run: a trace goes through the state machine of the store,
//! without reads.

use std::collections::HashMap;

use super::policy::{Admission, Decayed, EvictPolicy, Lru};
use super::slots::Slots;
use super::trace::{Event, Trace};
use super::{Key, PolicyKind};
use crate::{Error, Result};

/// A policy to replay with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplayPolicy {
    /// One that is chosen by name, whether the experts of a token fit or not.
    Plain(PolicyKind),
    /// What the store does when the experts of a token do not fit.
    Admission(PolicyKind),
    /// What the store does with that policy: one of the two above.
    Store(PolicyKind),
    /// The yardstick: it knows the future and drops what is needed last.
    Belady,
}

impl ReplayPolicy {
    /// Those that are worth comparing.
    pub const ALL: [Self; 6] = [
        Self::Plain(PolicyKind::Lru),
        Self::Plain(PolicyKind::Decayed),
        Self::Plain(PolicyKind::RouterWeighted),
        Self::Admission(PolicyKind::Decayed),
        Self::Store(PolicyKind::Adaptive),
        Self::Belady,
    ];

    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(kind) | Self::Store(kind) => kind.name(),
            Self::Admission(_) => "admission",
            Self::Belady => "belady",
        }
    }
}

/// What came of a replay.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Tokens of the trace.
    pub tokens: u64,
    /// Experts asked for.
    pub used: u64,
    /// Of these, experts that were in a slot.
    pub hits: u64,
    /// Bytes of the experts that were not.
    pub bytes: u64,
    /// Experts that lost their slot.
    pub evictions: u64,
    /// For each use of the trace, whether it was a hit.
    pub was_hit: Vec<bool>,
}

impl Outcome {
    /// Hits of all uses.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.used.max(1) as f64
    }

    /// Bytes that a token reads.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes as f64 / self.tokens.max(1) as f64
    }
}

/// Drops the expert that is needed last. The accesses of a trace are known, so it counts along with them.
struct Belady {
    /// When each expert is used, the last time first.
    uses: Vec<Vec<u64>>,
}

impl Belady {
    fn new(trace: &Trace) -> Self {
        let mut uses = vec![Vec::new(); trace.n_experts()];
        let keys = trace.uses.iter().map(|used| used.key as usize);
        for (at, key) in keys.enumerate().rev() {
            uses[key].push(at as u64);
        }
        Self { uses }
    }
}

impl EvictPolicy for Belady {
    fn name(&self) -> &'static str {
        "belady"
    }

    fn on_use(&mut self, key: Key, _weight: f32, _now: u64) {
        self.uses[key as usize].pop();
    }

    fn on_admit(&mut self, _key: Key) {}

    fn on_evict(&mut self, _key: Key) {}

    fn victim(&mut self, evictable: &mut dyn Iterator<Item = Key>) -> Option<Key> {
        evictable.max_by_key(|key| self.uses[*key as usize].last().copied().unwrap_or(u64::MAX))
    }
}

/// Slots that suffice for what a token uses in one layer three times over, and those from which on plain eviction
/// works; as [`super::Layout`] has them.
pub fn slot_bounds(trace: &Trace) -> (usize, usize) {
    let most = trace.layers.iter().map(|layer| layer.n_used).max();
    let most = most.unwrap_or(0);
    let cycle: usize = trace.layers.iter().map(|layer| layer.n_used).sum();
    let all = trace.n_experts();
    ((3 * most).min(all), (cycle + 2 * most).min(all))
}

/// Replays `trace` with `n_slots` slots.
///
/// # Errors
/// [`Error::Invalid`] if requests of the trace held more experts at once.
pub fn replay(trace: &Trace, n_slots: usize, policy: ReplayPolicy) -> Result<Outcome> {
    let n = trace.n_experts();
    let n_slots = n_slots.min(n);
    let (min_slots, cycle_slots) = slot_bounds(trace);
    let used = |kind: PolicyKind| Decayed::new(n, kind.is_weighted());
    let room = n_slots.saturating_sub(min_slots);
    let built: Box<dyn EvictPolicy> = match policy {
        ReplayPolicy::Store(kind) | ReplayPolicy::Plain(kind @ PolicyKind::Adaptive) => {
            kind.build(&used(kind), 0, n_slots, min_slots, cycle_slots)
        }
        ReplayPolicy::Plain(PolicyKind::Lru) => Box::new(Lru::new(n)),
        ReplayPolicy::Plain(kind) => Box::new(used(kind)),
        ReplayPolicy::Admission(kind) => Box::new(Admission::new(used(kind), room)),
        ReplayPolicy::Belady => Box::new(Belady::new(trace)),
    };
    let mut slots = Slots::new(used(PolicyKind::default()), built, n_slots, n_slots);
    let mut outcome = Outcome {
        tokens: trace.n_tokens(),
        ..Outcome::default()
    };
    let mut open: HashMap<usize, Vec<u32>> = HashMap::new();
    let mut n_begun = 0;
    for event in &trace.events {
        match event {
            Event::Begin { token, layer, uses } => {
                let uses = &trace.uses[uses.clone()];
                for used in uses {
                    slots.on_use(used.key, used.weight, *token);
                }
                let mut held = Vec::with_capacity(uses.len());
                for used in uses {
                    let slot = slots.find(used.key);
                    outcome.was_hit.push(slot.is_some());
                    if let Some(slot) = slot {
                        slots.pin(slot);
                        held.push(slot);
                        outcome.hits += 1;
                    }
                }
                for used in uses {
                    if slots.find(used.key).is_none() {
                        let slot = slots.admit(used.key).ok_or_else(|| {
                            Error::Invalid(format!(
                                "{n_slots} slots: the trace holds more experts at once"
                            ))
                        })?;
                        slots.pin(slot);
                        slots.complete(slot);
                        held.push(slot);
                        outcome.bytes += trace.layers[*layer].expert_bytes;
                    }
                }
                outcome.used += uses.len() as u64;
                open.insert(n_begun, held);
                n_begun += 1;
            }
            Event::End(request) => {
                for slot in open.remove(request).unwrap_or_default() {
                    slots.unpin(slot, &mut |_| {});
                }
            }
        }
    }
    outcome.evictions = slots.evictions;
    Ok(outcome)
}
