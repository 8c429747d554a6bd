//! The memory of the experts: one anonymous mapping, cut into slots of one size. A slot goes from expert to expert by
//! a change of name; its pages go back to the system only when the budget shrinks.
//!
//! Who may touch what is checked here, whatever the store believes. A slot is handed out anew only if nobody holds a
//! [`Pin`] on it and no [`Patch`] of it is out. A patch is a range that no other patch covers, to be filled by one
//! thread. A pin shows a part only when all patches of the part have landed.
#![allow(
    unsafe_code,
    reason = "readers and I/O threads share one mapping; dropping its pages is an unsafe call of memmap2"
)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::layout::{ALIGN, MAX_PARTS, Place};
use crate::{Error, Result};

/// Of a part: bytes of it that no patch covers yet, beside the number of patches that are out.
const UNCUT: u32 = 1 << 31;
/// Of a part: a patch did not land.
const BROKEN: u32 = 1 << 30;
/// Of a slot: it is being handed out anew.
const LOCKED: u32 = u32::MAX;

/// The bytes of a patch at most: so long a read that is wanted at once waits for another.
pub(super) const PATCH_BYTES: usize = 512 << 10;

struct Arena {
    map: MmapRaw,
    slot_bytes: usize,
    slots: Box<[SlotState]>,
}

/// What the slot's readers and writers agree on.
struct SlotState {
    pins: AtomicU32,
    parts: [AtomicU32; MAX_PARTS],
}

// The mapping is only touched through `Arena::at`, under the rules of the module.
impl Arena {
    /// # Panics
    /// If `range` does not lie in a slot.
    fn at(&self, slot: u32, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.slot_bytes);
        let offset = slot as usize * self.slot_bytes + range.start;
        assert!(offset + range.len() <= self.map.len());
        // SAFETY: the offset lies in the mapping.
        unsafe { self.map.as_mut_ptr().add(offset) }
    }

    fn part(&self, slot: u32, part: usize) -> &AtomicU32 {
        &self.slots[slot as usize].parts[part]
    }
}

/// The areas of the parts in a slot.
type Areas = [Range<usize>; MAX_PARTS];

/// Who hands slots out: there is one.
pub(super) struct Writer {
    arena: Arc<Arena>,
    cuts: Vec<Cut>,
}

/// How far a slot is cut into patches.
#[derive(Clone, Default)]
struct Cut {
    areas: Areas,
    part: usize,
    /// In the area of that part.
    at: usize,
}

impl Writer {
    /// Slots for up to `wanted` experts, or for `least` if the system does not give the address space. Memory is taken
    /// when a slot is first written.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(slot_bytes: usize, wanted: usize, least: usize) -> Result<Self> {
        let map = |n: usize| {
            let bytes = slot_bytes.checked_mul(n)?;
            let mapped = MmapOptions::new().len(bytes).no_reserve_swap().map_anon();
            mapped.ok().map(|map| (MmapRaw::from(map), n))
        };
        let (map, n_slots) = map(wanted).or_else(|| map(least)).ok_or_else(|| {
            let bytes = slot_bytes.saturating_mul(least);
            let what = format!("{least} slots of experts");
            Error::OutOfMemory { what, bytes }
        })?;
        let slot = || SlotState {
            pins: AtomicU32::new(0),
            parts: [const { AtomicU32::new(UNCUT) }; MAX_PARTS],
        };
        let off = map.as_ptr().align_offset(ALIGN);
        assert_eq!(
            off, 0,
            "a mapping begins with a page, and no page is smaller"
        );
        Ok(Self {
            arena: Arc::new(Arena {
                map,
                slot_bytes,
                slots: (0..n_slots).map(|_| slot()).collect(),
            }),
            cuts: vec![Cut::default(); n_slots],
        })
    }

    /// How many slots there are.
    pub fn n_slots(&self) -> usize {
        self.cuts.len()
    }

    /// Empties `slot` for an expert with the given parts.
    ///
    /// # Panics
    /// If somebody reads or fills it, or it is too small.
    pub fn open(&mut self, slot: u32, parts: &[Place]) {
        let cut = &mut self.cuts[slot as usize];
        *cut = Cut::default();
        let mut end = 0;
        for (area, part) in cut.areas.iter_mut().zip(parts) {
            *area = end..end + part.widened();
            end = area.end;
        }
        assert!(end <= self.arena.slot_bytes, "the expert fits its slot");
        self.renew(slot, parts.len());
    }

    /// Locks `slot`, which nobody uses, and marks its first `n_parts` as not filled; the others are never shown.
    fn renew(&mut self, slot: u32, n_parts: usize) {
        let state = &self.arena.slots[slot as usize];
        let locked = state
            .pins
            .compare_exchange(0, LOCKED, Ordering::Acquire, Ordering::Relaxed);
        assert!(locked.is_ok(), "a slot that is read was handed out");
        for (idx, part) in state.parts.iter().enumerate() {
            let before = part.load(Ordering::Acquire);
            assert_eq!(
                before & !(UNCUT | BROKEN),
                0,
                "a slot that is being filled was handed out"
            );
            let after = if idx < n_parts { UNCUT } else { UNCUT | BROKEN };
            part.store(after, Ordering::Relaxed);
        }
        state.pins.store(0, Ordering::Release);
    }

    /// Gives the memory of `slot` back to the system.
    ///
    /// # Panics
    /// If somebody reads or fills it.
    pub fn discard(&mut self, slot: u32) {
        self.cuts[slot as usize] = Cut::default();
        self.renew(slot, 0);
        #[cfg(unix)]
        {
            use memmap2::UncheckedAdvice;
            #[cfg(not(target_vendor = "apple"))]
            let advice = UncheckedAdvice::DontNeed;
            #[cfg(target_vendor = "apple")]
            let advice = UncheckedAdvice::FreeReusable;
            let arena = &self.arena;
            let offset = slot as usize * arena.slot_bytes;
            // SAFETY: `renew` has seen that nobody looks at the slot and that nobody fills it, and both begin with
            // this writer. What comes back are zeros, or what was there: any bits are valid.
            let _ = unsafe {
                arena
                    .map
                    .unchecked_advise_range(advice, offset, arena.slot_bytes)
            }; // what is refused stays, and is counted as resident
        }
    }

    /// Whether all of `slot` has been cut.
    pub fn is_cut(&self, slot: u32) -> bool {
        let cut = &self.cuts[slot as usize];
        cut.areas.get(cut.part).is_none_or(|area| area.is_empty())
    }

    /// The next range of `slot` to fill, part by part.
    pub fn cut(&mut self, slot: u32) -> Option<Patch> {
        if self.is_cut(slot) {
            return None;
        }
        let Cut { areas, part, at } = &mut self.cuts[slot as usize];
        let area = &areas[*part];
        let len = PATCH_BYTES.min(area.len() - *at);
        let begin = area.start + *at;
        let patch = Patch {
            arena: Arc::clone(&self.arena),
            slot,
            part: *part,
            at: *at,
            range: begin..begin + len,
            landed: false,
        };
        let state = self.arena.part(slot, *part);
        let cut_up = *at + len == area.len();
        // One more is out; with the last one nothing is left uncut.
        state.fetch_add(1, Ordering::Relaxed);
        *at += len;
        if cut_up {
            state.fetch_and(!UNCUT, Ordering::Relaxed);
            (*part, *at) = (*part + 1, 0);
        }
        Some(patch)
    }

    /// Holds `slot` as it is.
    pub fn pin(&self, slot: u32) -> Pin {
        let state = &self.arena.slots[slot as usize];
        let before = state.pins.fetch_add(1, Ordering::Acquire);
        assert!(before < LOCKED - 1, "a slot is pinned by its one writer");
        Pin {
            arena: Arc::clone(&self.arena),
            slot,
            areas: self.cuts[slot as usize].areas.clone(),
        }
    }
}

/// A range of a slot that its holder alone may touch.
pub(super) struct Patch {
    arena: Arc<Arena>,
    slot: u32,
    part: usize,
    at: usize,
    range: Range<usize>,
    landed: bool,
}

impl Patch {
    pub fn slot(&self) -> u32 {
        self.slot
    }

    pub fn part(&self) -> usize {
        self.part
    }

    /// Where it begins in the area of its part.
    pub fn at(&self) -> usize {
        self.at
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// The memory: aligned, and as long as [`Patch::len`] says.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let start = self.arena.at(self.slot, &self.range);
        // SAFETY: the range lies in the mapping, which the `Arc` keeps and which was zeros at first. No other patch
        // covers it: `Writer::cut` moves on by what it has cut, and starts anew only when no patch is out. No slice
        // of a pin covers it: a pin shows a part only when none of its patches is out and nothing is left to cut.
        unsafe { std::slice::from_raw_parts_mut(start, self.range.len()) }
    }

    /// It is filled: shows it to readers once the rest of its part has landed too. Whether it has.
    pub fn land(mut self) -> bool {
        self.landed = true;
        let (arena, slot, part) = (Arc::clone(&self.arena), self.slot, self.part);
        drop(self);
        arena.part(slot, part).load(Ordering::Relaxed) == 0
    }
}

impl Drop for Patch {
    fn drop(&mut self) {
        let part = self.arena.part(self.slot, self.part);
        if !self.landed {
            part.fetch_or(BROKEN, Ordering::Relaxed);
        }
        part.fetch_sub(1, Ordering::Release);
    }
}

/// Keeps a slot as it is, and shows those parts of it that have landed.
pub(super) struct Pin {
    arena: Arc<Arena>,
    slot: u32,
    areas: Areas,
}

impl Pin {
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Whether all of `part` has landed.
    pub fn is_full(&self, part: usize) -> bool {
        self.arena.part(self.slot, part).load(Ordering::Acquire) == 0
    }

    /// Whether a patch of any part did not land: what is missing never comes.
    pub fn is_broken(&self) -> bool {
        let parts = (0..MAX_PARTS).filter(|part| !self.areas[*part].is_empty());
        let mut states = parts.map(|part| self.arena.part(self.slot, part));
        states.any(|state| state.load(Ordering::Acquire) & BROKEN != 0)
    }

    /// `range` of the area of `part`, if all of it has landed.
    ///
    /// # Panics
    /// If the range does not lie in the area.
    pub fn bytes(&self, part: usize, range: Range<usize>) -> Option<&[u8]> {
        if !self.is_full(part) {
            return None;
        }
        let area = &self.areas[part];
        let inner = area.start + range.start..area.start + range.end;
        assert!(inner.end <= area.end);
        let start = self.arena.at(self.slot, &inner);
        // SAFETY: the range lies in the mapping, which the `Arc` keeps. All patches of the part have landed, which the
        // acquire above has seen, and no new one is cut before the slot is opened anew, which fails while this pin
        // lives; the slice does not outlive it.
        Some(unsafe { std::slice::from_raw_parts(start, inner.len()) })
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let state = &self.arena.slots[self.slot as usize];
        state.pins.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: [Place; 2] = [
        Place {
            file: 0,
            offset: 100,
            bytes: 3 * ALIGN,
        },
        Place {
            file: 0,
            offset: 0,
            bytes: PATCH_BYTES + 1,
        },
    ];

    fn writer() -> Writer {
        let bytes = PARTS.iter().map(Place::widened).sum();
        Writer::new(bytes, 3, 2).expect("memory")
    }

    #[test]
    fn a_part_shows_when_its_last_patch_has_landed() {
        let mut writer = writer();
        writer.open(1, &PARTS);
        let pin = writer.pin(1);
        let mut patches = Vec::new();
        while let Some(mut patch) = writer.cut(1) {
            let value = patches.len() as u8 + 1;
            patch.bytes_mut().fill(value);
            patches.push(patch);
        }
        let shape: Vec<_> = patches
            .iter()
            .map(|p| (p.part(), p.at(), p.len()))
            .collect();
        let expected = [
            (0, 0, 4 * ALIGN),
            (1, 0, PATCH_BYTES),
            (1, PATCH_BYTES, ALIGN),
        ];
        assert_eq!(shape, expected);
        assert!(
            patches
                .iter_mut()
                .all(|p| p.bytes_mut().as_ptr().align_offset(ALIGN) == 0)
        );

        assert!(!patches.pop().expect("three").land());
        assert_eq!(pin.bytes(1, 0..1), None);
        assert!(patches.pop().expect("two").land());
        let part = pin.bytes(1, PATCH_BYTES - 1..PATCH_BYTES + 1);
        assert_eq!(part, Some(&[2, 3][..]));
        assert_eq!(pin.bytes(0, 0..1), None);
        drop(patches); // the first is lost
        assert!(pin.is_broken() && !pin.is_full(0) && pin.bytes(0, 0..1).is_none());
        assert!(!pin.is_full(2), "a part that the expert does not have");
    }

    #[test]
    #[should_panic(expected = "read was handed out")]
    fn a_slot_that_is_read_is_not_handed_out() {
        let mut writer = writer();
        writer.open(0, &PARTS);
        let _pin = writer.pin(0);
        writer.open(0, &PARTS);
    }

    #[test]
    #[should_panic(expected = "filled was handed out")]
    fn a_slot_that_is_being_filled_is_not_handed_out() {
        let mut writer = writer();
        writer.open(0, &PARTS);
        let _patch = writer.cut(0);
        writer.discard(0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_slot_that_was_discarded_holds_nothing() {
        let mut writer = writer();
        for slot in 0..3 {
            writer.open(slot, &PARTS);
            let mut patch = writer.cut(slot).expect("uncut");
            patch.bytes_mut().fill(7);
            patch.land();
        }
        writer.discard(1);
        for (slot, expected) in [(0, 7), (1, 0), (2, 7)] {
            writer.open(slot, &PARTS);
            let mut patch = writer.cut(slot).expect("uncut");
            assert!(patch.bytes_mut().iter().all(|byte| *byte == expected));
        }
    }
}
