//! Where the bytes of experts come from.

mod fake;
mod file;
mod sys;
#[cfg_attr(not(target_os = "linux"), path = "no_uring.rs")]
mod uring;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use fake::{FakeDisk, FaultRates};
pub(super) use file::Files;
pub(super) use uring::Ring;

use super::arena::Patch;
use crate::Error;

/// A read that is out.
pub(super) struct Job {
    pub patch: Patch,
    pub file: usize,
    pub offset: u64,
    pub needed: usize,
}

impl Job {
    /// Reads it, and waits for it.
    pub fn read(&mut self, disk: &dyn Disk) -> Result<(), Fault> {
        disk.read(self.file, self.offset, self.patch.bytes_mut(), self.needed)
    }
}

/// Reads ranges of files for several threads at once.
pub trait Disk: Send + Sync {
    /// As reports call it: `direct`, `buffered`.
    fn name(&self) -> &'static str;

    /// Fills `into` from byte `offset` of file `file`. `offset`, the length and the address of `into` are multiples of
    /// 4096. The file may end within `into`, but not before its first `needed` bytes.
    ///
    /// # Errors
    /// If the `needed` bytes are not to be had, or may be those of another file than the one that was opened.
    fn read(&self, file: usize, offset: u64, into: &mut [u8], needed: usize) -> Result<(), Fault>;

    /// What `file` is called in errors.
    fn path(&self, file: usize) -> &Path;

    /// How long reads take, if time is only imagined: then nothing reads but those who wait, and the clock is theirs.
    fn pace(&self) -> Option<Pace> {
        None
    }
}

/// Lent to a store, and kept.
impl<D: Disk> Disk for Arc<D> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn read(&self, file: usize, offset: u64, into: &mut [u8], needed: usize) -> Result<(), Fault> {
        (**self).read(file, offset, into, needed)
    }

    fn path(&self, file: usize) -> &Path {
        (**self).path(file)
    }

    fn pace(&self) -> Option<Pace> {
        (**self).pace()
    }
}

/// Why bytes could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The operating system said so: the kind, and its number.
    Os(io::ErrorKind, Option<i32>),
    /// The file ends at this byte, which it did not when it was opened.
    Short(u64),
    /// Somebody has written to the file since it was opened.
    Changed,
    /// The store was closed, or the load was given up, before the bytes came.
    Closed,
}

impl From<&io::Error> for Fault {
    fn from(error: &io::Error) -> Self {
        Fault::Os(error.kind(), error.raw_os_error())
    }
}

impl Fault {
    /// The error of a read of file `path`.
    pub(super) fn error(self, path: &Path) -> Error {
        let bad = |what: String| Error::BadFile {
            path: path.to_owned(),
            what,
        };
        match self {
            Fault::Os(_, Some(number)) => Error::io(path, io::Error::from_raw_os_error(number)),
            Fault::Os(kind, None) => Error::io(path, kind.into()),
            Fault::Short(end) => bad(format!(
                "truncated while in use: an expert was expected, the file ends at byte {end}"
            )),
            Fault::Changed => bad("written to while in use: load the model again".into()),
            Fault::Closed => Error::Cancelled,
        }
    }
}

/// A drive in imagined time. Reads are under way on several lanes at once; their latencies overlap, their bytes go
/// through one pipe, in the order in which they arrive there.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Reads that are under way at once.
    pub lanes: usize,
    /// From the request to the first byte.
    pub latency: Duration,
    /// Of the pipe.
    pub bytes_per_second: f64,
    /// The most by which a read comes later, at random: reads then end in another order than they began.
    pub jitter: Duration,
    /// How far the clock goes on with each call of the store: polls then see reads end.
    pub tick: Duration,
    /// Of the randomness.
    pub seed: u64,
}

/// A generator of numbers that look random (splitmix64): the same ones for the same seed.
#[derive(Clone, Debug)]
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..1.
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
