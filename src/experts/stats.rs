//! What the store has done, in numbers.

use std::ops::Sub;
use std::time::Duration;

use super::Class;

/// Sums since the store was opened, or of one token.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Counters {
    /// Experts asked for.
    pub used: u64,
    /// Of these, experts that were in a slot or on their way.
    pub hits: u64,
    /// Of the hits, experts that were still on their way.
    pub late: u64,
    /// Reads that went out.
    pub reads: u64,
    /// Bytes that were read, in the order of [`Class::ALL`], widened to whole blocks.
    pub bytes: [u64; Class::ALL.len()],
    /// Reads that failed.
    pub errors: u64,
    /// Experts that lost their slot.
    pub evictions: u64,
    /// Experts that were read on a guess.
    pub guesses: u64,
    /// Of these, those that were used.
    pub guesses_used: u64,
    /// Of these, those that lost their slot before.
    pub guesses_wasted: u64,
    /// Time with at least one read under way.
    pub reading: Duration,
    /// Time in which those who compute waited.
    pub waited: Duration,
    /// How often they waited.
    pub waits: u64,
}

impl Counters {
    /// Experts that had to be read.
    pub fn misses(&self) -> u64 {
        self.used - self.hits
    }

    /// Bytes that were read.
    pub fn all_bytes(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// The share of the time of reading that was hidden behind computing: 1 - waited / reading. Below zero when waking
    /// up took longer than reading; `None` if nothing was read.
    pub fn hidden(&self) -> Option<f64> {
        let reading = self.reading.as_secs_f64();
        (reading > 0.0).then(|| 1.0 - self.waited.as_secs_f64() / reading)
    }
}

impl Sub for Counters {
    type Output = Self;

    /// What was added since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        let mut bytes = self.bytes;
        bytes
            .iter_mut()
            .zip(earlier.bytes)
            .for_each(|(a, b)| *a -= b);
        Self {
            used: self.used - earlier.used,
            hits: self.hits - earlier.hits,
            late: self.late - earlier.late,
            reads: self.reads - earlier.reads,
            bytes,
            errors: self.errors - earlier.errors,
            evictions: self.evictions - earlier.evictions,
            guesses: self.guesses - earlier.guesses,
            guesses_used: self.guesses_used - earlier.guesses_used,
            guesses_wasted: self.guesses_wasted - earlier.guesses_wasted,
            reading: self.reading - earlier.reading,
            waited: self.waited - earlier.waited,
            waits: self.waits - earlier.waits,
        }
    }
}

/// Sums of one layer.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct LayerCounters {
    /// Experts asked for.
    pub used: u64,
    /// Of these, experts that were in a slot or on their way.
    pub hits: u64,
}

/// What the slots suffice for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Every expert: nothing is evicted.
    Resident,
    /// The experts of one token and more: the chosen policy evicts.
    Cached,
    /// Less: newcomers pass through, few experts stay.
    Admission,
}

impl Mode {
    /// As reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resident => "resident",
            Self::Cached => "cached",
            Self::Admission => "admission",
        }
    }
}

/// A report.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Tokens or passes that were begun, see [`super::ExpertStore::next_token`].
    pub tokens: u64,
    /// Sums of all of them.
    pub total: Counters,
    /// Sums by layer.
    pub layers: Vec<LayerCounters>,
    /// Experts that may be in memory.
    pub n_slots: usize,
    /// Experts that are in memory, on their way, or about to go.
    pub n_held: usize,
    /// Bytes of memory that the slots take when all are full.
    pub slot_bytes: usize,
    /// The most experts that were held by requests at once.
    pub most_pinned: usize,
    /// What the slots suffice for.
    pub mode: Mode,
    /// Which policy evicts.
    pub policy: &'static str,
    /// How files are read.
    pub disk: &'static str,
    /// Threads that read.
    pub io_threads: usize,
}
