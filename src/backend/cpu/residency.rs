//! Which weights stay in memory. Those that are loaded first stay, up to a limit; what lies beyond is streamed: read
//! ahead of the operation that needs it, dropped behind each task. A cycle through more than fits would push out
//! exactly what is needed next if the system chose, so the choice is ours.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::quant::Bytes;

/// Bytes that are read ahead of the operation that runs.
const READ_AHEAD: usize = 4 << 20;

/// The weights of a model in the order in which they were loaded, and how many of them stay.
#[derive(Default)]
pub struct Residency {
    /// Bytes from the first weight on that stay.
    limit: AtomicUsize,
    order: Mutex<Vec<Bytes>>,
}

/// The place of some weights in that order.
#[derive(Clone)]
pub(super) struct Place {
    residency: Arc<Residency>,
    idx: usize,
    /// Bytes up to their end.
    end: usize,
}

impl Residency {
    /// Everything stays.
    pub fn unlimited() -> Self {
        Self {
            limit: AtomicUsize::new(usize::MAX),
            order: Mutex::default(),
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
        self.order
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Enters `weights`. A table that is the head too has one place.
    pub(super) fn enter(self: &Arc<Self>, weights: &Bytes) -> Place {
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
        }
    }
}

impl Place {
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
