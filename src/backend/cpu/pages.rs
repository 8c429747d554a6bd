//! Memory of keys and values. What the layers of a session hold comes from mappings that they share, in which the system
//! may use large pages: with small ones a token that reads far back waits for as many look-ups of addresses.

#![allow(
    unsafe_code,
    reason = "a mapping is shared by pages that do not overlap"
)]

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapRaw};

use crate::error::{Error, Result};

/// Bytes of a large page, where the system has those of this size.
const LARGE: usize = 2 << 20;

/// Bytes of keys and values from which on mappings are as large as that, and large pages lie across the ends of what is
/// taken at a time; before, none is used that is not taken whole at once.
const MANY: usize = 32 << 20;

/// Pages begin on cache lines.
const ALIGN: usize = 64;

/// Where the layers of a session take their pages from.
#[derive(Default)]
pub(super) struct Pages(Mutex<Room>);

#[derive(Default)]
struct Room {
    /// Bytes that each layer takes at a time.
    layers: Vec<(usize, usize)>,
    last: Option<Arc<Mapping>>,
    /// Bytes of the last mapping that were taken.
    taken: usize,
    /// Of all mappings.
    mapped: usize,
    /// What was given back.
    free: Vec<Piece>,
}

/// Memory of some pages. Nothing but they look into it.
struct Mapping {
    map: MmapRaw,
    /// Where they begin.
    start: usize,
    bytes: usize,
}

/// Bytes of a mapping.
#[derive(Clone)]
struct Piece {
    mapping: Arc<Mapping>,
    at: usize,
    bytes: usize,
}

/// Bytes that are nobody else's, zeros at first.
pub(super) struct Page {
    piece: Piece,
    home: Arc<Pages>,
}

/// Bytes of memory, at most, that keys and values of so many bytes take beside themselves: of a large page.
pub(in crate::backend) fn spare_bytes(bytes: usize) -> usize {
    if bytes < MANY { 0 } else { LARGE }
}

impl Pages {
    /// That a layer will take so many bytes at a time.
    pub(super) fn expect(&self, layer: usize, bytes: usize) {
        let layers = &mut self.room().layers;
        match layers.iter_mut().find(|(known, _)| *known == layer) {
            Some((_, known)) => *known = bytes,
            None => layers.push((layer, bytes)),
        }
    }

    /// A page of so many bytes.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Result<Page> {
        let mut room = self.room();
        let page = |piece| Page {
            piece,
            home: Arc::clone(self),
        };
        if let Some(i) = room.free.iter().position(|piece| piece.bytes == bytes) {
            let mut used = page(room.free.swap_remove(i));
            used.fill(0);
            return Ok(used);
        }
        let fits = |mapping: &Arc<Mapping>| bytes <= mapping.bytes - room.taken;
        let mapping = match room.last.clone().filter(fits) {
            Some(mapping) => mapping,
            None => {
                let step: usize = room.layers.iter().map(|(_, bytes)| bytes).sum();
                let n_steps = match room.mapped < MANY {
                    true => 1,
                    false => MANY.div_ceil(step.max(1)),
                };
                let new = Arc::new(Mapping::new(bytes.max(n_steps * step))?);
                room.mapped += new.bytes;
                room.last = Some(Arc::clone(&new));
                room.taken = 0;
                new
            }
        };
        let at = room.taken;
        room.taken = mapping.bytes.min((at + bytes).next_multiple_of(ALIGN));
        Ok(page(Piece { mapping, at, bytes }))
    }

    fn room(&self) -> MutexGuard<'_, Room> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mapping {
    /// Of so many bytes.
    fn new(bytes: usize) -> Result<Self> {
        let no_memory = |_| Error::OutOfMemory {
            what: "keys and values".into(),
            bytes,
        };
        let large = bytes / LARGE * LARGE;
        let spare = if large > 0 { LARGE } else { 0 };
        let map = MmapMut::map_anon(bytes + spare).map_err(no_memory)?;
        let start = match spare {
            0 => 0,
            _ => map.as_ptr().addr().next_multiple_of(LARGE) - map.as_ptr().addr(),
        };
        // Whole ones alone: what is not taken stays without memory. Where there are none, small pages do.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, large);
        Ok(Self {
            map: map.into(),
            start,
            bytes,
        })
    }
}

impl Page {
    fn start(&self) -> *mut u8 {
        let Piece { mapping, at, .. } = &self.piece;
        mapping.map.as_mut_ptr().wrapping_add(mapping.start + at)
    }
}

impl Deref for Page {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: these bytes lie in a mapping, which is held; the system has initialized them, and no other page has them.
        unsafe { std::slice::from_raw_parts(self.start(), self.piece.bytes) }
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.piece.bytes) }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.home.room().free.push(self.piece.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_share_mappings_and_nothing_else() {
        let pages = Arc::<Pages>::default();
        // What is expected of a layer once more replaces what was.
        for (layer, bytes) in [(0, 7), (0, LARGE), (3, LARGE + 96)] {
            pages.expect(layer, bytes);
        }
        let sizes = [LARGE / 2, LARGE / 2, LARGE / 2 + 33, LARGE / 2 + 31];
        let mut step = sizes.map(|n| pages.take(n).unwrap());
        let is_same = |a: &Page, b: &Page| Arc::ptr_eq(&a.piece.mapping, &b.piece.mapping);
        assert!(is_same(&step[0], &step[3]));
        assert_eq!(step[0].as_ptr().addr() % LARGE, 0);
        for (i, page) in step.iter_mut().enumerate() {
            assert!(page.as_ptr().addr().is_multiple_of(ALIGN));
            assert_eq!(page.len(), sizes[i]);
            assert!(page.iter().all(|byte| *byte == 0), "page {i}");
            page.fill(i as u8 + 1);
        }
        for (i, page) in step.iter().enumerate() {
            assert!(page.iter().all(|byte| *byte == i as u8 + 1), "page {i}");
        }
        let more = sizes.map(|n| pages.take(n).unwrap());
        assert!(!is_same(&more[0], &step[0]) && is_same(&more[0], &more[3]));
        // A long session's mappings are those of several steps.
        let mut long = Vec::new();
        while pages.room().mapped < MANY {
            long.push(pages.take(LARGE).unwrap());
        }
        let steps = [LARGE; 9].map(|n| pages.take(n).unwrap());
        assert!(is_same(&steps[2], &steps[8]));
    }

    #[test]
    fn what_is_given_back_is_taken_again_and_all_of_it_goes_in_the_end() {
        let pages = Arc::<Pages>::default();
        pages.expect(0, 256);
        let [mut a, b] = [128, 128].map(|n| pages.take(n).unwrap());
        a.fill(1);
        let (first, memory) = (a.as_ptr(), Arc::downgrade(&a.piece.mapping));
        drop(a);
        let other = pages.take(99).unwrap();
        assert!(!Arc::ptr_eq(&other.piece.mapping, &b.piece.mapping));
        let again = pages.take(128).unwrap();
        assert_eq!(again.as_ptr(), first);
        assert!(again.iter().all(|byte| *byte == 0));
        drop((again, other, pages));
        assert!(memory.upgrade().is_some());
        drop(b);
        assert!(memory.upgrade().is_none());
    }

    #[test]
    fn no_memory_is_an_error() {
        let pages = Arc::<Pages>::default();
        let refused = pages
            .take(usize::MAX / 4)
            .err()
            .expect("more than there is");
        assert!(refused.to_string().contains("keys and values"), "{refused}");
        assert_eq!(pages.take(10).unwrap().len(), 10);
    }
}
