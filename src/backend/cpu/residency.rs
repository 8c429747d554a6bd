//! Which weights stay in memory. Those that are loaded first stay, up to a limit; what lies beyond is streamed: read
//! ahead of the operation that needs it, dropped behind each task. A cycle through more than fits would push out
//! exactly what is needed next if the system chose, so the choice is ours.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::{Error, Result};
use crate::quant::Bytes;

/// Bytes that are read ahead of the operation that runs.
const READ_AHEAD: usize = 4 << 20;

/// The weights of a model in the order in which they were loaded, and how many of them stay.
#[derive(Default)]
pub struct Residency {
    /// Bytes from the first weight on that stay.
    limit: AtomicUsize,
    order: Mutex<Vec<Bytes>>,
    own: Option<Own>,
}

/// Weights in memory of our own: pages of a file go first where memory is short, however often they are used, and each
/// that is used again is waited for.
#[derive(Default)]
struct Own {
    /// What is left in the file.
    table: Option<Arc<FileTable>>,
    /// Where copied weights were, and the copies.
    copies: Mutex<Vec<(usize, Bytes)>>,
}

/// A table that is left in its file, of which rows are read when they are used.
pub struct FileTable {
    /// The name of the tensor.
    pub name: String,
    /// The file, for errors.
    pub path: PathBuf,
    /// The file.
    pub file: File,
    /// Where it begins.
    pub offset: u64,
}

impl FileTable {
    /// Reads `out.len()` bytes from `at`, counted from the start of the table.
    ///
    /// # Errors
    /// If they cannot be read, or the file has become shorter.
    pub(super) fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        let at = self.offset + at as u64;
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, out, at);
        #[cfg(not(unix))]
        let read = {
            use std::io::{Read, Seek, SeekFrom};
            let mut file = &self.file;
            file.seek(SeekFrom::Start(at))
                .and_then(|_| file.read_exact(out))
        };
        read.map_err(|e| Error::io(&self.path, e))
    }
}

/// Aligned as kernels like it, and for every format.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

struct Lines(Vec<Line>);

impl AsRef<[u8]> for Lines {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The place of some weights in that order.
#[derive(Clone)]
pub(super) struct Place {
    residency: Arc<Residency>,
    idx: usize,
    /// Bytes up to their end.
    end: usize,
    /// Where their rows are read if that is not memory.
    table: Option<Arc<FileTable>>,
}

impl Residency {
    /// Everything stays.
    pub fn unlimited() -> Self {
        Self {
            limit: AtomicUsize::new(usize::MAX),
            ..Self::default()
        }
    }

    /// Everything is copied to memory of our own when it is loaded, but for a `table`, which stays in its file. Nothing is
    /// read by way of a map then, so a file that somebody cuts short is an error and no signal.
    pub fn owned(table: Option<FileTable>) -> Self {
        Self {
            own: Some(Own {
                table: table.map(Arc::new),
                copies: Mutex::default(),
            }),
            ..Self::unlimited()
        }
    }

    /// Bytes of copies.
    pub fn owned_bytes(&self) -> u64 {
        let copies = self.own.iter().flat_map(|own| lock(&own.copies).clone());
        copies.map(|(_, copy)| copy.len() as u64).sum()
    }

    /// Where the weights `name` are read that the file has as `weights`.
    ///
    /// # Errors
    /// If there is no memory for a copy.
    pub(super) fn place(self: &Arc<Self>, name: &str, weights: &Bytes) -> Result<(Bytes, Place)> {
        let Some(own) = &self.own else {
            return Ok((weights.clone(), self.enter(weights)));
        };
        let table = own.table.as_ref().filter(|table| table.name == name);
        let place = Place {
            table: table.cloned(),
            ..self.outside()
        };
        match table {
            Some(_) => Ok((weights.clone(), place)),
            None => Ok((own.copy(name, weights)?, place)),
        }
    }

    /// Lets the first `bytes` stay, and drops what is in memory of the others.
    pub fn limit(&self, bytes: usize) {
        self.limit.store(bytes, Ordering::Relaxed);
        let mut end = 0;
        for weights in self.order().iter() {
            end += weights.len();
            if end > bytes {
                weights.release(0..weights.len());
            }
        }
    }

    fn order(&self) -> MutexGuard<'_, Vec<Bytes>> {
        lock(&self.order)
    }

    /// A place for weights that are not read from the map.
    pub(super) fn outside(self: &Arc<Self>) -> Place {
        Place {
            residency: Arc::clone(self),
            idx: 0,
            end: 0,
            table: None,
        }
    }

    /// Enters `weights`. A table that is the head too has one place.
    fn enter(self: &Arc<Self>, weights: &Bytes) -> Place {
        let mut order = self.order();
        let same = |entered: &Bytes| entered.as_ptr() == weights.as_ptr();
        let idx = order.iter().position(same).unwrap_or_else(|| {
            order.push(weights.clone());
            order.len() - 1
        });
        Place {
            residency: Arc::clone(self),
            idx,
            end: order[..=idx].iter().map(|weights| weights.len()).sum(),
            table: None,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Bytes that are copied before the pages they came from are let go of.
const COPY: usize = 4 << 20;

impl Own {
    /// A copy of `weights`; a table that is the head too has one.
    fn copy(&self, name: &str, weights: &Bytes) -> Result<Bytes> {
        let mut copies = lock(&self.copies);
        let at = weights.as_ptr().addr();
        if let Some((_, copy)) = copies.iter().find(|(from, _)| *from == at) {
            return Ok(copy.clone());
        }
        let (n, mut lines) = (weights.len(), Vec::new());
        lines
            .try_reserve_exact(n.div_ceil(size_of::<Line>()))
            .map_err(|_| Error::OutOfMemory {
                what: format!("a copy of {name}"),
                bytes: n,
            })?;
        lines.resize(n.div_ceil(size_of::<Line>()), Line([0; 64]));
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut lines);
        for first in (0..n).step_by(COPY) {
            let part = first..n.min(first + COPY);
            weights.prefetch(part.clone());
            bytes[part.clone()].copy_from_slice(&weights[part.clone()]);
            weights.release(part);
        }
        let copy = Bytes::new(Arc::new(Lines(lines)), 0..n);
        copies.push((at, copy.clone()));
        Ok(copy)
    }
}

impl Place {
    /// The file that has rows of these.
    pub(super) fn table(&self) -> Option<&FileTable> {
        self.table.as_deref()
    }

    /// Whether these weights are dropped after each use.
    pub(super) fn is_streamed(&self) -> bool {
        self.end > self.residency.limit.load(Ordering::Relaxed)
    }

    /// Asks for what is streamed after these.
    pub(super) fn prefetch_next(&self) {
        let limit = self.residency.limit.load(Ordering::Relaxed);
        let order = self.residency.order();
        let mut end = 0;
        let streamed: Vec<(usize, &Bytes)> = order
            .iter()
            .enumerate()
            .filter(|(_, weights)| {
                end += weights.len();
                end > limit
            })
            .collect();
        let at = streamed.partition_point(|(idx, _)| *idx <= self.idx);
        let mut room = READ_AHEAD;
        for (_, weights) in streamed[at..].iter().chain(&streamed[..at]) {
            let len = weights.len().min(room);
            weights.prefetch(0..len);
            room -= len;
            if room == 0 {
                break;
            }
        }
    }
}

/// What faults bring into memory around the rows of a task: up to 2 MiB at both ends, see `gguf::map`.
const AROUND: usize = (4 << 20) + (128 << 10);

/// The most that tasks on `n_threads` bring into memory at once of matrices with rows of at most `row_bytes`: what they
/// read, and what faults bring along at both ends.
pub(crate) fn window(n_threads: usize, row_bytes: usize) -> usize {
    let task = (super::MAX_TASK_ROWS * row_bytes).max(super::TASK_BYTES);
    n_threads * (task + AROUND)
}
