//! Memory that ggml allocates, and the bytes of others that a graph reads.

#![allow(unsafe_code, reason = "calls into ggml")]

use std::ptr::NonNull;
use std::sync::Arc;

use super::sys;
use crate::error::{Error, Result};
use crate::quant::Bytes;

/// A zeroed buffer that a graph may write to. It has no methods that touch its bytes through a shared reference but
/// those of one graph, which [`super::Ggml`] makes sure of.
pub(super) struct Memory(NonNull<sys::ggml_backend_buffer>);

// SAFETY: a buffer on the CPU is a plain allocation, bound to no thread.
unsafe impl Send for Memory {}
// SAFETY: its bytes are reached only through the graph that owns it (`Owned`), and a graph is not `Sync`.
unsafe impl Sync for Memory {}

impl Memory {
    /// A buffer of `bytes` zeros, for `what`.
    pub(super) fn zeroed(bytes: usize, what: &str) -> Result<Self> {
        // SAFETY: the buffer type of the CPU is static; a refused allocation gives null.
        let buffer = unsafe {
            sys::ggml_backend_buft_alloc_buffer(sys::ggml_backend_cpu_buffer_type(), bytes)
        };
        let buffer = NonNull::new(buffer).ok_or_else(|| Error::OutOfMemory {
            what: what.into(),
            bytes,
        })?;
        let memory = Self(buffer);
        memory.clear();
        Ok(memory)
    }

    /// Zeroes all bytes.
    pub(super) fn clear(&self) {
        // SAFETY: the buffer lives as long as `self`, and nobody reads it now: see `Sync`.
        unsafe { sys::ggml_backend_buffer_clear(self.0.as_ptr(), 0) };
    }

    /// Replaces the first bytes by those of `from`.
    pub(super) fn copy_from(&mut self, from: &Memory) {
        let bytes = self.bytes().min(from.bytes());
        // SAFETY: two buffers, both of at least `bytes`.
        unsafe { std::ptr::copy_nonoverlapping(from.base(), self.base(), bytes) };
    }

    /// Its size.
    pub(super) fn bytes(&self) -> usize {
        // SAFETY: the buffer lives as long as `self`.
        unsafe { sys::ggml_backend_buffer_get_size(self.0.as_ptr()) }
    }

    /// Where it begins.
    pub(super) fn base(&self) -> *mut u8 {
        // SAFETY: the buffer lives as long as `self`.
        unsafe { sys::ggml_backend_buffer_get_base(self.0.as_ptr()) }.cast()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        unsafe { sys::ggml_backend_buffer_free(self.0.as_ptr()) };
    }
}

/// What a graph reads, held until it has run.
pub(super) enum Held {
    /// Weights in the file.
    Bytes(Bytes),
    /// Floats of a model.
    Floats(Arc<[f32]>),
    /// Tokens or positions.
    Ints(Box<[i32]>),
    /// The bits of half floats: masks.
    Halves(Box<[u16]>),
    /// Caches; the only kind that is written to.
    Memory(Arc<Memory>),
}

impl Held {
    /// Where it begins, and its size.
    pub(super) fn span(&self) -> (*const u8, usize) {
        match self {
            Held::Bytes(x) => (x.as_ptr(), x.len()),
            Held::Floats(x) => (x.as_ptr().cast(), size_of_val(&**x)),
            Held::Ints(x) => (x.as_ptr().cast(), size_of_val(&**x)),
            Held::Halves(x) => (x.as_ptr().cast(), size_of_val(&**x)),
            Held::Memory(x) => (x.base(), x.bytes()),
        }
    }
}
