//! Which expert is in which slot. The state of a slot, and the only ways from one state to another:
//!
//! ```text
//! Absent ── grow ──▶ Free ── admit ──▶ Loading ── complete ──▶ Ready
//!    ▲                ▲                   │ doom                 │ evict: not pinned
//!    └── too many ────┴──── Doomed ◀──────┘                      │
//!                     ▲  no reads out, not pinned                │
//!                     └──────────────────────────────────────────┘
//! ```
//!
//! Time does not enter: with the same requests and no speculation, the same experts are in the same slots, however long
//! reads take. The replayer is this very code without reads.

use super::policy::EvictPolicy;
use super::{Decayed, Key};

/// No slot, or no key.
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Without memory.
    Absent,
    Free,
    /// Its expert is being read, or will be.
    Loading,
    Ready,
    /// It has no expert any more, but reads are out or somebody holds it.
    Doomed,
}

#[derive(Clone, Debug)]
struct Slot {
    state: State,
    key: u32,
    pins: u32,
    /// Reads that are out.
    reads: u32,
    /// Loaded on a guess that has not come true so far.
    guess: bool,
}

/// What became of slots of guesses.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Guesses {
    pub used: u64,
    pub wasted: u64,
}

/// The slots and who is in them.
pub(super) struct Slots {
    /// Slot of each key.
    table: Vec<u32>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots that lost their memory.
    absent: Vec<u32>,
    /// Slots that may have memory.
    limit: usize,
    policy: Box<dyn EvictPolicy>,
    /// How much each expert was used, whatever the policy makes of it.
    used: Decayed,
    n_guesses: usize,
    pub guesses: Guesses,
    pub evictions: u64,
}

impl Slots {
    /// `limit` slots, or up to `capacity` later on.
    pub fn new(used: Decayed, policy: Box<dyn EvictPolicy>, limit: usize, capacity: usize) -> Self {
        let slot = Slot {
            state: State::Absent,
            key: NONE,
            pins: 0,
            reads: 0,
            guess: false,
        };
        let mut slots = Self {
            table: vec![NONE; used.n_experts()],
            slots: vec![slot; capacity],
            free: Vec::with_capacity(capacity),
            absent: (0..capacity as u32).rev().collect(),
            limit: 0,
            policy,
            used,
            n_guesses: 0,
            guesses: Guesses::default(),
            evictions: 0,
        };
        slots.grow(limit);
        slots
    }

    /// The slot of `key`.
    pub fn find(&self, key: Key) -> Option<u32> {
        let slot = self.table[key as usize];
        (slot != NONE).then_some(slot)
    }

    /// The expert in `slot`.
    pub fn key(&self, slot: u32) -> Option<Key> {
        let key = self.slots[slot as usize].key;
        (key != NONE).then_some(key)
    }

    pub fn is_ready(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == State::Ready
    }

    pub fn is_loading(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == State::Loading
    }

    pub fn is_doomed(&self, slot: u32) -> bool {
        self.slots[slot as usize].state == State::Doomed
    }

    pub fn is_pinned(&self, slot: u32) -> bool {
        self.slots[slot as usize].pins > 0
    }

    pub fn reads(&self, slot: u32) -> u32 {
        self.slots[slot as usize].reads
    }

    pub fn used(&self) -> &Decayed {
        &self.used
    }

    pub fn policy_name(&self) -> &'static str {
        self.policy.name()
    }

    /// Slots that may have memory.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Slots that have memory.
    pub fn n_backed(&self) -> usize {
        self.slots.len() - self.absent.len()
    }

    pub fn n_free(&self) -> usize {
        self.free.len()
    }

    /// Slots of guesses that have not come true so far.
    pub fn n_guesses(&self) -> usize {
        self.n_guesses
    }

    /// The router has chosen `key`.
    pub fn on_use(&mut self, key: Key, weight: f32, now: u64) {
        self.used.on_use(key, weight, now);
        self.policy.on_use(key, weight, now);
        if let Some(slot) = self.find(key)
            && std::mem::take(&mut self.slots[slot as usize].guess)
        {
            self.n_guesses -= 1;
            self.guesses.used += 1;
        }
    }

    /// Keeps `slot` as it is.
    pub fn pin(&mut self, slot: u32) {
        self.slots[slot as usize].pins += 1;
    }

    /// Takes one pin back; the slot is settled if it has to go.
    pub fn unpin(&mut self, slot: u32, freed: &mut impl FnMut(u32)) {
        self.slots[slot as usize].pins -= 1;
        self.settle(slot, freed);
    }

    /// A slot for `key`, which has none: a free one, or that of the expert that the policy gives up.
    pub fn admit(&mut self, key: Key) -> Option<u32> {
        debug_assert_eq!(self.find(key), None);
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = self.victim()?;
                self.evict(slot);
                slot
            }
        };
        self.enter(slot, key);
        Some(slot)
    }

    /// A slot for `key` on a guess: a free one, that of a guess that did not come true, or, as long as there are fewer
    /// than `most` guesses in slots, that of the expert that the policy gives up.
    pub fn admit_guess(&mut self, key: Key, most: usize) -> Option<u32> {
        debug_assert_eq!(self.find(key), None);
        let slot = if self.n_guesses < most {
            self.free.pop().or_else(|| self.victim())
        } else {
            self.stale_guess()
        }?;
        if self.slots[slot as usize].state == State::Ready {
            self.evict(slot);
        }
        self.enter(slot, key);
        self.slots[slot as usize].guess = true;
        self.n_guesses += 1;
        Some(slot)
    }

    /// A free slot for `key`, if there is one.
    pub fn admit_free(&mut self, key: Key) -> Option<u32> {
        debug_assert_eq!(self.find(key), None);
        let slot = self.free.pop()?;
        self.enter(slot, key);
        Some(slot)
    }

    fn enter(&mut self, slot: u32, key: Key) {
        self.table[key as usize] = slot;
        let entry = &mut self.slots[slot as usize];
        entry.state = State::Loading;
        entry.key = key;
        self.policy.on_admit(key);
    }

    fn may_go(slot: &Slot) -> bool {
        slot.state == State::Ready && slot.pins == 0
    }

    fn stale_guess(&self) -> Option<u32> {
        let stale = |slot: &Slot| slot.guess && Self::may_go(slot);
        self.slots.iter().position(stale).map(|slot| slot as u32)
    }

    /// The slot that is given up next: that of a guess that did not come true, else what the policy says.
    fn victim(&mut self) -> Option<u32> {
        if self.n_guesses > 0
            && let Some(slot) = self.stale_guess()
        {
            return Some(slot);
        }
        let mut evictable = self
            .slots
            .iter()
            .filter(|slot| Self::may_go(slot))
            .map(|slot| slot.key);
        let key = self.policy.victim(&mut evictable)?;
        Some(self.table[key as usize])
    }

    /// Takes the expert out of a slot that may go. The slot is in no list then.
    fn evict(&mut self, slot: u32) {
        assert!(Self::may_go(&self.slots[slot as usize]));
        self.forget(slot);
        self.evictions += 1;
        self.slots[slot as usize].state = State::Free;
    }

    fn forget(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        let key = std::mem::replace(&mut entry.key, NONE);
        if std::mem::take(&mut entry.guess) {
            self.n_guesses -= 1;
            self.guesses.wasted += 1;
        }
        self.table[key as usize] = NONE;
        self.policy.on_evict(key);
    }

    /// A read for `slot` goes out.
    pub fn read_out(&mut self, slot: u32) {
        self.slots[slot as usize].reads += 1;
    }

    /// A read for `slot` came back.
    pub fn read_back(&mut self, slot: u32, freed: &mut impl FnMut(u32)) {
        self.slots[slot as usize].reads -= 1;
        self.settle(slot, freed);
    }

    /// All of the expert in `slot` is there.
    pub fn complete(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        assert_eq!(entry.state, State::Loading);
        entry.state = State::Ready;
    }

    /// The expert in `slot`, which is being loaded, is not to be had, or not wanted any more.
    pub fn doom(&mut self, slot: u32, freed: &mut impl FnMut(u32)) {
        assert_eq!(self.slots[slot as usize].state, State::Loading);
        self.forget(slot);
        self.slots[slot as usize].state = State::Doomed;
        self.settle(slot, freed);
    }

    /// Frees a doomed slot that nobody uses any more, and one above the limit. `freed` is called with a slot that is
    /// to give its memory back.
    fn settle(&mut self, slot: u32, freed: &mut impl FnMut(u32)) {
        let too_many = self.n_backed() > self.limit;
        let entry = &mut self.slots[slot as usize];
        if entry.pins > 0 || entry.reads > 0 {
            return;
        }
        match entry.state {
            State::Doomed => entry.state = State::Free,
            State::Ready if too_many => self.evict(slot),
            _ => return,
        }
        if too_many {
            self.absent(slot, freed);
        } else {
            self.free.push(slot);
        }
    }

    fn absent(&mut self, slot: u32, freed: &mut impl FnMut(u32)) {
        self.slots[slot as usize].state = State::Absent;
        self.absent.push(slot);
        freed(slot);
    }

    /// Another limit and another policy, which learns who is there: the most used first.
    pub fn set_limit(&mut self, limit: usize, policy: Box<dyn EvictPolicy>, now: u64) {
        self.policy = policy;
        let mut there: Vec<Key> = self.slots.iter().map(|slot| slot.key).collect();
        there.retain(|key| *key != NONE);
        let used = |key: &Key| self.used.used(*key, now);
        there.sort_by(|a, b| used(b).total_cmp(&used(a)).then(a.cmp(b)));
        there.into_iter().for_each(|key| self.policy.on_admit(key));
        if limit > self.limit {
            self.grow(limit);
        } else {
            self.limit = limit;
        }
    }

    fn grow(&mut self, limit: usize) {
        self.limit = limit;
        while self.n_backed() < limit {
            let slot = self.absent.pop().expect("the limit is within the capacity");
            self.slots[slot as usize].state = State::Free;
            self.free.push(slot);
        }
    }

    /// Frees up to `most` slots above the limit. Those that are in use follow when they are not.
    pub fn shrink(&mut self, most: usize, freed: &mut impl FnMut(u32)) -> usize {
        for done in 0..most {
            if self.n_backed() <= self.limit {
                return done;
            }
            let slot = match self.free.pop().or_else(|| self.victim()) {
                Some(slot) => slot,
                None => return done,
            };
            if self.slots[slot as usize].state == State::Ready {
                self.evict(slot);
            }
            self.absent(slot, freed);
        }
        most
    }

    /// Slots whose load nobody waits for.
    pub fn loading_unpinned(&self) -> impl Iterator<Item = u32> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, slot)| slot.state == State::Loading && slot.pins == 0)
            .map(|(idx, _)| idx as u32)
    }

    /// Whether a slot will be free or may go without anybody's doing but that of the reads.
    pub fn will_change(&self) -> bool {
        let coming = |slot: &Slot| matches!(slot.state, State::Loading | State::Doomed);
        self.slots.iter().any(|slot| slot.pins == 0 && coming(slot))
    }

    /// What must hold at any time between two calls.
    pub fn check(&self) {
        let mut seen = vec![false; self.slots.len()];
        for slot in self.free.iter().chain(&self.absent) {
            assert!(!std::mem::replace(&mut seen[*slot as usize], true), "twice");
        }
        let mut n_guesses = 0;
        for (idx, slot) in self.slots.iter().enumerate() {
            let named = slot.key != NONE;
            match slot.state {
                State::Absent | State::Free => {
                    assert!(seen[idx], "slot {idx} leaked");
                    assert!(!named && slot.pins == 0 && slot.reads == 0 && !slot.guess);
                }
                State::Loading => assert!(named && !seen[idx]),
                State::Ready => assert!(named && !seen[idx] && slot.reads == 0),
                State::Doomed => {
                    assert!(!named && !seen[idx] && !slot.guess);
                    assert!(slot.pins + slot.reads > 0, "slot {idx} leaked");
                }
            }
            if named {
                assert_eq!(self.table[slot.key as usize] as usize, idx);
            }
            n_guesses += usize::from(slot.guess);
        }
        let mapped = self.table.iter().filter(|slot| **slot != NONE).count();
        let named = self.slots.iter().filter(|slot| slot.key != NONE).count();
        assert_eq!(mapped, named);
        assert_eq!(n_guesses, self.n_guesses);
    }
}
