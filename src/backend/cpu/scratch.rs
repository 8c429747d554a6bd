//! Buffers for activations: taken from a free list, given back when dropped, so steady decode allocates nothing.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

use bytemuck::{Pod, Zeroable};

/// A cache line of floats: buffers start on one.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Free buffers.
type FreeList = Mutex<Vec<Vec<Line>>>;

/// The free list of one backend.
#[derive(Clone, Default)]
pub(crate) struct Scratch {
    free: Arc<FreeList>,
}

/// Some floats of unspecified value.
pub(crate) struct Buffer {
    lines: Vec<Line>,
    len: usize,
    home: Arc<FreeList>,
}

impl Scratch {
    /// A buffer of `len` floats, the smallest free one that fits.
    pub(crate) fn take(&self, len: usize) -> Buffer {
        let n_lines = len.div_ceil(16);
        let mut free = self
            .free
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let fitting = free
            .iter()
            .enumerate()
            .filter(|(_, lines)| lines.len() >= n_lines);
        let smallest = fitting.min_by_key(|(_, lines)| lines.len()).map(|(i, _)| i);
        let lines = match smallest {
            Some(i) => free.swap_remove(i),
            // None fits: let the largest one grow rather than keep both.
            None => {
                let largest = free
                    .iter()
                    .enumerate()
                    .max_by_key(|(_, lines)| lines.len())
                    .map(|(i, _)| i);
                drop(largest.map(|i| free.swap_remove(i)));
                vec![Line::zeroed(); n_lines]
            }
        };
        Buffer {
            lines,
            len,
            home: Arc::clone(&self.free),
        }
    }
}

impl Scratch {
    /// Bytes of the free buffers; between operations of a forward pass some are in use.
    pub(crate) fn bytes(&self) -> usize {
        let free = self
            .free
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        free.iter().map(|lines| size_of_val(&**lines)).sum()
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

impl Drop for Buffer {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        self.home
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .push(lines);
    }
}
