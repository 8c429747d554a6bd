//! When each dispatch began and ended on the device, for profiles: a timestamp after every one. What a pass does then runs
//! one thing after the other, as it does anyway.

use wgpu::BufferUsages;

use super::device::{Buffer, Device};
use super::pipeline::{Experts, Shader};
use crate::backend::tracer::{joined, short_name};
use crate::error::Result;
use crate::profile::span::now;
use crate::profile::{Label, Operation, PassKind, PassRecord, Span, Trace, Work};

/// What decides which keys are read.
const DECIDES: [&str; 3] = ["sum_keys_gpu", "chunk_scores_gpu", "choose_gpu"];

/// Timestamps of one submission, and the trace that they become.
pub(super) struct Times {
    queries: wgpu::QuerySet,
    resolved: Buffer,
    staging: Buffer,
    /// Nanoseconds of a tick.
    period: f64,
    /// Of the submission that runs.
    running: Vec<Span>,
    trace: Trace,
    pass: Option<PassRecord>,
    work: Work,
}

impl Times {
    /// For submissions of `n` dispatches.
    pub(super) fn new(device: &Device, n: usize) -> Result<Self> {
        let bytes = 8 * (n as u64 + 1);
        let queries = device.raw.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: n as u32 + 1,
        });
        let resolve = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
        let read = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        Ok(Self {
            queries,
            resolved: device.buffer(bytes, resolve, "timestamps")?,
            staging: device.buffer(bytes, read, "timestamps")?,
            period: f64::from(device.queue.get_timestamp_period()),
            running: Vec::with_capacity(n),
            trace: Trace::default(),
            pass: None,
            work: Work::default(),
        })
    }

    pub(super) fn queries(&self) -> &wgpu::QuerySet {
        &self.queries
    }

    /// A pass begins, of so many tokens as its embedding will say.
    pub(super) fn begin(&mut self, kind: PassKind) {
        let first = self.trace.spans.len();
        self.pass = Some(PassRecord {
            kind,
            n_tokens: 0,
            start: now(),
            end: 0,
            spans: first..first,
            worked: 0,
        });
    }

    /// The pass has so many.
    pub(super) fn tokens(&mut self, n: usize) {
        if let Some(pass) = &mut self.pass {
            pass.n_tokens = n;
        }
    }

    /// The pass has ended, and the host has what it wanted.
    pub(super) fn end(&mut self) {
        let Some(mut pass) = self.pass.take() else {
            return;
        };
        let ran = self.trace.spans.last().map_or(pass.start, |span| span.end);
        let label = Label::new(Operation::Read, "host, submission, read", "");
        let read = self.span_of(&label, None, Work::default());
        let end = now();
        let start = ran.clamp(pass.start, end);
        self.trace.spans.push(Span { start, end, ..read });
        pass.end = end;
        pass.spans.end = self.trace.spans.len();
        self.trace.passes.push(pass);
    }

    /// What was timed since the last call.
    pub(super) fn take(&mut self) -> Trace {
        let mut taken = std::mem::take(&mut self.trace);
        self.trace.labels.clone_from(&taken.labels);
        taken.place_layers();
        taken
    }

    /// The span of a dispatch that will run, before which `work` had been done.
    pub(super) fn span(&mut self, shader: Shader, names: &[&str], work: Work) -> Span {
        let operation = match shader {
            Shader::Gemv { experts, .. }
            | Shader::GemvPacked { experts, .. }
            | Shader::Gemm { experts, .. }
            | Shader::GemmMatrix { experts, .. }
                if experts != Experts::None =>
            {
                Operation::Moe
            }
            Shader::Group { .. } | Shader::Slots => Operation::Moe,
            Shader::Gemv { glu: Some(_), .. } | Shader::GemvPacked { glu: Some(_), .. } => {
                Operation::GatedFfn
            }
            Shader::Gemv { .. }
            | Shader::GemvPacked { .. }
            | Shader::Gemm { .. }
            | Shader::GemmMatrix { .. } => Operation::Linear,
            Shader::Embed(_) => Operation::Embed,
            Shader::RmsNorm { .. } => Operation::RmsNorm,
            Shader::Heads { .. } => Operation::KvWrite,
            Shader::AttentionOne { .. }
            | Shader::AttentionMerge { .. }
            | Shader::AttentionMany { .. }
            | Shader::SumKeys { .. }
            | Shader::ChunkScores { .. }
            | Shader::Choose { .. } => Operation::Attention,
            Shader::ShortConv { .. } => Operation::ShortConv,
            Shader::Glu(_) => Operation::Glu,
            Shader::Add => Operation::Add,
            Shader::Route { .. } => Operation::Route,
            Shader::Top { .. } => Operation::Read,
        };
        let names = names.iter().map(|name| name.trim_end_matches(".weight"));
        let layer = names.clone().next().and_then(|name| short_name(name).0);
        let name = match names.len() > 0 {
            true => joined(names.map(|name| short_name(name).1)),
            false => operation.name().to_owned(),
        };
        let kernel = match shader {
            Shader::Gemv { dtype, .. } => format!("gemv_{dtype}_gpu").to_lowercase(),
            Shader::GemvPacked { dtype, .. } => format!("gemv_{dtype}_gpu_packed").to_lowercase(),
            Shader::Gemm { dtype, .. } => format!("gemm_{dtype}_gpu").to_lowercase(),
            Shader::GemmMatrix { dtype, .. } => format!("gemm_{dtype}_gpu_matrix").to_lowercase(),
            Shader::AttentionMerge { .. } => "attention_merge_gpu".to_owned(),
            Shader::SumKeys { .. } => DECIDES[0].to_owned(),
            Shader::ChunkScores { .. } => DECIDES[1].to_owned(),
            Shader::Choose { .. } => DECIDES[2].to_owned(),
            Shader::Top { .. } => "top_gpu".to_owned(),
            Shader::Group { .. } => "group_gpu".to_owned(),
            Shader::Slots => "slots_gpu".to_owned(),
            _ => format!("{}_gpu", operation.name()),
        };
        let done = work.since(&self.work);
        self.work = work;
        let label = Label::new(operation, &name, &kernel);
        self.span_of(&label, layer, done)
    }

    fn span_of(&mut self, label: &Label, layer: Option<u16>, work: Work) -> Span {
        Span {
            label: self.trace.intern(label),
            layer,
            start: 0,
            end: 0,
            work,
            waited: 0,
        }
    }

    /// Reads the timestamps of `spans`, which have just been encoded.
    pub(super) fn resolve(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        spans: impl Iterator<Item = Span>,
    ) {
        self.running.clear();
        self.running.extend(spans);
        let n = self.running.len() as u32 + 1;
        encoder.resolve_query_set(&self.queries, 0..n, &self.resolved.raw, 0);
        let bytes = 8 * u64::from(n);
        encoder.copy_buffer_to_buffer(&self.resolved.raw, 0, &self.staging.raw, 0, bytes);
    }

    /// Waits for the submission and places its times on the clock of the host: its end is now.
    pub(super) fn collect(&mut self, device: &Device) -> Result<()> {
        let bytes = 8 * (self.running.len() as u64 + 1);
        let mut ticks = Vec::new();
        device.read_back(&self.staging.raw, bytes, None, |view| {
            ticks.extend(
                view.chunks_exact(8)
                    .map(|tick| u64::from_le_bytes(tick.try_into().expect("eight bytes"))),
            );
        })?;
        let (end, last) = (now(), ticks.last().copied().unwrap_or(0));
        let at = |tick: u64| {
            let before = last.saturating_sub(tick) as f64 * self.period;
            end.saturating_sub(before as u64)
        };
        for (ticks, span) in ticks.windows(2).zip(&self.running) {
            let (start, end) = (at(ticks[0]), at(ticks[1]));
            let mut span = Span {
                start,
                end,
                ..*span
            };
            let label = &self.trace.labels[span.label as usize];
            if DECIDES.contains(&label.kernel.as_str()) {
                span.work.decide_ns = end - start;
            }
            self.trace.spans.push(span);
        }
        Ok(())
    }
}
