//! What is told of a test: llama-bench's fields, and ours after them.

use std::time::Duration;

use kinglet::profile::Work;
use kinglet::profile::machine::Resident;
use kinglet::{BackendKind, KvTypes};
use serde_json::json;

use crate::bench::output::{Column, Record, Table};
use crate::bench::plan::{Group, Test};
use crate::bench::stats::{deviation, mean, median, percentile};
use crate::bench::timeline::Sample;
use crate::ui;

/// One test, measured.
pub struct Row<'a> {
    pub group: &'a Group,
    pub engine: BackendKind,
    pub model: &'a ModelCard,
    pub limits: &'a Limits,
    pub test: Test,
    /// Of the start, as RFC 3339 has it.
    pub time: String,
    /// Of everything, what is not timed included.
    pub wall: Duration,
    pub samples: Vec<Sample>,
    pub memory: Option<Resident>,
    /// Processes that were busy beside it.
    pub n_busy: usize,
}

/// What a table says of a model.
#[derive(Clone)]
pub struct ModelCard {
    /// Architecture, size, format.
    pub kind: String,
    pub bytes: u64,
    pub n_params: u64,
    /// Rows of the kernel table that run it.
    pub kernels: Vec<&'static str>,
}

/// The most that the machine can do with the threads of a test; each where it is known. Per second.
#[derive(Clone, Copy, Default)]
pub struct Limits {
    /// Bytes read from a large mapped file.
    pub read: Option<f64>,
    /// Bytes read from this model's file by the same loops.
    pub read_model: Option<f64>,
    /// Operations on bytes.
    pub int8: Option<f64>,
    /// Operations on bf16.
    pub bf16: Option<f64>,
    /// Operations on floats.
    pub f32: Option<f64>,
    /// Bytes of the largest cache.
    pub cache_bytes: Option<u64>,
}

/// What was reached, per second, and per cent of what can be.
struct Reached {
    value: Option<f64>,
    limits: Vec<Option<f64>>,
}

impl Reached {
    fn new(amount: u64, time: Duration, limits: &[Option<f64>]) -> Self {
        let seconds = time.as_secs_f64();
        let value = (amount > 0 && seconds > 0.0).then(|| amount as f64 / seconds);
        let share = |limit: &Option<f64>| Some(100.0 * value? / (*limit)?);
        Self {
            value,
            limits: limits.iter().map(share).collect(),
        }
    }

    fn giga(&self) -> Option<f64> {
        self.value.map(|value| round(value / 1e9))
    }
}

/// Three digits after the point are more than any clock gives.
fn round(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

fn ms(time: Duration) -> f64 {
    round(time.as_secs_f64() * 1e3)
}

fn cell<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".into(), text)
}

/// Columns of the table; those of what does not vary are left out.
pub fn columns(groups: &[Group]) -> Vec<Column> {
    let shown = Shown::new(groups);
    let mut columns = vec![
        Column::text("model", 24),
        Column::number("size", 10),
        Column::number("params", 10),
        Column::text("backend", 10),
        Column::number("threads", 7),
    ];
    if shown.n_batch {
        columns.push(Column::number("n_batch", 7));
    }
    if shown.n_ubatch {
        columns.push(Column::number("n_ubatch", 8));
    }
    if shown.kv {
        columns.push(Column::number("type_k", 6));
        columns.push(Column::number("type_v", 6));
    }
    if shown.sparsity {
        columns.push(Column::text("attention", 20));
    }
    columns.push(Column::number("test", 15));
    columns.push(Column::number("t/s", 20));
    columns
}

/// Which columns differ from llama-bench's defaults.
pub struct Shown {
    n_batch: bool,
    n_ubatch: bool,
    kv: bool,
    sparsity: bool,
}

impl Shown {
    pub fn new(groups: &[Group]) -> Self {
        Self {
            n_batch: groups.iter().any(|g| g.n_batch != 2048),
            n_ubatch: groups.iter().any(|g| g.n_ubatch != 512),
            kv: groups.iter().any(|g| g.kv != KvTypes::default()),
            sparsity: groups.iter().any(|g| g.attention() != "dense"),
        }
    }
}

/// The tables of `--details`.
pub fn details() -> Vec<Table> {
    let with = |columns: &[Column]| {
        let head = [
            Column::text("model", 24),
            Column::number("threads", 7),
            Column::number("test", 15),
        ];
        head.iter().chain(columns).copied().collect()
    };
    vec![
        Table::new(
            "Time: of each decoded token, up to the first one, and how often threads wait for each other",
            with(&[
                Column::number("ms p50", 8),
                Column::number("ms p95", 8),
                Column::number("ms p99", 8),
                Column::number("first ms", 9),
                Column::number("barriers/token", 14),
            ]),
        ),
        Table::new(
            "Limits: decoding reads (GB/s), a prompt computes (GOP/s), in per cent of what the machine can do",
            with(&[
                Column::number("GB/s", 7),
                Column::number("% memory", 8),
                Column::number("% file", 7),
                Column::number("GOP/s", 8),
                Column::number("% int8", 7),
                Column::number("% bf16", 7),
            ]),
        ),
        Table::new(
            "Memory: the most that was this process's own, that was of mapped files, and of both together",
            with(&[
                Column::number("own", 11),
                Column::number("files", 11),
                Column::number("peak", 11),
            ]),
        ),
    ]
}

impl Row<'_> {
    /// Tokens per second of each repetition.
    fn rates(&self) -> Vec<f64> {
        let n = self.test.n_tokens() as f64;
        let rate = |sample: &Sample| n / sample.total.as_secs_f64();
        self.samples.iter().map(rate).collect()
    }

    /// Work and time of all repetitions, of the prompt or of the reply.
    fn sum(&self, part: impl Fn(&Sample) -> (Work, Duration)) -> (Work, Duration) {
        let mut all = (Work::default(), Duration::ZERO);
        for (work, time) in self.samples.iter().map(part) {
            all.0 += work;
            all.1 += time;
        }
        all
    }

    /// The result in all its forms.
    pub fn record(&self, shown: &Shown) -> Record {
        let limits = self.limits;
        let n_samples = self.samples.len() as u64;
        let rates = self.rates();
        let (avg, stddev) = (mean(&rates), deviation(&rates));
        let ns = self.samples.iter().map(|sample| sample.total.as_nanos());
        let ns: Vec<u64> = ns.map(|ns| ns as u64).collect();
        let ns_float: Vec<f64> = ns.iter().map(|ns| *ns as f64).collect();
        let tokens: Vec<Duration> = self
            .samples
            .iter()
            .flat_map(|sample| sample.tokens.clone())
            .collect();
        let token_ms = [0.5, 0.95, 0.99].map(|share| percentile(&tokens, share).map(ms));
        let first: Vec<Duration> = self.samples.iter().filter_map(|s| s.prompt).collect();
        let first = median(&first).map(ms);
        let (reply, reply_time) = self.sum(|s| (s.reply_work, s.tokens.iter().sum()));
        let (prompt, prompt_time) =
            self.sum(|s| (s.prompt_work, s.prompt.unwrap_or(Duration::ZERO)));
        let n_decoded = (self.test.n_gen as u64 * n_samples).max(1);
        let read = Reached::new(reply.bytes(), reply_time, &[limits.read, limits.read_model]);
        let computed = Reached::new(prompt.ops(), prompt_time, &[limits.int8, limits.bf16]);
        let barriers = (reply.regions as f64) / n_decoded as f64;
        let barriers = (self.test.n_gen > 0 && reply.bytes() > 0).then(|| round(barriers));
        let fits = limits.cache_bytes.map(|cache| self.model.bytes <= cache);
        let group = self.group;

        let mut cells = vec![
            self.model.kind.clone(),
            size(self.model.bytes),
            params(self.model.n_params),
            backend(self.engine),
            group.n_threads.to_string(),
        ];
        if shown.n_batch {
            cells.push(group.n_batch.to_string());
        }
        if shown.n_ubatch {
            cells.push(group.n_ubatch.to_string());
        }
        if shown.kv {
            cells.extend([
                group.kv.keys.name().to_owned(),
                group.kv.values.name().to_owned(),
            ]);
        }
        if shown.sparsity {
            cells.push(group.attention());
        }
        cells.extend([self.test.to_string(), format!("{avg:.2} ± {stddev:.2}")]);

        let number = |value: Option<f64>| cell(value, |x| format!("{x:.2}"));
        let percent = |value: Option<f64>| cell(value, |x| format!("{x:.1}"));
        let with = |rest: Vec<String>| {
            let threads = group.n_threads.to_string();
            let head = vec![self.model.kind.clone(), threads, self.test.to_string()];
            head.into_iter().chain(rest).collect()
        };
        let memory = |of: fn(&Resident) -> u64| cell(self.memory.as_ref(), |m| ui::bytes(of(m)));
        let details = vec![
            with(vec![
                number(token_ms[0]),
                number(token_ms[1]),
                number(token_ms[2]),
                number(first),
                percent(barriers),
            ]),
            with(vec![
                number(read.giga()),
                percent(read.limits[0]),
                percent(read.limits[1]),
                number(computed.giga()),
                percent(computed.limits[0]),
                percent(computed.limits[1]),
            ]),
            with(vec![
                memory(|m| m.anonymous),
                memory(|m| m.file),
                memory(|m| m.peak),
            ]),
        ];

        let mut experts = prompt.experts;
        experts += reply.experts;
        let per_token = |n: u64| (self.test.n_gen > 0).then_some(n / n_decoded);
        let giga = |limit: Option<f64>| limit.map(|limit| round(limit / 1e9));
        let fields = vec![
            ("backends", json!(backend(self.engine))),
            ("model_filename", json!(group.model.display().to_string())),
            ("model_type", json!(self.model.kind)),
            ("model_size", json!(self.model.bytes)),
            ("model_n_params", json!(self.model.n_params)),
            ("n_batch", json!(group.n_batch)),
            ("n_ubatch", json!(group.n_ubatch)),
            ("n_threads", json!(group.n_threads)),
            ("n_threads_batch", json!(group.n_threads_batch)),
            ("type_k", json!(group.kv.keys.name())),
            ("type_v", json!(group.kv.values.name())),
            ("attention", json!(group.attention())),
            ("n_prompt", json!(self.test.n_prompt)),
            ("n_gen", json!(self.test.n_gen)),
            ("n_depth", json!(self.test.n_depth)),
            ("test_time", json!(self.time)),
            ("avg_ns", json!(mean(&ns_float) as u64)),
            ("stddev_ns", json!(deviation(&ns_float) as u64)),
            ("avg_ts", json!(avg)),
            ("stddev_ts", json!(stddev)),
            ("test", json!(self.test.to_string())),
            ("wall_ms", json!(ms(self.wall))),
            ("n_busy", json!(self.n_busy)),
            ("token_ms_p50", json!(token_ms[0])),
            ("token_ms_p95", json!(token_ms[1])),
            ("token_ms_p99", json!(token_ms[2])),
            ("first_token_ms", json!(first)),
            ("barriers_per_token", json!(barriers)),
            ("decode_weight_bytes", json!(per_token(reply.weight_bytes))),
            ("decode_kv_bytes", json!(per_token(reply.kv_bytes))),
            ("decode_pairs_read", json!(reply.share_read().map(round))),
            ("prefill_pairs_read", json!(prompt.share_read().map(round))),
            ("prefill_delta", json!(prompt.delta.sparsity())),
            ("decode_delta", json!(reply.delta.sparsity())),
            ("decide_ns", json!(prompt.decide_ns + reply.decide_ns)),
            ("decode_gb_s", json!(read.giga())),
            ("decode_percent_of_memory", json!(read.limits[0].map(round))),
            ("decode_percent_of_file", json!(read.limits[1].map(round))),
            ("prefill_gop_s", json!(computed.giga())),
            (
                "prefill_percent_of_bf16",
                json!(computed.limits[1].map(round)),
            ),
            (
                "prefill_percent_of_int8",
                json!(computed.limits[0].map(round)),
            ),
            ("experts_used", json!(experts.used)),
            ("experts_hits", json!(experts.hits)),
            ("experts_bytes", json!(experts.bytes)),
            (
                "experts_reading_ms",
                json!(round(experts.reading as f64 / 1e6)),
            ),
            (
                "experts_waited_ms",
                json!(round(experts.waited as f64 / 1e6)),
            ),
            ("neurons", json!(reply.neurons)),
            ("neurons_skipped", json!(reply.skipped_neurons)),
            ("limit_memory_gb_s", json!(giga(limits.read))),
            ("limit_file_gb_s", json!(giga(limits.read_model))),
            ("limit_int8_gop_s", json!(giga(limits.int8))),
            ("limit_bf16_gop_s", json!(giga(limits.bf16))),
            ("limit_f32_gop_s", json!(giga(limits.f32))),
            ("largest_cache_bytes", json!(limits.cache_bytes)),
            ("weights_fit_in_cache", json!(fits)),
            ("memory_own_bytes", json!(self.memory.map(|m| m.anonymous))),
            ("memory_file_bytes", json!(self.memory.map(|m| m.file))),
            ("memory_peak_bytes", json!(self.memory.map(|m| m.peak))),
            ("kernels", json!(self.model.kernels.join(" "))),
        ];
        let lists = vec![("samples_ns", json!(ns)), ("samples_ts", json!(rates))];
        Record {
            cells,
            fields,
            lists,
            details,
            notes: self.notes(),
        }
    }

    /// Of experts that are read when they are used, and of neurons that are skipped.
    fn expert_notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let (reply, _) = self.sum(|s| (s.reply_work, s.total));
        let (prompt, _) = self.sum(|s| (s.prompt_work, s.total));
        for (work, what, n) in [
            (prompt, "prompt", self.test.n_prompt),
            (reply, "reply", self.test.n_gen),
        ] {
            if let Some(line) = ui::expert_line(&work.experts, n * self.samples.len()) {
                notes.push(format!("experts, {} {what}: {line}", self.test));
            }
            if what == "reply" && work.neurons > 0 {
                let share = work.skipped_neurons as f64 / work.neurons as f64;
                let share = 100.0 * share;
                notes.push(format!(
                    "neurons skipped, {} {what}: {share:.1} %",
                    self.test
                ));
            }
        }
        notes
    }

    fn notes(&self) -> Vec<String> {
        let limits = self.limits;
        let mut notes = self.expert_notes();
        if let (Some(read), Some(int8)) = (limits.read, limits.int8) {
            let own = limits.read_model.map_or(String::new(), |own| {
                format!(", {:.1} from the file of {}", own / 1e9, self.model.kind)
            });
            notes.push(format!(
                "limits, {} threads: {:.1} GB/s from memory{own}; {:.0} GOP/s int8{}",
                self.group.n_threads,
                read / 1e9,
                int8 / 1e9,
                limits
                    .bf16
                    .map_or(String::new(), |bf16| format!(", {:.0} bf16", bf16 / 1e9)),
            ));
        }
        if let Some(cache) = limits
            .cache_bytes
            .filter(|cache| self.model.bytes <= *cache)
        {
            notes.push(format!(
                "{}: the weights fit into the largest cache ({}), so more than 100 % of memory can be",
                self.model.kind,
                ui::bytes(cache)
            ));
        }
        if self.n_busy > 0 {
            notes.push(format!("beside it: {} busy processes", self.n_busy));
        }
        let kernels = self.model.kernels.join(" ");
        notes.push(format!("kernels of {}: {kernels}", self.model.kind));
        notes
    }
}

/// The name in the column `backend`: llama-bench's for its own.
pub fn backend(engine: BackendKind) -> String {
    match engine {
        BackendKind::Cpu => "CPU".into(),
        other => other.name().into(),
    }
}

/// `93.81 MiB`, as llama-bench writes it.
pub fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 {
        format!("{mib:.2} MiB")
    } else {
        format!("{:.2} GiB", mib / 1024.0)
    }
}

/// `134.52 M`, as llama-bench writes it.
pub fn params(n: u64) -> String {
    let millions = n as f64 / 1e6;
    if millions < 1000.0 {
        format!("{millions:.2} M")
    } else {
        format!("{:.2} B", millions / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_llama_benchs_units() {
        assert_eq!(size(98_304), "0.09 MiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(params(134_515_008), "134.52 M");
        assert_eq!(params(1_170_000_000), "1.17 B");
    }

    #[test]
    fn shares_of_a_limit() {
        let reached = Reached::new(3_000_000, Duration::from_millis(2), &[Some(6e9), None]);
        assert_eq!(reached.giga(), Some(1.5));
        assert_eq!(reached.limits, [Some(25.0), None]);
        let nothing = Reached::new(0, Duration::ZERO, &[Some(6e9)]);
        assert_eq!((nothing.giga(), nothing.limits), (None, vec![None]));
    }
}
