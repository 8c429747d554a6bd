//! The C interface: `kinglet.h`, which is its manual, over the public interface of this crate.
//!
//! Functions here convert and catch, no more: arguments to values (`params.rs`), handles to objects (`handle.rs`), errors
//! and panics to a status. What a handle names is in the file of its noun.
#![allow(unsafe_code, reason = "names are exported, which others could have")]
#![allow(non_camel_case_types, reason = "types have the names of C")]
#![allow(
    clippy::missing_safety_doc,
    reason = "what each function asks of its caller is said in kinglet.h"
)]

mod handle;
mod model;
mod params;
mod profile;
mod request;
mod runtime;
mod session;
mod text;
mod values;

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

pub use self::model::*;
pub use self::params::*;
pub use self::profile::*;
pub use self::request::*;
pub use self::runtime::*;
pub use self::session::*;
pub use self::text::*;
pub use self::values::*;

use crate::{DeviceFault, Error};

macro_rules! statuses {
    ($($name:ident = $value:literal, $c:literal;)*) => {
        /// `kinglet_status`.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[allow(missing_docs, reason = "kinglet.h has them")]
        #[repr(i32)]
        pub enum Status { $($name = $value,)* }

        /// The name of a status.
        #[unsafe(no_mangle)]
        pub extern "C" fn kinglet_status_name(status: i32) -> *const c_char {
            match status {
                $($value => $c.as_ptr(),)*
                _ => c"unknown".as_ptr(),
            }
        }
    };
}

statuses! {
    Ok = 0, c"KINGLET_OK";
    Argument = 1, c"KINGLET_E_ARGUMENT";
    Handle = 2, c"KINGLET_E_HANDLE";
    Busy = 3, c"KINGLET_E_BUSY";
    Cancelled = 4, c"KINGLET_E_CANCELLED";
    Timeout = 5, c"KINGLET_E_TIMEOUT";
    Io = 6, c"KINGLET_E_IO";
    File = 7, c"KINGLET_E_FILE";
    Unsupported = 8, c"KINGLET_E_UNSUPPORTED";
    Template = 9, c"KINGLET_E_TEMPLATE";
    ContextFull = 10, c"KINGLET_E_CONTEXT_FULL";
    Memory = 11, c"KINGLET_E_MEMORY";
    Budget = 12, c"KINGLET_E_BUDGET";
    Backend = 13, c"KINGLET_E_BACKEND";
    Panic = 14, c"KINGLET_E_PANIC";
    Poisoned = 15, c"KINGLET_E_POISONED";
    Space = 16, c"KINGLET_E_SPACE";
}

/// Why a call did not succeed.
#[derive(Clone, Debug)]
struct Failure {
    status: Status,
    message: String,
}

impl Failure {
    fn new(status: Status, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    fn argument(message: impl Into<String>) -> Self {
        Self::new(Status::Argument, message)
    }

    fn panic(payload: Box<dyn Any + Send>) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or(payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("without a message");
        Self::new(Status::Panic, format!("panic: {text}"))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. } => Status::Io,
            Error::BadFile { .. } | Error::BadModel(_) | Error::Mismatch { .. } => Status::File,
            Error::Unsupported { .. } => Status::Unsupported,
            Error::Template(_) => Status::Template,
            Error::ContextFull { .. } => Status::ContextFull,
            Error::OutOfMemory { .. } => Status::Memory,
            Error::Device { fault, .. } if *fault == DeviceFault::OutOfMemory => Status::Memory,
            Error::OverBudget { .. } => Status::Budget,
            Error::Backend(_) | Error::Device { .. } => Status::Backend,
            Error::Invalid(_) | Error::Grammar(_) => Status::Argument,
            Error::Cancelled => Status::Cancelled,
        };
        Self::new(status, error.to_string())
    }
}

type Outcome<T = ()> = Result<T, Failure>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function.
fn enter(body: impl FnOnce() -> Outcome) -> Status {
    let done = catch_unwind(AssertUnwindSafe(body));
    match done.unwrap_or_else(|payload| Err(Failure::panic(payload))) {
        Ok(()) => Status::Ok,
        Err(Failure { status, message }) => {
            let message = CString::new(message.replace('\0', " ")).expect("zeros are replaced");
            // A thread that is ending has no place for it.
            let _ = LAST.try_with(|last| *last.borrow_mut() = message);
            status
        }
    }
}

/// Runs the body of a release function, of which nobody hears.
fn leave(body: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(body));
}

/// The message of the last failure on this thread.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_error_last() -> *const c_char {
    let last = LAST.try_with(|last| last.borrow().as_ptr());
    last.unwrap_or(c"".as_ptr())
}

/// The version of the library.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_version() -> *const c_char {
    const VERSION: &CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => panic!("one zero, at the end"),
        };
    VERSION.as_ptr()
}
