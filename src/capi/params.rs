//! Structs, texts and outputs of C.
#![allow(unsafe_code, reason = "pointers of C are read and written")]

use std::ffi::c_char;
use std::ptr;

use super::values::kinglet_cancel;
use super::{Failure, Outcome};

/// A struct that begins with its size.
///
/// # Safety
/// `repr(C)`, the first field is `struct_size: usize`, and the others are integers and pointers, for which any bits are
/// values.
pub(super) unsafe trait Params: Copy {
    const NAME: &'static str;
    /// Its size in the first version, from which on it has grown at its end.
    const FIRST: usize;
    /// All zeros.
    const ZERO: Self;
}

/// A struct is no larger than this in any version.
const MAX_STRUCT: usize = 4096;

/// Bytes of a text at most.
const MAX_TEXT: usize = 256 << 20;

/// Stop texts at most.
const MAX_STOPS: usize = 64;

fn check_size<T: Params>(found: usize) -> Outcome {
    if (T::FIRST..=MAX_STRUCT).contains(&found) {
        return Ok(());
    }
    let (name, expected) = (T::NAME, size_of::<T>());
    Err(Failure::argument(format!(
        "{name}.struct_size: expected {expected}, from {} in the first version to more in a later one, found {found}",
        T::FIRST
    )))
}

/// Reads a struct of parameters; `None` if there is none.
///
/// # Safety
/// `params` is null or points to as many bytes as its first field says.
pub(super) unsafe fn read<T: Params>(params: *const T) -> Outcome<Option<T>> {
    if params.is_null() {
        return Ok(None);
    }
    let bytes = params.cast::<u8>();
    // SAFETY: it begins with its size, as the caller owes.
    let found = unsafe { bytes.cast::<usize>().read_unaligned() };
    check_size::<T>(found)?;
    for at in size_of::<T>()..found {
        // SAFETY: below the size that the struct says it has.
        if unsafe { bytes.add(at).read() } != 0 {
            return Err(Failure::argument(format!(
                "{}: expected zeros in the fields that version {} does not know, found others",
                T::NAME,
                env!("CARGO_PKG_VERSION")
            )));
        }
    }
    let mut value = T::ZERO;
    // SAFETY: it has `found` bytes, and any bits are a value of `T`; what a caller does not know yet stays zero.
    unsafe {
        let known = found.min(size_of::<T>());
        ptr::copy_nonoverlapping(bytes, (&raw mut value).cast(), known);
    }
    Ok(Some(value))
}

/// A struct of the caller that will be filled.
pub(super) struct Out<T>(*mut T, usize);

impl<T: Params> Out<T> {
    /// # Safety
    /// `out` is null or points to as many bytes as its first field says, which nobody else uses until this is dropped.
    pub(super) unsafe fn of(out: *mut T) -> Outcome<Option<Self>> {
        if out.is_null() {
            return Ok(None);
        }
        // SAFETY: it begins with its size, as the caller owes.
        let found = unsafe { out.cast::<usize>().read_unaligned() };
        check_size::<T>(found)?;
        Ok(Some(Self(out, found)))
    }

    /// The same where there must be one.
    ///
    /// # Safety
    /// As [`Out::of`].
    pub(super) unsafe fn needed(out: *mut T) -> Outcome<Self> {
        // SAFETY: as the caller owes.
        let out = unsafe { Self::of(out) }?;
        out.ok_or_else(|| Failure::argument(format!("{}: expected a struct, found NULL", T::NAME)))
    }

    /// Fills it; its size stays what it was, and fields that are not known here become zero.
    pub(super) fn set(self, value: T) {
        let Self(out, size) = self;
        let (bytes, known) = (out.cast::<u8>(), size.min(size_of::<T>()));
        // SAFETY: the caller has promised `size` bytes.
        unsafe {
            ptr::copy_nonoverlapping((&raw const value).cast(), bytes, known);
            ptr::write_bytes(bytes.add(known), 0, size - known);
            out.cast::<usize>().write_unaligned(size);
        }
    }
}

/// Where a new object is put.
pub(super) struct Place<T>(*mut T);

impl<T> Place<T> {
    /// # Safety
    /// `out` is null or points to a `T` that nobody else uses until this is dropped.
    pub(super) unsafe fn needed(out: *mut T, empty: T) -> Outcome<Self> {
        if out.is_null() {
            return Err(Failure::argument("out: expected a place, found NULL"));
        }
        // SAFETY: as the caller owes.
        unsafe { out.write_unaligned(empty) };
        Ok(Self(out))
    }

    pub(super) fn set(self, value: T) {
        // SAFETY: `needed` was promised that it may be written.
        unsafe { self.0.write_unaligned(value) };
    }
}

/// A text of the caller.
///
/// # Safety
/// `text` is null or points to `len` bytes that stay as they are for `'a`.
pub(super) unsafe fn text<'a>(what: &str, text: *const c_char, len: usize) -> Outcome<&'a str> {
    if len == 0 {
        return Ok("");
    }
    if text.is_null() || len > MAX_TEXT {
        let found = if text.is_null() { "NULL" } else { "more" };
        return Err(Failure::argument(format!(
            "{what}: expected a text of at most {MAX_TEXT} bytes, found {found}"
        )));
    }
    // SAFETY: not null, and its length is below the address space.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), len) };
    std::str::from_utf8(bytes).map_err(|e| {
        Failure::argument(format!(
            "{what}: expected UTF-8, found another byte at {}",
            e.valid_up_to()
        ))
    })
}

/// Some stop texts.
///
/// # Safety
/// `stops` is null or points to `n` texts, each as [`text`] asks.
pub(super) unsafe fn stops(stops: *const kinglet_text, n: usize) -> Outcome<Vec<String>> {
    if n == 0 {
        return Ok(Vec::new());
    }
    if stops.is_null() || n > MAX_STOPS {
        return Err(Failure::argument(format!(
            "stops: expected at most {MAX_STOPS} texts, found {n} at {stops:?}"
        )));
    }
    let one = |i| {
        // SAFETY: `i` is below `n`.
        let stop = unsafe { stops.add(i).read_unaligned() };
        // SAFETY: as the caller owes.
        unsafe { text("stop", stop.text, stop.text_len) }.map(str::to_owned)
    };
    (0..n).map(one).collect()
}

macro_rules! structs {
    ($(
        $(#[$meta:meta])* $name:ident { $($field:ident: $ty:ty,)* } $(+ { $($more:ident: $more_ty:ty,)* })?
    )*) => {$(
        $(#[$meta])*
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs, reason = "kinglet.h has them")]
        #[repr(C)]
        pub struct $name { pub struct_size: usize, $(pub $field: $ty,)* $($(pub $more: $more_ty,)*)? }

        // SAFETY: the lines above, and the fields below are integers and pointers.
        unsafe impl Params for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST: usize = [$($(std::mem::offset_of!($name, $more),)*)? size_of::<$name>()][0];
            // SAFETY: integers and pointers may be zero.
            const ZERO: Self = unsafe { std::mem::zeroed() };
        }
    )*};
}

structs! {
    /// How a model is loaded.
    kinglet_model_params {
        memory: u64, degrade: u32, threads: u32, threads_batch: u32, reserved: u32, cancel: *mut kinglet_cancel,
    } + {
        repack: u32, reserved_2: u32,
    }
    /// What a model is.
    kinglet_model_info {
        n_params: u64, weight_bytes: u64, n_ctx_train: u64, n_vocab: u64, hidden: u64, n_layers: u64,
        has_chat_template: u32, threads: u32,
    }
    /// How a session is made.
    kinglet_session_params {
        n_ctx: u64, batch: u32, keys: u32, values: u32, reserved: u32,
    }
    /// What a session will take.
    kinglet_plan {
        total: u64, weights: u64, own_weights: u64, experts: u64, kv: u64, conv: u64, scratch: u64, tokenizer: u64,
        runtime: u64, program: u64, n_ctx: u64, batch: u32, keys: u32, values: u32, n_concessions: u32,
    }
    /// What a session holds.
    kinglet_session_info {
        n_ctx: u64, n_tokens: u64, n_messages: u64, kv: u64, conv: u64, scratch: u64,
    }
    /// When a reply ends.
    kinglet_generate_params {
        max_tokens: u64, stops: *const kinglet_text, n_stops: usize, ignore_end: u32, reserved: u32,
        cancel: *mut kinglet_cancel,
    } + {
        json_schema: *const c_char, json_schema_len: usize, grammar: *const c_char, grammar_len: usize,
    }
    /// What is profiled.
    kinglet_profile_params {
        n_prompt: u32, n_gen: u32,
    }
    /// How a text becomes a vector.
    kinglet_embed_params {
        pooling: u32, raw: u32, cancel: *mut kinglet_cancel,
    }
    /// What a reply was.
    kinglet_reply {
        finish: u32, reserved: u32, prompt_tokens: u64, reused_tokens: u64, reply_tokens: u64, prefill_ns: u64,
        first_token_ns: u64, decode_ns: u64,
    }
}

/// A text of the caller.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "kinglet.h has them")]
#[repr(C)]
pub struct kinglet_text {
    pub text: *const c_char,
    pub text_len: usize,
}

/// What a callback is told.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "kinglet.h has them")]
#[repr(C)]
pub struct kinglet_chunk {
    pub kind: u32,
    pub status: i32,
    pub text: *const c_char,
    pub text_len: usize,
    pub done: u64,
    pub total: u64,
}

/// A number that may be 0, which is none; reserved fields must be.
pub(super) fn flag(name: &str, value: u32) -> Outcome<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Failure::argument(format!(
            "{name}: expected 0 or 1, found {value}"
        ))),
    }
}

/// A field without a meaning yet.
pub(super) fn reserved(value: u32) -> Outcome {
    match value {
        0 => Ok(()),
        _ => Err(Failure::argument(format!(
            "reserved: expected 0, found {value}"
        ))),
    }
}
