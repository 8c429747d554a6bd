//! What a model will need and how fast it will be, from its header alone: the forward pass on the planner backend,
//! through the same sessions that run it.

use std::ops::ControlFlow;

use super::budget::{self, Concession, Room};
use super::{LoadOptions, MemoryReport, Model, Session, SessionOptions, experts, repack};
use crate::backend::Step;
use crate::backend::planner::Tally;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::profile::Operation;
use crate::profile::roofline::Resource;
use crate::tokenizer::Tokenizer;

/// Bytes in memory by kind, when a context is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Footprint {
    /// Weights: pages of the file, which is read ahead.
    pub weights: u64,
    /// Weights that were copied: into panels for decoding, or beside a store of experts, which fills the rest of the memory.
    pub own_weights: u64,
    /// Slots of experts that are read when they are used.
    pub experts: u64,
    /// Keys and values.
    pub kv: u64,
    /// Memory of convolutions.
    pub conv: u64,
    /// Activations and logits.
    pub scratch: u64,
    /// The vocabulary, as far as it is not in memory yet.
    pub tokenizer: u64,
    /// What else is allocated: the header of the file, threads, what the process holds beside.
    pub runtime: u64,
    /// Code: pages of the program's file and of libraries.
    pub program: u64,
}

/// What a process gets that runs a model beside what one has that plans: stacks of threads, buffers of kernels, what the
/// allocator keeps, 0.4 to 2.5 MB of it; measured on models of 89 M to 630 M. Less would let peaks exceed a budget now and then.
const RUN_ANONYMOUS: u64 = 1344 << 10;

/// And code that it has not run yet.
const RUN_PROGRAM: u64 = 640 << 10;

impl Footprint {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.anonymous() + self.file()
    }

    /// What only this process has.
    pub fn anonymous(&self) -> u64 {
        self.own_weights
            + self.experts
            + self.kv
            + self.conv
            + self.scratch
            + self.tokenizer
            + self.runtime
    }

    /// What the system can read again from files.
    pub fn file(&self) -> u64 {
        self.weights + self.program
    }

    fn of_process(gguf: &Gguf, tokenizer: u64, more: u64) -> Self {
        let (anonymous, file) = budget::resident();
        Self {
            weights: gguf.tensors().map(|t| t.bytes as u64).sum(),
            tokenizer,
            runtime: anonymous + more,
            program: file + RUN_PROGRAM,
            ..Self::default()
        }
    }

    /// Of this process, in which the header of `gguf` has been read, as one that will run it.
    pub(super) fn of_planning_process(gguf: &Gguf) -> Self {
        let vectors = gguf.tensors().filter(|t| t.n_dims == 1);
        let vectors: usize = vectors.map(|t| t.n_elements() * size_of::<f32>()).sum();
        let tokenizer = Tokenizer::planned_bytes(gguf.metadata());
        let mut base = Self::of_process(gguf, tokenizer as u64, RUN_ANONYMOUS);
        base.runtime += vectors as u64;
        base
    }

    /// Of this process, in which the model of `gguf` has been loaded and none of its weights is in memory.
    pub(super) fn of_loaded_process(gguf: &Gguf) -> Self {
        Self::of_process(gguf, 0, RUN_ANONYMOUS)
    }

    pub(super) fn add_base(&mut self, base: &Self) {
        self.weights = base.weights;
        self.own_weights = base.own_weights;
        self.tokenizer = base.tokenizer;
        self.runtime = base.runtime;
        self.program = base.program;
    }
}

/// How the experts of a model are kept that are not all in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertPlan {
    /// Experts in memory at once.
    pub n_slots: usize,
    /// All experts.
    pub n_experts: usize,
    /// Bytes of those that a token uses.
    pub token_bytes: u64,
    /// Bytes of all.
    pub bytes: u64,
}

impl ExpertPlan {
    /// Bytes that a token has to read if all experts are as likely: less where a text keeps to some.
    fn missed(&self) -> f64 {
        (1.0 - self.n_slots as f64 / self.n_experts as f64) * self.token_bytes as f64
    }
}

/// What a session with some options will hold and do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The options, none of them 0.
    pub options: SessionOptions,
    /// What was given up for a budget.
    pub concessions: Vec<Concession>,
    /// What the session holds when its context is full.
    pub memory: MemoryReport,
    /// What the process holds then.
    pub footprint: Footprint,
    /// Bytes of all weights.
    pub weights: u64,
    /// Bytes of those that stay in memory.
    pub kept_weights: u64,
    /// Where experts are read when they are used.
    pub experts: Option<ExpertPlan>,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// What reading it does.
    pub prefill: Vec<Tally>,
    /// What the token after it does.
    pub decode: Vec<Tally>,
    load_seconds: f64,
}

impl Plan {
    /// For `model`, which may be an outline, and a prompt of `n_prompt` tokens, at most what the context holds. The
    /// footprint is that of a process like this one.
    ///
    /// # Errors
    /// As [`Session::new`], or if the model is not supported by our CPU backend.
    pub fn new(model: &Model, options: &SessionOptions, n_prompt: usize) -> Result<Self> {
        let outline = model.outlined()?;
        let open = || Session::new(&outline, options);
        let mut full = open()?;
        let options = SessionOptions {
            n_ctx: full.n_ctx,
            batch: full.batch,
            ..options.clone()
        };
        // A step without logits, one with them, and the last token: what takes most is among them.
        full.count_prefill((full.n_ctx - 1).min(2 * full.batch))?;
        full.skip_to(full.n_ctx - 1)?;
        full.decode(0)?;
        let n_prompt = n_prompt.clamp(1, full.n_ctx);
        let mut prompt = open()?;
        prompt.count_prefill(n_prompt)?;
        let mut next = open()?;
        next.skip_to(n_prompt.min(full.n_ctx - 1))?;
        next.decode(0)?;
        let memory = full.memory();
        let mut footprint = Footprint {
            kv: memory.kv as u64,
            conv: memory.conv as u64,
            scratch: memory.scratch as u64,
            ..Footprint::default()
        };
        footprint.add_base(outline.base());
        let weights = footprint.weights;
        Ok(Self {
            options,
            concessions: Vec::new(),
            memory,
            footprint,
            weights,
            kept_weights: weights,
            experts: None,
            load_seconds: load_seconds(outline.gguf()),
            n_prompt,
            prefill: prompt.tallies(),
            decode: next.tallies(),
        })
    }

    /// The same for the memory that `load` allows: as much as fits of what `options` ask for, if `load` says so.
    ///
    /// # Errors
    /// As [`Plan::new`], and [`Error::OverBudget`](crate::Error::OverBudget).
    pub fn within(
        model: &Model,
        options: &SessionOptions,
        n_prompt: usize,
        load: &LoadOptions,
    ) -> Result<Self> {
        let outline = model.outlined()?;
        let gguf = outline.gguf();
        let mut base = *outline.base();
        let found = experts::to_store(gguf, load)?;
        base.own_weights = repack::copied_bytes(gguf, load);
        let room = Room::new(gguf, load, outline.n_threads(), base, found.as_ref());
        budget::fit(&outline, options, n_prompt, &room)
    }

    /// How fast it will be on a machine with `rates`, its file in the system's cache.
    pub fn speed(&self, rates: &Rates) -> Speed {
        // Beside experts, it is a row of a table that is not kept.
        let streamed = match self.experts {
            None => (self.weights - self.kept_weights) as f64 / STREAMED_PER_SECOND,
            Some(_) => 0.0,
        };
        let n_steps = self.n_prompt.div_ceil(self.options.batch).max(1) as f64;
        let experts = self.experts.as_ref();
        let missed = experts.map_or(0.0, ExpertPlan::missed) / DISK_PER_SECOND;
        // A step of a prompt uses them all.
        let swept = experts.map_or(0.0, |experts| {
            let share = 1.0 - experts.n_slots as f64 / experts.n_experts as f64;
            share * experts.bytes as f64 / DISK_PER_SECOND
        });
        let kept = self.kept_weights - experts.map_or(0, |experts| experts.bytes);
        Speed {
            load: self.load_seconds,
            prefill: rates.seconds(&self.prefill, false)
                + kept as f64 / MAPPED_PER_SECOND
                + self.footprint.scratch as f64 / ALLOCATED_PER_SECOND
                + n_steps * (streamed + swept),
            decode: rates.seconds(&self.decode, true) + streamed + missed,
        }
    }
}

/// What a machine can do at most, per second: its roofline with the threads of a plan.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// Bytes read from memory.
    pub read: f64,
    /// Operations on bytes.
    pub int8: f64,
    /// Operations on bf16, where a matrix unit does them.
    pub bf16: Option<f64>,
    /// Operations on floats.
    pub f32: f64,
}

/// What of a roofline kernels reach, and what a call costs. The figures are fitted to LFM2 89 M (Q4_0), SmolLM2 135 M
/// (Q4_1), Gemma 3 268 M and Qwen 2.5 630 M (Q4_K_M: mostly Q5_0 and Q8_0) with one and two threads of an AMD EPYC with
/// AVX-512 VNNI.
struct Efficiency {
    /// Of the products of a matrix kernel, where these limit it.
    products: f64,
    /// Of the products of attention.
    attention: f64,
    /// Seconds of a call beside what it reads and multiplies.
    call: f64,
}

/// Of one token.
const DECODE: Efficiency = Efficiency {
    products: 0.13,
    attention: 1.0,
    call: 1e-6,
};

/// Bytes of quantized weights that kernels for one token unpack in the time of one 8-bit operation, whatever the format.
const UNPACKED_PER_OP: f64 = 0.06;

/// Of many tokens.
const PREFILL: Efficiency = Efficiency {
    products: 0.56,
    attention: 0.48,
    call: 10e-6,
};

/// Bytes of a file in the system's cache that are mapped, page fault by page fault, when they are read first.
const MAPPED_PER_SECOND: f64 = 5e9;

/// Bytes of memory that the system gives, page fault by page fault.
const ALLOCATED_PER_SECOND: f64 = 1.3e9;

/// The same where they are dropped after each use.
const STREAMED_PER_SECOND: f64 = 4.8e9;

/// Bytes of experts that a drive gives: what a phone's and a small server's are like, for none was measured.
const DISK_PER_SECOND: f64 = 1e9;

/// What an estimate may be wrong by, as a factor.
pub const UNCERTAINTY: f64 = 1.2;

impl Rates {
    fn seconds(&self, tallies: &[Tally], decode: bool) -> f64 {
        let efficiency = if decode { DECODE } else { PREFILL };
        let of = |tally: &Tally| {
            let peak = match tally.resource {
                Some(Resource::Bf16) => self.bf16.unwrap_or(self.f32),
                Some(Resource::F32) => self.f32,
                _ => self.int8,
            };
            let read = tally.work.bytes() as f64 / self.read;
            let ops = tally.work.ops() as f64 / peak;
            let busy = match (tally.op, tally.resource) {
                // Keys and values are not read ahead as rows of weights are.
                (Operation::Attention, _) => read + ops / efficiency.attention,
                (_, Some(Resource::Int8)) if decode => {
                    let unpack = tally.work.weight_bytes as f64 / (UNPACKED_PER_OP * self.int8);
                    // Reading and unpacking go on side by side, but for where they meet.
                    (read.powi(3) + unpack.powi(3)).cbrt()
                }
                _ => read.max(ops / efficiency.products),
            };
            busy + tally.count as f64 * efficiency.call
        };
        tallies.iter().map(of).sum()
    }
}

/// Seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Speed {
    /// From a path to a model.
    pub load: f64,
    /// From there to the first token after the prompt.
    pub prefill: f64,
    /// For each token after that.
    pub decode: f64,
}

/// Seconds to read a header and to build its vocabulary: rank by rank for a BPE.
fn load_seconds(gguf: &Gguf) -> f64 {
    let n = |key: &str| {
        let value = gguf.metadata().get(key);
        value.and_then(|v| v.as_array()).map_or(0, |a| a.len()) as f64
    };
    gguf.header_bytes() as f64 / 250e6
        + n("tokenizer.ggml.merges") * 0.65e-6
        + n("tokenizer.ggml.tokens") * 0.14e-6
}

impl Model {
    /// What a process like this one holds beside sessions, looked at once, so that plans can be compared.
    fn base(&self) -> &Footprint {
        let base = &self.0.base;
        base.get_or_init(|| Footprint {
            own_weights: self.0.copied,
            ..Footprint::of_planning_process(self.gguf())
        })
    }
}

impl Session {
    fn count_prefill(&mut self, n: usize) -> Result<()> {
        let go = &mut |_, _| ControlFlow::Continue(());
        self.prefill(&vec![0; n], go)
    }

    /// Goes on as if `n` tokens had been read: on an outline, where what they leave has a size and no contents.
    fn skip_to(&mut self, n: usize) -> Result<()> {
        if n > self.line.tokens.len() {
            self.engine.reserve(0..n)?;
            self.line.tokens.resize(n, 0);
            self.line.steps.resize(n, Step::Prefill);
        }
        Ok(())
    }
}
