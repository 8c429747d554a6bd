//! Experts that do not all fit in memory: which are there, which go, and the reads that bring them.
//!
//! A router names the experts of a layer; [`ExpertStore::begin`] holds those that are in a slot and reads the others,
//! so that reading overlaps with whatever is computed before [`Request::wait`] asks for them. Part by part: the gate
//! rows of an expert can be used while its other rows still come.
//!
//! The module knows files and numbers, no tensors, models or backends. In data-flow order:
//!
//! - `layout`: where the experts lie in their files;
//! - `arena`: the memory they are read to;
//! - `slots`: which expert is in which slot, the one state machine;
//! - [`policy`]: which expert goes;
//! - [`disk`]: who reads;
//! - `store`: requests, queues, threads;
//! - [`trace`], [`replay`]: what was asked for, and what other policies had made of it;
//! - `usage`: what the next start should read first.

mod arena;
pub mod disk;
mod layout;
pub mod policy;
pub mod replay;
mod request;
mod slots;
mod stats;
mod store;
pub mod trace;
mod usage;

use std::path::PathBuf;

pub use layout::{Key, LayerExperts, Layout, MAX_PARTS, Part};
pub use policy::PolicyKind;
pub use request::{Request, Waves};
pub use stats::{Counters, LayerCounters, Mode, Stats};
pub use store::ExpertStore;

use policy::Decayed;

/// How urgent a read is. The more urgent goes first; the least urgent are given up when they are in the way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    /// To begin with what was used last time.
    Warmup,
    /// On a guess.
    Speculative,
    /// Known to be needed, but not yet.
    Exact,
    /// Somebody waits.
    Demand,
}

impl Class {
    /// All of them, the least urgent first.
    pub const ALL: [Self; 4] = [Self::Warmup, Self::Speculative, Self::Exact, Self::Demand];

    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Warmup => "warmup",
            Self::Speculative => "speculative",
            Self::Exact => "exact",
            Self::Demand => "demand",
        }
    }
}

/// How far ahead experts are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Prefetch {
    /// When they are asked for.
    Off,
    /// When the router has named them.
    #[default]
    Exact,
    /// The same, and on guesses, see [`ExpertStore::hint`].
    Speculative,
}

impl Prefetch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Off, Self::Exact, Self::Speculative];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Exact => "exact",
            Self::Speculative => "speculative",
        }
    }

    /// The one of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// How files are read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoMode {
    /// Past the page cache where the system can, else through it.
    #[default]
    Auto,
    /// Past the page cache, or not at all.
    Direct,
    /// Through the page cache, which is told to drop what was read.
    Buffered,
    /// Past the page cache, by one thread that has several reads under way: io_uring of Linux.
    Uring,
}

/// How much memory the experts may take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Budget {
    /// Bytes.
    Bytes(u64),
    /// Experts.
    Slots(usize),
}

/// Where a usage profile is kept: beside the model, or in the cache folder of the person.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UsageFile {
    /// The model file.
    pub model: PathBuf,
    /// What distinguishes the model from others.
    pub model_hash: u64,
}

/// How a store works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Memory of the experts. More than all of them take is not used.
    pub budget: Budget,
    /// Threads that read; with [`IoMode::Uring`], reads that are under way at once.
    pub io_threads: usize,
    /// How files are read.
    pub io: IoMode,
    /// Which expert goes.
    pub policy: PolicyKind,
    /// How far ahead experts are read.
    pub prefetch: Prefetch,
    /// The most slots that guesses may hold before they come true; `None`: as many as a layer uses.
    pub guesses: Option<usize>,
    /// Keeps what was used, and begins with it.
    pub usage: Option<UsageFile>,
    /// Writes what was asked for to this file.
    pub trace: Option<PathBuf>,
}

impl Default for Options {
    /// All experts in memory.
    fn default() -> Self {
        Self {
            budget: Budget::Slots(usize::MAX),
            io_threads: 4,
            io: IoMode::Auto,
            policy: PolicyKind::default(),
            prefetch: Prefetch::default(),
            guesses: None,
            usage: None,
            trace: None,
        }
    }
}
