//! Buffers for activations: taken from a free list, given back when dropped, so steady decode allocates nothing.
//!
//! The list is generic over what a buffer is made of: lines of floats, or their number alone, with which the planner
//! runs the same list on sizes.

use std::ops::{Deref, DerefMut};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard};

use bytemuck::{Pod, Zeroable};

use crate::backend::NoMemory;

/// A cache line of floats: buffers start on one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line([f32; 16]);

/// What a buffer is made of.
pub(crate) trait Lines: Default {
    /// `n` lines of zeros, if there is memory for them.
    fn zeroed(n: usize) -> Option<Self>;

    /// How many there are.
    fn count(&self) -> usize;
}

impl Lines for Vec<Line> {
    fn zeroed(n: usize) -> Option<Self> {
        let mut lines = Vec::new();
        lines.try_reserve_exact(n).ok()?;
        lines.resize(n, Line::zeroed());
        Some(lines)
    }

    fn count(&self) -> usize {
        self.len()
    }
}

/// Lines that are only counted.
impl Lines for usize {
    fn zeroed(n: usize) -> Option<Self> {
        Some(n)
    }

    fn count(&self) -> usize {
        *self
    }
}

/// Free buffers, and the lines of all, free or taken: these never get fewer.
#[derive(Default)]
struct Account<L> {
    free: Vec<L>,
    held: usize,
}

/// The free list of one backend.
pub(crate) struct Scratch<L = Vec<Line>> {
    account: Arc<Mutex<Account<L>>>,
}

impl<L: Lines> Default for Scratch<L> {
    fn default() -> Self {
        Self {
            account: Arc::default(),
        }
    }
}

/// Some floats of unspecified value.
pub(crate) struct Buffer<L: Lines = Vec<Line>> {
    lines: L,
    len: usize,
    home: Arc<Mutex<Account<L>>>,
}

fn lock<L>(account: &Mutex<Account<L>>) -> MutexGuard<'_, Account<L>> {
    account
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<L: Lines> Scratch<L> {
    /// A buffer of `len` floats, the smallest free one that fits.
    pub(crate) fn take(&self, len: usize) -> Buffer<L> {
        let n_lines = len.div_ceil(16);
        let mut account = lock(&self.account);
        let sizes = || account.free.iter().map(L::count).enumerate();
        let smallest = sizes()
            .filter(|(_, n)| *n >= n_lines)
            .min_by_key(|(_, n)| *n);
        let lines = match smallest {
            Some((i, _)) => account.free.swap_remove(i),
            // None fits: let the largest one grow rather than keep both.
            None => {
                let largest = sizes().max_by_key(|(_, n)| *n);
                let dropped = largest.map(|(i, _)| account.free.swap_remove(i));
                account.held -= dropped.as_ref().map_or(0, L::count);
                drop(dropped);
                let lines = L::zeroed(n_lines);
                let lines = lines.unwrap_or_else(|| {
                    let bytes = n_lines * size_of::<Line>();
                    resume_unwind(Box::new(NoMemory { bytes }))
                });
                account.held += n_lines;
                lines
            }
        };
        Buffer {
            lines,
            len,
            home: Arc::clone(&self.account),
        }
    }

    /// Makes what buffers of `lens`, held together, take: then they are there whichever thread is faster, and a worker
    /// never meets missing memory.
    pub(crate) fn reserve(&self, lens: impl IntoIterator<Item = usize>) {
        self.hold(&mut lens.into_iter());
    }

    /// Takes them one inside of the other: a list of those held would be allocated.
    fn hold(&self, lens: &mut dyn Iterator<Item = usize>) {
        if let Some(len) = lens.next() {
            let _held = self.take(len);
            self.hold(lens);
        }
    }

    /// Bytes of all buffers, in use or not.
    pub(crate) fn bytes(&self) -> usize {
        lock(&self.account).held * size_of::<Line>()
    }
}

impl Deref for Buffer {
    type Target = [f32];
    #[inline]
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<L: Lines> Drop for Buffer<L> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        lock(&self.home).free.push(lines);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn buffers_are_taken_again_and_counted() {
        let scratch = Scratch::<Vec<Line>>::default();
        drop((scratch.take(100), scratch.take(30)));
        let held = scratch.bytes();
        assert_eq!(held, (7 + 2) * 64);
        // The smallest that fits; the largest grows where none does.
        assert_eq!(scratch.take(32).lines.len(), 2);
        assert_eq!(scratch.take(33).lines.len(), 7);
        drop(scratch.take(1000));
        assert_eq!(scratch.bytes(), (63 + 2) * 64);
        // On sizes alone it is the same list.
        let planned = Scratch::<usize>::default();
        drop((planned.take(100), planned.take(30)));
        drop(planned.take(1000));
        assert_eq!(planned.bytes(), scratch.bytes());
    }

    #[test]
    fn what_cannot_be_had_unwinds_and_the_list_lives_on() {
        let scratch = Scratch::<Vec<Line>>::default();
        drop(scratch.take(100));
        let asked = AssertUnwindSafe(|| drop(scratch.take(usize::MAX / 128 * 16)));
        let payload = catch_unwind(asked).expect_err("more than there are addresses");
        let no_memory = payload.downcast::<NoMemory>().ok();
        assert!(no_memory.is_some_and(|no_memory| no_memory.bytes > 1 << 50));
        assert_eq!(scratch.bytes(), 0);
        drop(scratch.take(16));
        assert_eq!(scratch.bytes(), 64);
    }
}
