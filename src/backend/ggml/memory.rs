//! Memory that ggml allocates, and the bytes of others that a graph reads.

#![allow(unsafe_code, reason = "calls into ggml")]

use std::ffi::{CStr, c_void};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use super::graph::Arena;
use super::sys;
use crate::error::{Error, Result};
use crate::quant::Bytes;

/// A buffer: a cache, which only the graphs of one [`super::Ggml`] read and write, or weights, which nobody writes.
pub(super) struct Memory(NonNull<sys::ggml_backend_buffer>);

// SAFETY: a buffer on the CPU is a plain allocation, bound to no thread.
unsafe impl Send for Memory {}
// SAFETY: the bytes of a cache are reached through the backend that owns it alone, and a backend is not `Sync`; those
// of weights are only read.
unsafe impl Sync for Memory {}

impl Memory {
    /// A buffer of `bytes` zeros, for `what`.
    pub(super) fn zeroed(bytes: usize, what: &str) -> Result<Self> {
        // SAFETY: the buffer type of the CPU is static.
        let memory = unsafe { Self::of(sys::ggml_backend_cpu_buffer_type(), bytes, what)? };
        memory.clear();
        Ok(memory)
    }

    /// A buffer of a type.
    ///
    /// # Safety
    /// `kind` is one.
    unsafe fn of(kind: sys::ggml_backend_buffer_type_t, bytes: usize, what: &str) -> Result<Self> {
        // SAFETY: as the caller says; a refused allocation gives null.
        let buffer = unsafe { sys::ggml_backend_buft_alloc_buffer(kind, bytes) };
        let refused = || Error::OutOfMemory {
            what: what.into(),
            bytes,
        };
        NonNull::new(buffer).map(Self).ok_or_else(refused)
    }

    fn ptr(&self) -> *mut sys::ggml_backend_buffer {
        self.0.as_ptr()
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

    /// Fills `out` with the bytes from `at`.
    pub(super) fn read(&self, at: usize, out: &mut [u8]) {
        let inside = at
            .checked_add(out.len())
            .is_some_and(|end| end <= self.bytes());
        assert!(inside, "bytes of a buffer");
        // SAFETY: the range lies in the buffer, as was just checked, and nobody writes to it now: see `Sync`.
        unsafe { std::ptr::copy_nonoverlapping(self.base().add(at), out.as_mut_ptr(), out.len()) };
    }

    /// Puts `bytes` at `at`.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        let inside = at
            .checked_add(bytes.len())
            .is_some_and(|end| end <= self.bytes());
        assert!(inside, "bytes of a buffer");
        // SAFETY: the range lies in the buffer, as was just checked, and nobody reads it now: see `Sync`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base().add(at), bytes.len()) };
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

/// A weight matrix in the layout that ggml's fastest kernels for this CPU want: what llama.cpp makes of the weights of a
/// model unless it is told not to.
pub(super) struct Repacked {
    memory: Arc<Memory>,
    /// The kernels, for [`sys::ggml_tensor::extra`].
    kernels: *mut c_void,
}

// SAFETY: nobody writes to it, and ggml's tables of kernels are static.
unsafe impl Send for Repacked {}
// SAFETY: as above.
unsafe impl Sync for Repacked {}

impl Repacked {
    /// The weights `(n_in, n_out)` in the first layout that takes them, in the order in which llama.cpp tries layouts;
    /// `None` if none does.
    pub(super) fn new(kind: u32, [n_in, n_out]: [usize; 2], data: &[u8]) -> Result<Option<Self>> {
        let arena = Arena::new(Arena::bytes_of(4));
        let context = arena.context();
        // SAFETY: the context has room for three tensors; sizes were checked when the matrix was made.
        let (weight, product) = unsafe {
            let weight = sys::ggml_new_tensor_2d(context, kind, n_in as i64, n_out as i64);
            let x = sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_F32, n_in as i64, 512);
            (weight, sys::ggml_mul_mat(context, weight, x))
        };
        for layout in layouts() {
            // SAFETY: a buffer of no bytes stands for those of its type, while the device looks at it.
            let supported = unsafe {
                let probe = sys::ggml_backend_buft_alloc_buffer(*layout, 0);
                (*weight).buffer = probe;
                let device = sys::ggml_backend_reg_dev_get(sys::ggml_backend_cpu_reg(), 0);
                let supported = sys::ggml_backend_dev_supports_op(device, product);
                (*weight).buffer = std::ptr::null_mut();
                sys::ggml_backend_buffer_free(probe);
                supported
            };
            if !supported {
                continue;
            }
            // SAFETY: the buffer is as large as the layout wants it for this tensor, and `data` is the whole of it.
            return unsafe {
                let bytes = sys::ggml_backend_buft_get_alloc_size(*layout, weight);
                let memory = Memory::of(*layout, bytes, "repacked weights")?;
                assert_eq!(sys::ggml_nbytes(weight), data.len(), "whole rows");
                let status =
                    sys::ggml_backend_tensor_alloc(memory.ptr(), weight, memory.base().cast());
                if status != sys::GGML_STATUS_SUCCESS {
                    return Err(Error::Backend(format!("ggml: status {status} of a layout")));
                }
                sys::ggml_backend_tensor_set(weight, data.as_ptr().cast(), 0, data.len());
                Ok(Some(Self {
                    memory: Arc::new(memory),
                    kernels: (*weight).extra,
                }))
            };
        }
        Ok(None)
    }

    /// The buffer, for [`Held`].
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Makes `tensor`, of the same format and size, stand for these weights.
    pub(super) fn give(&self, tensor: &mut sys::ggml_tensor) {
        tensor.buffer = self.memory.ptr();
        tensor.data = self.memory.base().cast();
        tensor.extra = self.kernels;
    }
}

/// The layouts of this build for this CPU, best first; that for AMX only if the build script trusts the compiler.
fn layouts() -> &'static [sys::ggml_backend_buffer_type_t] {
    static LAYOUTS: OnceLock<Layouts> = OnceLock::new();
    struct Layouts(Vec<sys::ggml_backend_buffer_type_t>);
    // SAFETY: buffer types are static and constant.
    unsafe impl Send for Layouts {}
    // SAFETY: as above.
    unsafe impl Sync for Layouts {}

    let find = || {
        // SAFETY: the function has this type, as its header says; it returns an array that ends with null, or null.
        unsafe {
            let registry = sys::ggml_backend_cpu_reg();
            let name = c"ggml_backend_dev_get_extra_bufts";
            let function = sys::ggml_backend_reg_get_proc_address(registry, name.as_ptr());
            let function: sys::ggml_backend_dev_get_extra_bufts_t = std::mem::transmute(function);
            let first = function.map(|f| f(sys::ggml_backend_reg_dev_get(registry, 0)));
            let first = first.filter(|first| !first.is_null());
            let all = (0..).map_while(|i| Some(*first?.add(i)).filter(|layout| !layout.is_null()));
            let usable = |layout: &sys::ggml_backend_buffer_type_t| {
                cfg!(ggml_amx) || CStr::from_ptr(sys::ggml_backend_buft_name(*layout)) != c"AMX"
            };
            Layouts(all.filter(usable).collect())
        }
    };
    &LAYOUTS.get_or_init(find).0
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
