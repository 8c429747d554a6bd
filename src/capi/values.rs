//! Buffers, and flags that cancel.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::c_char;
use std::sync::Arc;

use super::handle::{self, Object};
use super::params::Place;
use super::{Failure, Outcome, Status, enter, leave};
use crate::Cancel;

macro_rules! opaque {
    ($($(#[$meta:meta])* $name:ident;)*) => {$(
        $(#[$meta])*
        #[repr(C)]
        pub struct $name { _private: [u8; 0] }
    )*};
}
pub(super) use opaque;

opaque! {
    /// Bytes that the library made.
    kinglet_buffer;
    /// A flag that ends work from another thread.
    kinglet_cancel;
}

struct Buffer(Vec<u8>);

impl Object for Buffer {
    const NAME: &'static str = "buffer";
    type Opaque = kinglet_buffer;
}

impl Object for Cancel {
    const NAME: &'static str = "cancel";
    type Opaque = kinglet_cancel;
}

/// A new buffer of these bytes.
pub(super) fn give_buffer(bytes: Vec<u8>) -> Outcome<*mut kinglet_buffer> {
    handle::give(Arc::new(Buffer(bytes)))
}

/// The flag that a struct of parameters names, or one that nobody sets.
pub(super) fn cancel_of(handle: *mut kinglet_cancel) -> Outcome<Cancel> {
    let cancel = handle::get_some::<Cancel>(handle)?;
    Ok(cancel.map_or_else(Cancel::default, |cancel| (*cancel).clone()))
}

/// The bytes of a buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_buffer_data(
    buffer: *mut kinglet_buffer,
    data: *mut *const c_char,
    len: *mut usize,
) -> Status {
    enter(|| {
        let buffer = handle::get::<Buffer>(buffer)?;
        if data.is_null() || len.is_null() {
            return Err(Failure::argument(
                "data, len: expected two places, found NULL",
            ));
        }
        // SAFETY: not null, so places of the caller. The bytes stay where they are as long as the handle is good.
        unsafe {
            data.write_unaligned(buffer.0.as_ptr().cast());
            len.write_unaligned(buffer.0.len());
        }
        Ok(())
    })
}

/// Forgets a buffer.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_buffer_release(buffer: *mut kinglet_buffer) {
    leave(|| drop(handle::take::<Buffer>(buffer)));
}

/// A flag that is not set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_cancel_create(out: *mut *mut kinglet_cancel) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, std::ptr::null_mut()) }?;
        out.set(handle::give(Arc::new(Cancel::default()))?);
        Ok(())
    })
}

/// Sets a flag.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_cancel_set(cancel: *mut kinglet_cancel) -> Status {
    enter(|| {
        handle::get::<Cancel>(cancel)?.cancel();
        Ok(())
    })
}

/// Forgets a flag; who works with it still looks at it.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_cancel_release(cancel: *mut kinglet_cancel) {
    leave(|| drop(handle::take::<Cancel>(cancel)));
}
