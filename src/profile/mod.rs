//! What a machine can do at most, what a run did, and where its time went: plain data, for every layer.

mod chrome;
pub mod counters;
pub mod machine;
mod page;
pub mod record;
pub mod report;
pub mod roofline;
pub mod span;
pub mod topology;

pub use self::record::Recorder;
pub use self::report::{Limits, Profile, Report};
pub use self::roofline::Roofline;
pub use self::span::{Label, Operation, PassKind, PassRecord, Span, Trace};

use serde::{Deserialize, Serialize};

/// What a store of experts has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ExpertWork {
    /// Experts that tokens asked for, once for each pass.
    pub used: u64,
    /// Those that were in memory, or on their way.
    pub hits: u64,
    /// Bytes that were read.
    pub bytes: u64,
    /// Nanoseconds in which at least one read was under way.
    pub reading: u64,
    /// Nanoseconds in which somebody waited for one.
    pub waited: u64,
    /// Experts that were read on a guess.
    #[serde(default)]
    pub guesses: u64,
    /// Of these, those that were used.
    #[serde(default)]
    pub guesses_used: u64,
    /// Of these, those that made room for others before.
    #[serde(default)]
    pub guesses_wasted: u64,
}

impl ExpertWork {
    /// What was done since `before`.
    pub fn since(&self, before: &ExpertWork) -> ExpertWork {
        ExpertWork {
            used: self.used - before.used,
            hits: self.hits - before.hits,
            bytes: self.bytes - before.bytes,
            reading: self.reading - before.reading,
            waited: self.waited - before.waited,
            guesses: self.guesses - before.guesses,
            guesses_used: self.guesses_used - before.guesses_used,
            guesses_wasted: self.guesses_wasted - before.guesses_wasted,
        }
    }

    /// The share of experts that were there, 0 to 1.
    pub fn hit_rate(&self) -> Option<f64> {
        (self.used > 0).then(|| self.hits as f64 / self.used as f64)
    }

    /// The share of reading that nobody waited for.
    pub fn hidden(&self) -> Option<f64> {
        (self.reading > 0).then(|| 1.0 - self.waited as f64 / self.reading as f64)
    }
}

impl std::ops::AddAssign for ExpertWork {
    fn add_assign(&mut self, other: ExpertWork) {
        self.used += other.used;
        self.hits += other.hits;
        self.bytes += other.bytes;
        self.reading += other.reading;
        self.waited += other.waited;
        self.guesses += other.guesses;
        self.guesses_used += other.guesses_used;
        self.guesses_wasted += other.guesses_wasted;
    }
}

/// Products of queries with keys where scores came from differences of keys (DeltaLLM).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DeltaWork {
    /// Products of elements that dense attention makes for the same scores.
    pub dense: u64,
    /// Of these, those for keys outside of what is always exact.
    pub far: u64,
    /// Products that were made.
    pub done: u64,
    /// Elements of keys that were compared with what was held, each time that was done.
    pub elements: u64,
    /// Of these, those that had changed.
    pub changes: u64,
}

impl DeltaWork {
    /// What was done since `before`.
    pub fn since(&self, before: &DeltaWork) -> DeltaWork {
        DeltaWork {
            dense: self.dense - before.dense,
            far: self.far - before.far,
            done: self.done - before.done,
            elements: self.elements - before.elements,
            changes: self.changes - before.changes,
        }
    }

    /// The four sparsities, of which none should be told alone; `None` where there was nothing to do.
    pub fn sparsity(&self) -> Option<DeltaSparsity> {
        let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
        let unchanged = 1.0 - share(self.changes, self.elements);
        let products = 1.0 - share(self.done, self.dense);
        (self.elements > 0).then(|| DeltaSparsity {
            unchanged,
            published: unchanged * share(self.far, self.dense),
            products,
            attention: products / 2.0,
        })
    }
}

impl std::ops::AddAssign for DeltaWork {
    fn add_assign(&mut self, other: DeltaWork) {
        self.dense += other.dense;
        self.far += other.far;
        self.done += other.done;
        self.elements += other.elements;
        self.changes += other.changes;
    }
}

/// What differences of keys save, each 0 to 1.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct DeltaSparsity {
    /// Elements of keys that did not change.
    pub unchanged: f64,
    /// The same times the share of pairs that are not always exact: what the paper calls sparsity.
    pub published: f64,
    /// Products of queries and keys that were not made.
    pub products: f64,
    /// The same of all products of attention: those with values are always made.
    pub attention: f64,
}

/// What a backend has done since it was made, counted where it is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Work {
    /// Bytes of weight matrices, once for each step that used them.
    pub weight_bytes: u64,
    /// Bytes of cached keys and values, once for each step that attended to them.
    pub kv_bytes: u64,
    /// Multiplications and additions with weights.
    pub matmul_ops: u64,
    /// Multiplications and additions of attention.
    pub attention_ops: u64,
    /// Neurons of experts that decoded tokens used.
    #[serde(default)]
    pub neurons: u64,
    /// Those of them whose gate was 0, so that no other product was made for them.
    #[serde(default)]
    pub skipped_neurons: u64,
    /// Pairs of a query and a key that causality and windows allow.
    #[serde(default)]
    pub pairs: u64,
    /// Of these the ones that were read: fewer where keys are left out.
    #[serde(default)]
    pub pairs_read: u64,
    /// Nanoseconds in which was decided which, of all threads together.
    #[serde(default)]
    pub decide_ns: u64,
    /// Where scores came from differences of keys.
    #[serde(default)]
    pub delta: DeltaWork,
    /// Experts that were read when they were used; nothing where all are in memory.
    #[serde(default)]
    pub experts: ExpertWork,
    /// Regions that threads entered and left together: each is a barrier.
    pub regions: u64,
}

impl Work {
    /// What was done since `before`.
    pub fn since(&self, before: &Work) -> Work {
        Work {
            weight_bytes: self.weight_bytes - before.weight_bytes,
            kv_bytes: self.kv_bytes - before.kv_bytes,
            matmul_ops: self.matmul_ops - before.matmul_ops,
            attention_ops: self.attention_ops - before.attention_ops,
            neurons: self.neurons - before.neurons,
            skipped_neurons: self.skipped_neurons - before.skipped_neurons,
            pairs: self.pairs - before.pairs,
            pairs_read: self.pairs_read - before.pairs_read,
            decide_ns: self.decide_ns - before.decide_ns,
            delta: self.delta.since(&before.delta),
            experts: self.experts.since(&before.experts),
            // Backends count them modulo 2^32.
            regions: u64::from(self.regions.wrapping_sub(before.regions) as u32),
        }
    }

    /// Bytes read.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes
    }

    /// The share of allowed pairs that were read; `None` where nothing was to be read.
    pub fn share_read(&self) -> Option<f64> {
        (self.pairs > 0).then(|| self.pairs_read as f64 / self.pairs as f64)
    }

    /// Multiplications and additions.
    pub fn ops(&self) -> u64 {
        self.matmul_ops + self.attention_ops
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.weight_bytes += other.weight_bytes;
        self.kv_bytes += other.kv_bytes;
        self.matmul_ops += other.matmul_ops;
        self.attention_ops += other.attention_ops;
        self.neurons += other.neurons;
        self.skipped_neurons += other.skipped_neurons;
        self.pairs += other.pairs;
        self.pairs_read += other.pairs_read;
        self.decide_ns += other.decide_ns;
        self.delta += other.delta;
        self.experts += other.experts;
        self.regions += other.regions;
    }
}
