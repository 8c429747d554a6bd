//! Wraps a backend and writes down when each operation began and ended, what it did, and who ran it.
//!
//! Its tensors and weights are those of the backend within, so a model cannot tell the two apart, and where nobody traces
//! nothing is measured. Room for spans is taken once: a pass allocates nothing after the first of its kind. A backend that
//! records operations and runs them later is seen recording.

use std::cell::Cell;
use std::ops::Range;
use std::time::Duration;

use super::select::KvOptions;
use super::{Activation, Attention, Backend, GatedFfn, Linear, Moe, Rope, RopePairs, Runs, Step};
use crate::cancel::Cancel;
use crate::error::Result;
use crate::profile::span::now;
use crate::profile::{
    DeltaWork, ExpertWork, Label, Operation, PassKind, PassRecord, Span, Trace, Work,
};
use crate::quant::Tensor;

/// Spans between two calls of [`Backend::take_trace`]; what comes later is counted and lost. A pass has some hundreds.
const ROOM: usize = 1 << 15;

/// Passes likewise.
const ROOM_PASSES: usize = ROOM / 16;

/// A backend that keeps an account of its time.
pub struct Tracer<B> {
    inner: B,
    trace: Trace,
    /// What the operations of a pass were the last time: passes repeat each other.
    sites: Vec<Site>,
    /// Operations of this pass so far.
    at: usize,
    pass: Pass,
    /// When room was made for the next pass: from the first layer to the last.
    reserved: Cell<Option<(u64, u64)>>,
    /// Counters of the backend after the last operation.
    work: Work,
    waited: Duration,
}

/// The pass that runs.
struct Pass {
    kind: PassKind,
    n_tokens: usize,
    start: u64,
    first_span: usize,
    worked: Duration,
}

/// An operation at its place in a pass.
struct Site {
    key: Key,
    label: u32,
    layer: Option<u16>,
}

/// What tells operations apart. Names are compared by where they lie: each linear layer has its own, as has each kernel.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    operation: Operation,
    matrix: usize,
    kernel: usize,
}

impl<B: Backend> Tracer<B> {
    /// Traces `inner`.
    pub fn new(inner: B) -> Self {
        inner.time_waits();
        let trace = Trace {
            // Written once, so that pages are there before they are counted as somebody's faults.
            spans: vec![EMPTY; ROOM],
            passes: Vec::with_capacity(ROOM_PASSES),
            ..Trace::default()
        };
        let mut tracer = Self {
            pass: Pass {
                kind: PassKind::Prefill,
                n_tokens: 0,
                start: 0,
                first_span: 0,
                worked: Duration::ZERO,
            },
            sites: Vec::new(),
            at: 0,
            reserved: Cell::new(None),
            work: inner.work(),
            waited: inner.waited(),
            inner,
            trace,
        };
        tracer.trace.spans.clear();
        tracer
    }

    /// Runs an operation and writes it down.
    fn timed<T>(
        &mut self,
        operation: Operation,
        kernel: &'static str,
        run: impl FnOnce(&mut B) -> T,
    ) -> T {
        let (key, label) = plain(operation, kernel);
        self.timed_as(key, label, run)
    }

    /// The same for what has a label of its own.
    fn timed_as<T>(
        &mut self,
        key: Key,
        label: impl FnOnce() -> (Option<u16>, Label),
        run: impl FnOnce(&mut B) -> T,
    ) -> T {
        let start = now();
        let out = run(&mut self.inner);
        let end = now();
        self.record(key, label, start, end);
        out
    }

    fn record(
        &mut self,
        key: Key,
        label: impl FnOnce() -> (Option<u16>, Label),
        start: u64,
        end: u64,
    ) {
        let known = self.sites.get(self.at).filter(|site| site.key == key);
        if known.is_none() {
            let site = match self.sites.iter().find(|site| site.key == key) {
                Some(&Site { label, layer, .. }) => Site { key, label, layer },
                None => {
                    let (layer, label) = label();
                    let label = self.trace.intern(&label);
                    Site { key, label, layer }
                }
            };
            match self.sites.get_mut(self.at) {
                Some(place) => *place = site,
                None => self.sites.push(site),
            }
        }
        let Site { label, layer, .. } = self.sites[self.at];
        self.at += 1;
        let (work, waited) = (self.inner.work(), self.inner.waited());
        if self.trace.spans.len() < ROOM {
            self.trace.spans.push(Span {
                label,
                layer,
                start,
                end,
                work: work.since(&self.work),
                waited: (waited - self.waited).as_nanos() as u64,
            });
        } else {
            self.trace.dropped += 1;
        }
        (self.work, self.waited) = (work, waited);
    }

    fn end_pass(&mut self) {
        let pass = &self.pass;
        if self.trace.passes.len() == ROOM_PASSES {
            self.trace.dropped += (self.trace.spans.len() - pass.first_span) as u64;
            self.trace.spans.truncate(pass.first_span);
            return;
        }
        self.trace.passes.push(PassRecord {
            kind: pass.kind,
            n_tokens: pass.n_tokens,
            start: pass.start,
            end: now(),
            spans: pass.first_span..self.trace.spans.len(),
            worked: (self.inner.worked() - pass.worked).as_nanos() as u64,
        });
    }
}

/// The key and the label of an operation without weights.
fn plain(
    operation: Operation,
    kernel: &'static str,
) -> (Key, impl FnOnce() -> (Option<u16>, Label)) {
    let key = Key {
        operation,
        matrix: 0,
        kernel: kernel.as_ptr().addr(),
    };
    let label = move || (None, Label::new(operation, operation.name(), kernel));
    (key, label)
}

/// Room for a span.
const EMPTY: Span = Span {
    label: 0,
    layer: None,
    start: 0,
    end: 0,
    work: Work {
        weight_bytes: 0,
        kv_bytes: 0,
        matmul_ops: 0,
        attention_ops: 0,
        neurons: 0,
        skipped_neurons: 0,
        pairs: 0,
        pairs_read: 0,
        decide_ns: 0,
        delta: DeltaWork {
            dense: 0,
            far: 0,
            done: 0,
            elements: 0,
            changes: 0,
        },
        experts: ExpertWork {
            used: 0,
            hits: 0,
            bytes: 0,
            reading: 0,
            waited: 0,
            guesses: 0,
            guesses_used: 0,
            guesses_wasted: 0,
        },
        regions: 0,
    },
    waited: 0,
};

/// `blk.3.attn_q` and its like to the layer and the short name: `q`.
pub(super) fn short_name(name: &str) -> (Option<u16>, &str) {
    let in_layer = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(layer, part)| Some((layer.parse().ok()?, part)));
    let Some((layer, part)) = in_layer else {
        // The table of the embedding is the head where a file has no other.
        let head = ["output", "token_embd"].contains(&name);
        return (None, if head { "head" } else { name });
    };
    let short = match part {
        "attn_output" => part,
        _ => ["attn_", "ffn_", "shortconv."]
            .iter()
            .find_map(|group| part.strip_prefix(group))
            .unwrap_or(part),
    };
    (Some(layer), short)
}

/// `a+b` of names, each once.
pub(super) fn joined<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let mut distinct: Vec<&str> = Vec::new();
    for name in names {
        if !distinct.contains(&name) {
            distinct.push(name);
        }
    }
    distinct.join("+")
}

impl<B: Backend> Backend for Tracer<B> {
    type Matrix = B::Matrix;
    type Vector = B::Vector;
    type Tensor = B::Tensor;
    type Kv = B::Kv;
    type Conv = B::Conv;

    fn matrix(&self, tensor: &Tensor) -> Result<B::Matrix> {
        self.inner.matrix(tensor)
    }

    fn table(&self, tensor: &Tensor) -> Result<B::Matrix> {
        self.inner.table(tensor)
    }

    fn vector(&self, data: Vec<f32>) -> B::Vector {
        self.inner.vector(data)
    }

    fn kv(&self, attention: &Attention, options: &KvOptions) -> B::Kv {
        self.inner.kv(attention, options)
    }

    fn kv_reserve(&self, kv: &mut B::Kv, positions: Range<usize>) -> Result<()> {
        let start = now();
        let done = self.inner.kv_reserve(kv, positions);
        let first = self.reserved.get().map_or(start, |(first, _)| first);
        self.reserved.set(Some((first, now())));
        done
    }

    fn kv_copy(&self, kv: &B::Kv) -> Result<B::Kv> {
        self.inner.kv_copy(kv)
    }

    fn kv_save(
        &self,
        kv: &B::Kv,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.inner.kv_save(kv, n, sink)
    }

    fn kv_load(
        &self,
        kv: &mut B::Kv,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.inner.kv_load(kv, n, source)
    }

    fn kv_spare_bytes(&self, bytes: usize) -> usize {
        self.inner.kv_spare_bytes(bytes)
    }

    fn kv_bytes(&self, kv: &B::Kv) -> usize {
        self.inner.kv_bytes(kv)
    }

    fn conv_bytes(&self, conv: &B::Conv) -> usize {
        self.inner.conv_bytes(conv)
    }

    fn conv(&self, n_rows: usize, n_channels: usize) -> B::Conv {
        self.inner.conv(n_rows, n_channels)
    }

    fn conv_reset(&self, conv: &mut B::Conv) {
        self.inner.conv_reset(conv);
    }

    fn conv_rewind(&self, conv: &mut B::Conv, n: usize) -> bool {
        self.inner.conv_rewind(conv, n)
    }

    fn conv_rows(&self, conv: &B::Conv, out: &mut Vec<f32>) {
        self.inner.conv_rows(conv, out);
    }

    fn conv_set(&self, conv: &mut B::Conv, rows: &[f32]) {
        self.inner.conv_set(conv, rows);
    }

    fn set_cancel(&mut self, cancel: &Cancel) {
        self.inner.set_cancel(cancel);
    }

    fn stopped(&mut self) {
        self.inner.stopped();
    }

    fn begin(&mut self, step: Step) {
        let reserved = self.reserved.take();
        self.inner.begin(step);
        self.at = 0;
        self.pass = Pass {
            kind: match step {
                Step::Prefill => PassKind::Prefill,
                Step::Decode => PassKind::Decode,
            },
            n_tokens: 0,
            start: reserved.map_or_else(now, |(start, _)| start),
            first_span: self.trace.spans.len(),
            worked: self.inner.worked(),
        };
        // Another session on the same threads may have waited since.
        (self.work, self.waited) = (self.inner.work(), self.inner.waited());
        if let Some((start, end)) = reserved {
            let (key, label) = plain(Operation::KvReserve, "");
            self.record(key, label, start, end);
        }
    }

    fn embed(&mut self, table: &B::Matrix, tokens: &[u32], scale: f32) -> B::Tensor {
        self.pass.n_tokens = tokens.len();
        self.timed(Operation::Embed, "", |b| b.embed(table, tokens, scale))
    }

    fn import(&mut self, rows: &[f32], n_cols: usize) -> B::Tensor {
        self.pass.n_tokens = rows.len() / n_cols;
        self.timed(Operation::Embed, "", |b| b.import(rows, n_cols))
    }

    fn rms_norm(&mut self, x: &B::Tensor, gain: &B::Vector, eps: f32) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::RmsNorm);
        self.timed(Operation::RmsNorm, kernel, |b| b.rms_norm(x, gain, eps))
    }

    fn linear<const N: usize>(&mut self, x: &B::Tensor, layers: [&Linear<B>; N]) -> [B::Tensor; N] {
        let kernels = layers.map(|l| self.inner.kernel(Runs::Linear(&l.weight)));
        let key = Key {
            operation: Operation::Linear,
            matrix: layers.first().map_or(0, |l| l.name.as_ptr().addr()),
            kernel: kernels.first().map_or(0, |name| name.as_ptr().addr()),
        };
        let label = || {
            let names = layers.map(|l| short_name(&l.name));
            let name = joined(names.iter().map(|(_, name)| *name));
            let kernel = joined(kernels.into_iter());
            let layer = names.first().and_then(|(layer, _)| *layer);
            (layer, Label::new(Operation::Linear, &name, &kernel))
        };
        self.timed_as(key, label, |b| b.linear(x, layers))
    }

    fn gated_ffn(&mut self, x: &B::Tensor, ffn: &GatedFfn<B>) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::GatedFfn(ffn));
        if kernel.is_empty() {
            // Nothing is joined, so its parts are seen.
            let [gate, up] = self.linear(x, [&ffn.gate, &ffn.up]);
            let h = self.glu(gate, &up, ffn.activation);
            let [out] = self.linear(&h, [&ffn.down]);
            return out;
        }
        let key = Key {
            operation: Operation::GatedFfn,
            matrix: ffn.gate.name.as_ptr().addr(),
            kernel: kernel.as_ptr().addr(),
        };
        let down = self.inner.kernel(Runs::Linear(&ffn.down.weight));
        let label = || {
            let names = [&ffn.gate, &ffn.up, &ffn.down].map(|l| short_name(&l.name));
            let name = joined(names.iter().map(|(_, name)| *name));
            let kernel = joined([kernel, down].into_iter());
            (names[0].0, Label::new(Operation::GatedFfn, &name, &kernel))
        };
        self.timed_as(key, label, |b| b.gated_ffn(x, ffn))
    }

    fn foresee(&mut self, x: &B::Tensor, gain: &B::Vector, eps: f32, moe: &Moe<B>) {
        self.inner.foresee(x, gain, eps, moe);
    }

    fn route(&mut self, x: &B::Tensor, from: usize, moe: &Moe<B>) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::Route(moe));
        let key = Key {
            operation: Operation::Route,
            matrix: moe.router.name.as_ptr().addr(),
            kernel: kernel.as_ptr().addr(),
        };
        let label = || {
            let (layer, _) = short_name(&moe.router.name);
            (layer, Label::new(Operation::Route, "router", kernel))
        };
        self.timed_as(key, label, |b| b.route(x, from, moe))
    }

    fn moe(&mut self, x: &B::Tensor, routes: B::Tensor, moe: &Moe<B>) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::Moe(moe));
        let key = Key {
            operation: Operation::Moe,
            matrix: moe.gate.name.as_ptr().addr(),
            kernel: kernel.as_ptr().addr(),
        };
        let down = self.inner.kernel(Runs::Linear(&moe.down.weight));
        let label = || {
            let (layer, _) = short_name(&moe.gate.name);
            let kernel = joined([kernel, down].into_iter());
            (layer, Label::new(Operation::Moe, "experts", &kernel))
        };
        self.timed_as(key, label, |b| b.moe(x, routes, moe))
    }

    fn rope_angles(&mut self, rope: &Rope, start: usize, n: usize) -> B::Tensor {
        self.timed(Operation::RopeAngles, "", |b| b.rope_angles(rope, start, n))
    }

    fn rope(&mut self, x: &mut B::Tensor, head_dim: usize, pairs: RopePairs, angles: &B::Tensor) {
        let kernel = self.inner.kernel(Runs::Rope(pairs));
        self.timed(Operation::Rope, kernel, |b| {
            b.rope(x, head_dim, pairs, angles)
        });
    }

    fn kv_write(&mut self, kv: &mut B::Kv, k: &B::Tensor, v: &B::Tensor, start: usize) {
        let kernel = self.inner.kernel(Runs::KvWrite(kv));
        self.timed(Operation::KvWrite, kernel, |b| b.kv_write(kv, k, v, start));
    }

    fn kv_note(
        &mut self,
        kv: &mut B::Kv,
        q: &B::Tensor,
        first: usize,
        attention: &Attention,
    ) -> bool {
        let (key, label) = plain(Operation::Attention, self.inner.kernel(Runs::Attention(kv)));
        let start = now();
        let done = self.inner.kv_note(kv, q, first, attention);
        if done {
            self.record(key, label, start, now());
        }
        done
    }

    fn attention(
        &mut self,
        q: &B::Tensor,
        kv: &B::Kv,
        start: usize,
        attention: &Attention,
    ) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::Attention(kv));
        self.timed(Operation::Attention, kernel, |b| {
            b.attention(q, kv, start, attention)
        })
    }

    fn short_conv(&mut self, bcx: &B::Tensor, taps: &B::Vector, conv: &mut B::Conv) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::ShortConv);
        self.timed(Operation::ShortConv, kernel, |b| {
            b.short_conv(bcx, taps, conv)
        })
    }

    fn glu(&mut self, gate: B::Tensor, up: &B::Tensor, activation: Activation) -> B::Tensor {
        let kernel = self.inner.kernel(Runs::Glu);
        self.timed(Operation::Glu, kernel, |b| b.glu(gate, up, activation))
    }

    fn add(&mut self, x: &mut B::Tensor, y: &B::Tensor) {
        let kernel = self.inner.kernel(Runs::Add);
        self.timed(Operation::Add, kernel, |b| b.add(x, y));
    }

    fn rows_from(&mut self, x: B::Tensor, from: usize) -> B::Tensor {
        self.timed(Operation::RowsFrom, "", |b| b.rows_from(x, from))
    }

    fn read(&mut self, x: &B::Tensor, out: &mut Vec<f32>) -> Result<()> {
        let read = self.timed(Operation::Read, "", |b| b.read(x, out));
        self.end_pass();
        read
    }

    fn read_top(&mut self, x: &B::Tensor, k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool> {
        let read = self.timed(Operation::Read, "", |b| b.read_top(x, k, out));
        if !matches!(read, Ok(false)) {
            self.end_pass();
        }
        read
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.timed(Operation::Flush, "", |b| b.flush());
        self.end_pass();
        flushed
    }

    fn scratch_bytes(&self) -> usize {
        self.inner.scratch_bytes()
    }

    fn work(&self) -> Work {
        self.inner.work()
    }

    fn take_trace(&mut self) -> Option<Trace> {
        let mut taken = self.trace.clone();
        taken.place_layers();
        self.trace.spans.clear();
        self.trace.passes.clear();
        self.trace.dropped = 0;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_tensors_to_those_of_the_field() {
        for (name, layer, short) in [
            ("blk.3.attn_q", Some(3), "q"),
            ("blk.12.attn_output", Some(12), "attn_output"),
            ("blk.0.ffn_gate", Some(0), "gate"),
            ("blk.0.shortconv.in_proj", Some(0), "in_proj"),
            ("token_embd", None, "head"),
            ("output", None, "head"),
            ("blk.x.ffn_up", None, "blk.x.ffn_up"),
        ] {
            assert_eq!(short_name(name), (layer, short), "{name}");
        }
    }

    #[test]
    fn kernels_are_named_once() {
        let names = ["gemv_a", "gemv_b", "gemv_a"];
        assert_eq!(joined(names.into_iter()), "gemv_a+gemv_b");
    }
}
