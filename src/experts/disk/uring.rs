//! io_uring: one thread keeps several reads under way. What the ring does not do in one go, a plain read does again, so
//! errors are those of plain reads.
//!
//! Source: "Efficient IO with io_uring" (Axboe, 2019).
#![allow(
    unsafe_code,
    reason = "the kernel writes into memory that the ring holds"
)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, types::Fd};

use super::{Fault, Files, Job};

/// Reads that are under way.
pub(crate) struct Ring {
    ring: IoUring,
    files: Arc<Files>,
    /// By the number that the kernel knows a read by.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
}

impl Ring {
    /// For up to `depth` reads of `files` at once.
    ///
    /// # Errors
    /// If the system has no such rings, or not for this process.
    pub fn new(files: Arc<Files>, depth: usize) -> io::Result<Self> {
        let entries = depth.next_power_of_two() as u32;
        Ok(Self {
            ring: IoUring::new(entries)?,
            files,
            jobs: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
        })
    }

    /// Whether no read is under way.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.jobs.len()
    }

    /// Whether one more read may be.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Prepares a read; [`Ring::next`] sends it.
    pub fn push(&mut self, mut job: Job) {
        let id = self.free.pop().expect("has_room() was asked");
        let fd = Fd(self.files.descriptor(job.file).as_raw_fd());
        let bytes = job.patch.bytes_mut();
        let len = u32::try_from(bytes.len()).expect("a piece has at most 512 KiB");
        let read = opcode::Read::new(fd, bytes.as_mut_ptr(), len);
        let read = read.offset(job.offset).build().user_data(id as u64);
        self.jobs[id] = Some(job);
        // SAFETY: the bytes are those of a patch: nobody else touches them, and they stay where they are, in a mapping that
        // the patch keeps, until the kernel has answered. The patch is in `jobs` until then, or for ever, see `drop`.
        // The descriptor belongs to `files`. There are at least as many entries as jobs, and each is taken up at once.
        unsafe { self.ring.submission().push(&read) }.expect("an entry for each job");
    }

    /// Sends what was pushed and waits until a read ends.
    pub fn next(&mut self) -> (Job, Result<(), Fault>) {
        loop {
            let done = self.ring.completion().next();
            if let Some(done) = done {
                let id = done.user_data() as usize;
                let mut job = self.jobs[id].take().expect("the kernel answers once");
                self.free.push(id);
                let read = usize::try_from(done.result()).unwrap_or(0);
                let outcome = if read >= job.needed {
                    self.files.check(job.file, job.offset, read, job.needed)
                } else {
                    job.read(&*self.files)
                };
                return (job, outcome);
            }
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => {
                    // Not seen; reads that are out stay so, and the thread waits as for a drive that does not answer.
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                _ => {}
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.is_empty() && !std::thread::panicking() {
            let _ = self.next(); // nobody wants it any more
        }
        // The kernel may still write there.
        self.jobs.drain(..).flatten().for_each(std::mem::forget);
    }
}
