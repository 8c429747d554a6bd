//! What one layer asked for: experts that are held until the request ends.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Class;
use super::arena::Pin;
use super::layout::Place;
use super::store::{Room, Shared};
use crate::Result;

/// One expert of a request.
pub(super) struct Entry {
    pub expert: u32,
    /// Whether it was there, or on its way.
    pub hit: bool,
    /// `None` only while the request is being made.
    pub pin: Option<Pin>,
}

/// Experts of a layer, held in their slots until this is dropped. All methods may be called from several threads.
/// Experts are counted in the order in which they were asked for, parts as in the layout.
///
/// An expert that could not be read is an error of those requests that asked for it; the next one tries again.
pub struct Request {
    shared: Arc<Shared>,
    layer: usize,
    number: Option<u64>,
    entries: Vec<Entry>,
    /// Nothing is read before somebody asks.
    held: AtomicBool,
}

impl Request {
    pub(super) fn new(shared: Arc<Shared>, layer: usize) -> Self {
        Self {
            shared,
            layer,
            number: None,
            entries: Vec::new(),
            held: AtomicBool::new(false),
        }
    }

    pub(super) fn opened(&mut self, number: u64, entries: Vec<Entry>, held: bool) {
        self.number = Some(number);
        self.entries = entries;
        *self.held.get_mut() = held;
    }

    pub(super) fn entries_mut(&mut self) -> &mut [Entry] {
        &mut self.entries
    }

    /// The layer.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// How many experts there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The id of expert `j`.
    pub fn expert(&self, j: usize) -> u32 {
        self.entries[j].expert
    }

    /// Whether expert `j` was there, or on its way, when it was asked for.
    pub fn is_hit(&self, j: usize) -> bool {
        self.entries[j].hit
    }

    fn pin(&self, j: usize) -> &Pin {
        let pin = &self.entries[j].pin;
        pin.as_ref()
            .expect("a finished request holds all its experts")
    }

    /// Where `part` of expert `j` lies in its area.
    fn range(&self, j: usize, part: usize) -> Range<usize> {
        let layout = &self.shared.layout;
        let place: Place = layout.place(layout.key(self.layer, self.entries[j].expert), part);
        place.skip()..place.skip() + place.bytes
    }

    fn start(&self) {
        if self.held.load(Ordering::Relaxed) && self.held.swap(false, Ordering::Relaxed) {
            self.shared.start(&self.entries);
        }
    }

    /// Whether [`Request::wait`] returns at once: the part is there, or could not be read.
    pub fn ready(&self, j: usize, part: usize) -> bool {
        self.start();
        self.shared.look();
        let pin = self.pin(j);
        pin.is_full(part) || pin.is_broken()
    }

    /// The bytes of `part` of expert `j`, if they are there. They lie where the file has them relative to a block of
    /// 4096 bytes, so they are aligned as in the file.
    pub fn get(&self, j: usize, part: usize) -> Option<&[u8]> {
        self.pin(j).bytes(part, self.range(j, part))
    }

    /// The same, read at once and waited for if they are not there.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if the system could not read them, [`crate::Error::BadFile`] if the file was truncated or
    /// written to, [`crate::Error::Cancelled`] if the store was closed.
    pub fn wait(&self, j: usize, part: usize) -> Result<&[u8]> {
        self.start();
        if let Some(bytes) = self.get(j, part) {
            return Ok(bytes);
        }
        self.shared.wait(self.pin(j), part)?;
        Ok(self.get(j, part).expect("a part that has landed stays"))
    }

    /// Lets go of the experts; so does dropping it.
    pub fn end(self) {}
}

impl Drop for Request {
    fn drop(&mut self) {
        let entries = std::mem::take(&mut self.entries);
        self.shared.end(self.number, entries);
    }
}

/// Experts of a layer that are more than the slots hold, in groups: while one is computed, the next is read, if there is
/// room for it. For one of several sessions, as [`ExpertStore::begin_in_turn`](super::ExpertStore::begin_in_turn).
///
/// ```text
/// for wave in store.waves(layer, &ids, &weights)? {
///     let wave = wave?;             // the next wave is being read
///     …                             // compute it
/// }                                 // drop it before asking for the next
/// ```
pub struct Waves {
    shared: Arc<Shared>,
    layer: usize,
    ids: Vec<u32>,
    weights: Vec<f32>,
    /// Experts that were not asked for so far begin here.
    at: usize,
    next: Option<Request>,
}

impl Waves {
    pub(super) fn new(shared: Arc<Shared>, layer: usize, order: Vec<(u32, f32)>) -> Self {
        let (ids, weights) = order.into_iter().unzip();
        Self {
            shared,
            layer,
            ids,
            weights,
            at: 0,
            next: None,
        }
    }

    /// All experts, in the order in which they come.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn begin(&mut self, room: Room) -> Option<Result<Request>> {
        loop {
            // Slots may have become fewer.
            let size = self.shared.wave();
            let end = self.ids.len().min(self.at + size);
            let wave = self.at..end;
            if wave.is_empty() {
                return None;
            }
            let (ids, weights) = (&self.ids[wave.clone()], &self.weights[wave]);
            let (shared, layer) = (&self.shared, self.layer);
            let request = Shared::begin(shared, layer, ids, weights, Class::Exact, room);
            if request.is_ok() {
                self.at = end;
            } else if room == Room::InTurn && self.shared.wave() < size {
                continue;
            }
            return Some(request);
        }
    }
}

impl Iterator for Waves {
    type Item = Result<Request>;

    fn next(&mut self) -> Option<Self::Item> {
        let wave = match self.next.take() {
            Some(wave) => Ok(wave),
            None => self.begin(Room::InTurn)?,
        };
        if wave.is_ok() {
            self.next = self.begin(Room::Now).and_then(Result::ok);
        }
        Some(wave)
    }
}
