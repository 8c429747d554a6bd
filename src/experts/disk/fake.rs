//! A drive for tests: files in memory, imagined time, faults on demand. The same seed gives the same run.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use super::{Disk, Fault, Pace, Random};

/// See the module.
pub struct FakeDisk {
    files: Vec<(PathBuf, Vec<u8>)>,
    pace: Option<Pace>,
    state: Mutex<State>,
}

struct State {
    rates: FaultRates,
    random: Random,
    /// Faults of the next reads, before those at random.
    next: VecDeque<Fault>,
    /// Reads in the order in which they were served: file, offset, bytes.
    log: Option<Vec<(usize, u64, usize)>>,
    n_faults: u64,
}

/// How many of all reads fail.
#[derive(Clone, Copy, Default, Debug)]
pub struct FaultRates {
    /// With an error of the system.
    pub os: f64,
    /// Because the file ends in their middle.
    pub short: f64,
    /// Because the file was written to.
    pub changed: f64,
}

impl FakeDisk {
    /// Files that hold `images`; their reads take as long as `pace` says, or no time on real threads.
    pub fn new(images: Vec<Vec<u8>>, pace: Option<Pace>) -> Self {
        let seed = pace.as_ref().map_or(0, |pace| pace.seed);
        let name = |(idx, image)| (PathBuf::from(format!("fake-{idx}")), image);
        Self {
            files: images.into_iter().enumerate().map(name).collect(),
            pace,
            state: Mutex::new(State {
                rates: FaultRates::default(),
                random: Random(seed ^ 0x5eed),
                next: VecDeque::new(),
                log: None,
                n_faults: 0,
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock();
        state.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// From now on so many reads fail.
    pub fn set_fault_rates(&self, rates: FaultRates) {
        self.state().rates = rates;
    }

    /// The next read fails, or that after those that are to fail already.
    pub fn fail_next(&self, fault: Fault) {
        self.state().next.push_back(fault);
    }

    /// Reads that have failed.
    pub fn n_faults(&self) -> u64 {
        self.state().n_faults
    }

    /// The reads since the last call, in the order in which they ended; the first call begins to keep them.
    pub fn take_log(&self) -> Vec<(usize, u64, usize)> {
        self.state().log.replace(Vec::new()).unwrap_or_default()
    }
}

impl State {
    fn fault(&mut self, offset: u64, needed: usize) -> Option<Fault> {
        let FaultRates { os, short, changed } = self.rates;
        let fault = self.next.pop_front().or_else(|| {
            let x = self.random.unit();
            if x < os {
                Some(Fault::Os(io::ErrorKind::Other, None))
            } else if x < os + short {
                Some(Fault::Short(offset + needed as u64 / 2))
            } else if x < os + short + changed {
                Some(Fault::Changed)
            } else {
                None
            }
        });
        self.n_faults += u64::from(fault.is_some());
        fault
    }
}

impl Disk for FakeDisk {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn path(&self, file: usize) -> &Path {
        &self.files[file].0
    }

    fn pace(&self) -> Option<Pace> {
        self.pace.clone()
    }

    fn read(&self, file: usize, offset: u64, into: &mut [u8], needed: usize) -> Result<(), Fault> {
        let fault = {
            let mut state = self.state();
            if let Some(log) = &mut state.log {
                log.push((file, offset, into.len()));
            }
            state.fault(offset, needed)
        };
        let image = &self.files[file].1;
        let there = image.get(offset as usize..).unwrap_or_default();
        let mut n = there.len().min(into.len());
        if fault.is_some() {
            n /= 2; // what a failed read leaves behind must not be taken for an expert
        }
        into[..n].copy_from_slice(&there[..n]);
        match fault {
            Some(fault) => Err(fault),
            None if n < needed => Err(Fault::Short(image.len() as u64)),
            None => Ok(()),
        }
    }
}
