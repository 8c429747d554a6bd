//! Spans to a report: for each phase and each operation its time, what it did, and how near that is to the most that
//! the machine can do (the roofline model: see [`roofline`](super::roofline)). Plain data that goes to JSON and back.

use serde::{Deserialize, Serialize};

use super::Work;
use super::counters::{Condition, Counters};
use super::record::Recorder;
use super::span::{Operation, PassKind, Span, Trace};

/// A run, explained.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// In sums.
    pub report: Report,
    /// Operation by operation.
    pub trace: Trace,
}

/// What ran, where.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct About {
    /// The model.
    pub model: String,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Decoder layers.
    pub n_layers: usize,
    /// Threads.
    pub n_threads: usize,
    /// The CPU.
    pub cpu: Option<String>,
    /// Of this library.
    pub version: String,
    /// Its experts, where they are read when they are used.
    #[serde(default)]
    pub experts: Option<Experts>,
}

/// Experts that are read when they are used.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Experts {
    /// Experts that may be in memory.
    pub slots: usize,
    /// All of them.
    pub all: usize,
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Which expert makes room for another.
    pub policy: String,
    /// How they are read.
    pub disk: String,
    /// Threads that read.
    pub io_threads: usize,
    /// By layer, of those that have experts: how many were asked for, and how many were there.
    pub layers: Vec<(u64, u64)>,
}

/// The most that the machine can do with the threads of the run; each where it is known. Per second.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes read from a large mapped file.
    pub memory: Option<f64>,
    /// Bytes read from the file of this model by the same loops: small ones lie in a cache.
    pub file: Option<f64>,
    /// Operations on bytes.
    pub int8: Option<f64>,
    /// Operations on bf16.
    pub bf16: Option<f64>,
    /// Operations on floats.
    pub f32: Option<f64>,
}

impl Limits {
    /// Operations per second that the kernel called `name` could reach: names tell the format of the activations.
    pub fn ops(&self, name: &str) -> Option<f64> {
        // Weights stand before activations: `gemm_q8_0_bf16_amx`.
        let first = name.split('+').next().unwrap_or_default();
        let mut words = first.rsplit('_');
        match words.find(|word| ["q8", "bf16", "f32"].contains(word)) {
            Some("q8") => self.int8,
            Some("bf16") => self.bf16,
            _ => self.f32,
        }
    }

    /// Seconds that `work` takes at least: what is read and what is computed overlap at best.
    pub fn least_seconds(&self, work: &Work, kernel: &str) -> Option<f64> {
        let read = self.file.or(self.memory);
        let at = |amount: u64, rate: Option<f64>| match amount {
            0 => Some(0.0),
            _ => Some(amount as f64 / rate.filter(|rate| *rate > 0.0)?),
        };
        let least = at(work.bytes(), read)?.max(at(work.ops(), self.ops(kernel))?);
        Some(least).filter(|least| *least > 0.0)
    }
}

/// A run in sums. Times are in nanoseconds.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What ran.
    pub about: About,
    /// What could be reached.
    pub limits: Limits,
    /// In the order of time.
    pub phases: Vec<Phase>,
    /// The tokens of the reply.
    pub tokens: Vec<Token>,
    /// Of the tokens but the first.
    pub latency: Option<Latency>,
    /// From the start of the first phase to the first token of the reply.
    pub first_token: Option<u64>,
    /// Resident bytes over time.
    pub memory: Vec<MemorySample>,
    /// What counts energy, if anything does.
    pub energy_source: Option<String>,
    /// Spans that were lost.
    pub dropped: u64,
}

/// A part of a run.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Phase {
    /// `load`, `prefill`, `first token`, `decode`.
    pub name: String,
    /// When it began.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// From one to the other, without what recording took.
    pub time: u64,
    /// Forward passes.
    pub passes: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Time in operations.
    pub explained: u64,
    /// What it did.
    pub work: Work,
    /// How long the caller waited for other threads at the end of regions.
    pub waited: u64,
    /// The least time that the machine's limits allow for what its operations did, by the time of those.
    pub of_roofline: Option<f64>,
    /// How long each of the other threads had nothing to do while passes ran, on average.
    pub idle: Option<u64>,
    /// Faults and reads.
    pub counters: Option<Counters>,
    /// Microjoules.
    pub energy: Option<u64>,
    /// At its end.
    pub condition: Condition,
    /// The longest first.
    pub operations: Vec<Row>,
}

/// An operation of a phase, all layers together.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Row {
    /// What was done.
    pub operation: Operation,
    /// Its name: that of the operation, or of the matrices.
    pub name: String,
    /// Rows of the kernel table.
    pub kernel: String,
    /// How often.
    pub count: usize,
    /// How long.
    pub time: u64,
    /// Of the phase, 0 to 1.
    pub share: f64,
    /// What it did.
    pub work: Work,
    /// Bytes read per second.
    pub bytes_per_second: Option<f64>,
    /// Multiplications and additions per second.
    pub ops_per_second: Option<f64>,
    /// The least time that the machine's limits allow, by the time it took: 1 is the roof.
    pub of_roofline: Option<f64>,
    /// How long the caller waited for other threads.
    pub waited: u64,
}

/// A token of the reply.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Token {
    /// When it began.
    pub start: u64,
    /// How long it took.
    pub time: u64,
    /// Time in operations.
    pub explained: u64,
}

/// Percentiles by the nearest rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// Half of the tokens took no longer.
    pub p50: u64,
    /// 95 of 100.
    pub p95: u64,
    /// 99 of 100.
    pub p99: u64,
    /// All.
    pub max: u64,
}

impl Latency {
    /// Of these times.
    pub fn of(mut times: Vec<u64>) -> Option<Self> {
        times.sort_unstable();
        let rank = |share: f64| {
            let rank = (share * times.len() as f64).ceil() as usize;
            times.get(rank.max(1) - 1).copied()
        };
        Some(Self {
            p50: rank(0.5)?,
            p95: rank(0.95)?,
            p99: rank(0.99)?,
            max: rank(1.0)?,
        })
    }
}

/// Resident memory at some time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MemorySample {
    /// When.
    pub at: u64,
    /// Bytes of this process alone.
    pub anonymous: u64,
    /// Bytes of mapped files.
    pub file: u64,
}

impl Report {
    pub(super) fn new(
        run: &Recorder,
        about: About,
        limits: Limits,
        memory: Vec<MemorySample>,
    ) -> Self {
        let trace = &run.trace;
        let tokens: Vec<Token> = run
            .tokens
            .iter()
            .map(|token| Token {
                start: token.start,
                time: token.end - token.start,
                explained: spans_in(trace, token.start, token.end)
                    .map(Span::time)
                    .sum(),
            })
            .collect();
        let sampled = |span: &&Span| trace.label(span).operation == Operation::Sample;
        let first_sample = trace.spans.iter().filter(sampled).map(|s| s.end).min();
        let begin = run.phases.first().map(|phase| phase.start);
        Self {
            latency: Latency::of(tokens.iter().skip(1).map(|token| token.time).collect()),
            first_token: first_sample.zip(begin).map(|(end, begin)| end - begin),
            energy_source: run
                .phases
                .iter()
                .find_map(|phase| Some(phase.energy?.0.to_owned())),
            phases: (0..run.phases.len())
                .map(|i| phase(run, i, &about, &limits))
                .collect(),
            dropped: trace.dropped,
            about,
            limits,
            tokens,
            memory,
        }
    }
}

fn spans_in(trace: &Trace, start: u64, end: u64) -> impl Iterator<Item = &Span> {
    let spans = trace.spans.iter();
    spans.filter(move |span| span.start >= start && span.end <= end)
}

fn phase(run: &Recorder, i: usize, about: &About, limits: &Limits) -> Phase {
    let (trace, record) = (&run.trace, &run.phases[i]);
    let time = (record.end - record.start).saturating_sub(record.own);
    let mut rows: Vec<Option<Row>> = vec![None; trace.labels.len()];
    for span in spans_in(trace, record.start, record.end) {
        let label = trace.label(span);
        let row = rows[span.label as usize].get_or_insert_with(|| Row {
            operation: label.operation,
            name: label.name.clone(),
            kernel: label.kernel.clone(),
            count: 0,
            time: 0,
            share: 0.0,
            work: Work::default(),
            bytes_per_second: None,
            ops_per_second: None,
            of_roofline: None,
            waited: 0,
        });
        row.count += 1;
        row.time += span.time();
        row.work += span.work;
        row.waited += span.waited;
    }
    let mut operations: Vec<Row> = rows.into_iter().flatten().collect();
    for row in &mut operations {
        let seconds = row.time as f64 / 1e9;
        let rate = |amount: u64| (amount > 0 && seconds > 0.0).then(|| amount as f64 / seconds);
        row.share = row.time as f64 / time.max(1) as f64;
        row.bytes_per_second = rate(row.work.bytes());
        row.ops_per_second = rate(row.work.ops());
        row.of_roofline = limits
            .least_seconds(&row.work, &row.kernel)
            .filter(|_| seconds > 0.0)
            .map(|least| least / seconds);
    }
    operations.sort_by_key(|row| std::cmp::Reverse(row.time));
    let (mut least, mut took) = (0.0, 0.0);
    for row in &operations {
        if let Some(of) = row.of_roofline {
            least += of * row.time as f64;
            took += row.time as f64;
        }
    }
    let passes: Vec<_> = trace
        .passes
        .iter()
        .filter(|pass| pass.start >= record.start && pass.end <= record.end)
        .collect();
    let in_passes: u64 = passes.iter().map(|pass| pass.end - pass.start).sum();
    let worked: u64 = passes.iter().map(|pass| pass.worked).sum();
    let others = about.n_threads.saturating_sub(1) as u64;
    let idle = |others: u64| in_passes.saturating_sub(worked / others);
    let mut work = Work::default();
    operations.iter().for_each(|row| work += row.work);
    Phase {
        name: record.name.to_owned(),
        start: record.start,
        end: record.end,
        time,
        passes: passes.len(),
        tokens: passes.iter().map(|pass| pass.n_tokens).sum(),
        explained: operations.iter().map(|row| row.time).sum(),
        work,
        waited: operations.iter().map(|row| row.waited).sum(),
        of_roofline: (took > 0.0).then(|| least / took),
        idle: (others > 0 && !passes.is_empty()).then(|| idle(others)),
        counters: record.counters,
        energy: record.energy.map(|(_, microjoules)| microjoules),
        condition: record.condition,
        operations,
    }
}

impl PassKind {
    /// The name of a pass.
    pub fn name(self) -> &'static str {
        match self {
            PassKind::Prefill => "prefill",
            PassKind::Decode => "decode",
        }
    }
}
