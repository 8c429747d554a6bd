//! Systems without io_uring.

use std::io;
use std::sync::Arc;

use super::{Fault, Files, Job};

/// There is none.
pub(crate) enum Ring {}

impl Ring {
    /// # Errors
    /// Always.
    pub fn new(_files: Arc<Files>, _depth: usize) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Not called.
    pub fn is_empty(&self) -> bool {
        match *self {}
    }

    /// Not called.
    pub fn has_room(&self) -> bool {
        match *self {}
    }

    /// Not called.
    pub fn push(&mut self, _job: Job) {
        match *self {}
    }

    /// Not called.
    pub fn next(&mut self) -> (Job, Result<(), Fault>) {
        match *self {}
    }
}
