//! The planner: a forward pass on shapes alone. No weight is read and no number computed; what each operation would do,
//! read and hold on the CPU is counted, so a plan is the forward pass and cannot drift from it.
//!
//! Scratch is the CPU's own free list, run on sizes.

use super::cpu::acts::{BF16_TOKENS, bf16_floats, q8_floats};
use super::cpu::attention;
use super::cpu::attention_noted;
use super::cpu::attention_selected;
use super::cpu::pages::spare_bytes;
use super::cpu::scratch::{Buffer, Scratch};
use super::cpu::table::{ActFormat, Operations};
use super::notes::NoteShape;
use std::ops::Range;

use super::cpu::moe::{chunk_rows, max_groups, n_chunks};
use super::cpu::{Kernels, conv_floats, gated, step_of_wanted};
use super::select::KvOptions;
use super::{
    Activation, Attention, Backend, GatedFfn, KV_PAGE, Linear, Moe, Rope, RopePairs, Step,
};
use crate::error::{Error, Result};
use crate::profile::roofline::Resource;
use crate::profile::{Operation, Work};
use crate::quant::Tensor as FileTensor;

/// What the calls of one operation with one kind of arithmetic do together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tally {
    /// The operation.
    pub op: Operation,
    /// What it multiplies with, where that is what it does.
    pub resource: Option<Resource>,
    /// Calls.
    pub count: u64,
    /// What they do, but for regions, which are the pool's affair.
    pub work: Work,
    /// Numbers that they write.
    pub values: u64,
}

/// A backend that counts.
pub struct Planner {
    operations: Operations,
    n_threads: usize,
    scratch: Scratch<usize>,
    step: Step,
    tallies: Vec<Tally>,
}

/// A weight matrix, of which the shape and the kernels matter.
pub struct Matrix {
    bytes: usize,
    n_in: usize,
    n_out: usize,
    kernels: Kernels,
}

/// The shape of activations, and the buffer that they would lie in.
pub struct Tensor {
    n_tokens: usize,
    n_cols: usize,
    _buffer: Buffer<usize>,
}

/// The pages that keys and values would lie in.
pub struct Kv {
    shape: Attention,
    options: KvOptions,
    n_pages: usize,
}

impl Matrix {
    fn row_bytes(&self) -> usize {
        self.bytes / self.n_out
    }
}

impl Planner {
    /// A planner for the CPU with `n_threads`.
    pub fn new(n_threads: usize) -> Self {
        Self {
            operations: Operations::best(),
            n_threads,
            scratch: Scratch::default(),
            step: Step::Prefill,
            tallies: Vec::new(),
        }
    }

    fn count(&mut self, op: Operation, resource: Option<Resource>, work: Work, values: usize) {
        let same = |t: &&mut Tally| t.op == op && t.resource == resource;
        match self.tallies.iter_mut().find(same) {
            Some(tally) => {
                tally.count += 1;
                tally.work += work;
                tally.values += values as u64;
            }
            None => self.tallies.push(Tally {
                op,
                resource,
                count: 1,
                work,
                values: values as u64,
            }),
        }
    }

    fn count_product(&mut self, weight: &Matrix, format: ActFormat, n_tokens: usize) {
        let work = Work {
            weight_bytes: weight.bytes as u64,
            matmul_ops: 2 * (weight.n_in * weight.n_out * n_tokens) as u64,
            ..Work::default()
        };
        self.count(
            Operation::Linear,
            Some(resource(format)),
            work,
            n_tokens * weight.n_out,
        );
    }

    fn tensor(&self, n_tokens: usize, n_cols: usize) -> Tensor {
        Tensor {
            n_tokens,
            n_cols,
            _buffer: self.scratch.take(n_tokens * n_cols),
        }
    }

    /// An elementwise operation: a new tensor.
    fn elementwise(&mut self, op: Operation, n_tokens: usize, n_cols: usize) -> Tensor {
        self.count(op, None, Work::default(), n_tokens * n_cols);
        self.tensor(n_tokens, n_cols)
    }
}

/// What products with activations of `format` are made with.
fn resource(format: ActFormat) -> Resource {
    match format {
        ActFormat::F32 => Resource::F32,
        ActFormat::Q8 => Resource::Int8,
        ActFormat::Bf16 => Resource::Bf16,
    }
}

/// Experts of `n` that `n_tokens` with `k` each need together, if all are as likely.
fn distinct(n: usize, k: usize, n_tokens: usize) -> f64 {
    let (n, k) = (n as f64, k as f64);
    n * (1.0 - (1.0 - k / n).powf(n_tokens as f64))
}

/// What a planner has to say where contents are asked for.
fn no_numbers() -> Error {
    Error::Invalid("an outline has no keys and values to save or load".into())
}

impl Backend for Planner {
    type Matrix = Matrix;
    type Vector = usize;
    type Tensor = Tensor;
    type Kv = Kv;
    type Conv = (usize, usize);

    fn matrix(&self, tensor: &FileTensor) -> Result<Matrix> {
        let (n_in, n_out) = (tensor.n_in(), tensor.n_out());
        let row_bytes = tensor.dtype.row_bytes(n_in).filter(|bytes| *bytes > 0);
        let row_bytes = row_bytes.ok_or_else(|| {
            Error::BadModel(format!(
                "tensor {}: expected rows of whole blocks, found {n_in} weights",
                tensor.name
            ))
        })?;
        Ok(Matrix {
            bytes: row_bytes * n_out,
            n_in,
            n_out,
            kernels: Kernels::new(tensor.dtype, n_in, n_out, &tensor.name)?,
        })
    }

    /// Zeros: the file may hold no weights.
    fn floats(&self, tensor: &FileTensor) -> Vec<f32> {
        vec![0.0; tensor.shape.iter().product()]
    }

    fn vector(&self, data: Vec<f32>) -> usize {
        data.len()
    }

    fn kv(&self, attention: &Attention, options: &KvOptions) -> Kv {
        Kv {
            shape: *attention,
            options: options.clone(),
            n_pages: 0,
        }
    }

    fn kv_reserve(&self, kv: &mut Kv, positions: Range<usize>) -> Result<()> {
        kv.n_pages = kv.n_pages.max(positions.end.div_ceil(KV_PAGE));
        Ok(())
    }

    fn kv_copy(&self, kv: &Kv) -> Result<Kv> {
        Ok(Kv {
            options: kv.options.clone(),
            ..*kv
        })
    }

    fn kv_save(&self, _: &Kv, _: usize, _: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        Err(no_numbers())
    }

    fn kv_load(
        &self,
        _: &mut Kv,
        _: usize,
        _: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        Err(no_numbers())
    }

    fn kv_spare_bytes(&self, bytes: usize) -> usize {
        spare_bytes(bytes)
    }

    fn kv_bytes(&self, kv: &Kv) -> usize {
        let sums = kv.options.select.as_ref().and_then(|select| {
            let chunking = select.chunking()?;
            let predictor = kv.options.predictor.as_deref();
            let n_positions = kv.n_pages * KV_PAGE;
            Some(chunking.bytes(&kv.shape, n_positions, select.pools(), predictor))
        });
        let sums = sums.unwrap_or(0);
        let select = kv.options.select.as_deref();
        let notes =
            NoteShape::all(select, &kv.shape).map(|shape| shape.bytes(kv.n_pages * KV_PAGE));
        let notes: usize = notes.into_iter().sum();
        kv.n_pages * attention::page_bytes(&kv.shape, kv.options.kinds) + sums + notes
    }

    fn conv_bytes(&self, (n_rows, n_channels): &(usize, usize)) -> usize {
        conv_floats(*n_rows, *n_channels) * size_of::<f32>()
    }

    fn conv(&self, n_rows: usize, n_channels: usize) -> (usize, usize) {
        (n_rows, n_channels)
    }

    fn conv_reset(&self, _: &mut (usize, usize)) {}

    /// A way back is replayed, however short.
    fn conv_rewind(&self, _: &mut (usize, usize), _: usize) -> bool {
        false
    }

    fn conv_rows(&self, (n_rows, n_channels): &(usize, usize), out: &mut Vec<f32>) {
        out.resize(out.len() + n_rows * n_channels, 0.0);
    }

    fn conv_set(&self, _: &mut (usize, usize), _: &[f32]) {}

    fn begin(&mut self, step: Step) {
        self.step = step;
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], _: f32) -> Tensor {
        self.elementwise(Operation::Embed, tokens.len(), table.n_in)
    }

    fn import(&mut self, rows: &[f32], n_cols: usize) -> Tensor {
        self.elementwise(Operation::Embed, rows.len() / n_cols, n_cols)
    }

    fn rms_norm(&mut self, x: &Tensor, _: &usize, _: f32) -> Tensor {
        self.elementwise(Operation::RmsNorm, x.n_tokens, x.n_cols)
    }

    fn linear<const N: usize>(&mut self, x: &Tensor, layers: [&Linear<Self>; N]) -> [Tensor; N] {
        let formats = layers.map(|l| l.weight.kernels.of(self.step).acts());
        let take = |format, floats: fn(usize, usize) -> usize| {
            let asked = formats.contains(&format);
            asked.then(|| self.scratch.take(floats(x.n_tokens, x.n_cols)))
        };
        let _q8 = take(ActFormat::Q8, q8_floats);
        let _bf16 = take(ActFormat::Bf16, bf16_floats);
        for (layer, format) in layers.iter().zip(formats) {
            self.count_product(&layer.weight, format, x.n_tokens);
        }
        layers.map(|l| self.tensor(x.n_tokens, l.weight.n_out))
    }

    fn gated_ffn(&mut self, x: &Tensor, ffn: &GatedFfn<Self>) -> Tensor {
        if gated(self.step, ffn.layers(), |matrix: &Matrix| &matrix.kernels).is_none() {
            let [gate, up] = self.linear(x, [&ffn.gate, &ffn.up]);
            let h = self.glu(gate, &up, ffn.activation);
            let [out] = self.linear(&h, [&ffn.down]);
            return out;
        }
        let (gate, up, down) = (&ffn.gate.weight, &ffn.up.weight, &ffn.down.weight);
        let _bf16 = self.scratch.take(bf16_floats(x.n_tokens, x.n_cols));
        let _h = self.scratch.take(bf16_floats(x.n_tokens, gate.n_out));
        for weight in [gate, up, down] {
            self.count_product(weight, ActFormat::Bf16, x.n_tokens);
        }
        self.tensor(x.n_tokens, down.n_out)
    }

    fn route(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        let n_tokens = x.n_tokens - from;
        let out = self.elementwise(Operation::Route, n_tokens, 2 * moe.routing.n_used);
        let rows = (from > 0).then(|| self.tensor(n_tokens, x.n_cols));
        let [_logits] = self.linear(rows.as_ref().unwrap_or(x), [&moe.router]);
        out
    }

    fn moe(&mut self, x: &Tensor, _: Tensor, moe: &Moe<Self>) -> Tensor {
        let out = self.tensor(x.n_tokens, x.n_cols);
        let (n_experts, k) = (moe.routing.n_experts, moe.routing.n_used);
        let (n_rows, n_ffn, n_threads) = (x.n_tokens * k, moe.n_ffn, self.n_threads);
        let weights = moe.layers().map(|layer| &layer.weight);
        let formats = weights.map(|weight| weight.kernels.of(self.step).acts());
        let joined = !moe.down_by_neuron
            && gated(self.step, moe.layers(), |matrix: &Matrix| &matrix.kernels).is_some();
        let read = match self.step {
            Step::Decode => n_rows as f64,
            Step::Prefill => distinct(n_experts, k, x.n_tokens),
        };
        for (weight, format) in weights.iter().zip(formats) {
            let work = Work {
                weight_bytes: (weight.bytes as f64 / n_experts as f64 * read) as u64,
                matmul_ops: (2 * weight.n_in * (weight.n_out / n_experts) * n_rows) as u64,
                ..Work::default()
            };
            let values = n_rows * (weight.n_out / n_experts);
            self.count(Operation::Moe, Some(resource(format)), work, values);
        }
        // What follows takes what the CPU takes, in its order.
        let scratch = &self.scratch;
        let (gate_up, down) = (&formats[..2], &formats[2..]);
        if self.step == Step::Decode {
            for _ in 0..x.n_tokens {
                let q8 = |formats: &[ActFormat], n: usize, n_in: usize| {
                    let asked = formats.contains(&ActFormat::Q8);
                    asked.then(|| scratch.take(q8_floats(n, n_in)))
                };
                let _row = q8(gate_up, 1, x.n_cols);
                let row_bytes = weights[..2].iter().map(|weight| weight.row_bytes()).max();
                let row_bytes = row_bytes.expect("two of them");
                let chunk = chunk_rows(n_ffn, row_bytes, n_chunks(k, n_threads));
                let _h = scratch.take(k * n_ffn.div_ceil(chunk) * 2 * chunk);
                let _rows = scratch.take(k * x.n_cols);
                if !moe.down_by_neuron {
                    let _q8 = q8(down, k, n_ffn);
                }
            }
            return out;
        }
        let sorted = |formats: &[ActFormat], n_in: usize, floats: bool| {
            let q8 = formats
                .contains(&ActFormat::Q8)
                .then(|| scratch.take(q8_floats(n_rows, n_in)));
            let f32 =
                (floats && formats.contains(&ActFormat::F32)).then(|| scratch.take(n_rows * n_in));
            let bf16 = formats.contains(&ActFormat::Bf16).then(|| {
                let groups = max_groups(n_rows, n_experts) * BF16_TOKENS;
                let tiles = scratch.take(bf16_floats(groups, n_in));
                let taken = (0..n_threads).map(|_| scratch.take(BF16_TOKENS * n_in));
                drop(taken.collect::<Vec<_>>());
                tiles
            });
            (q8, f32, bf16)
        };
        let _rows = scratch.take(n_rows * x.n_cols);
        let _inputs = sorted(gate_up, x.n_cols, true);
        if joined {
            let groups = max_groups(n_rows, n_experts) * BF16_TOKENS;
            let _h = scratch.take(bf16_floats(groups, n_ffn));
            return out;
        }
        let _gate = scratch.take(n_rows * n_ffn);
        drop(scratch.take(n_rows * n_ffn));
        if !moe.down_by_neuron {
            let _inputs = sorted(down, n_ffn, false);
        }
        out
    }

    fn rope_angles(&mut self, rope: &Rope, _: usize, n: usize) -> Tensor {
        self.elementwise(Operation::RopeAngles, n, 2 * rope.inv_freq.len())
    }

    fn rope(&mut self, x: &mut Tensor, _: usize, _: RopePairs, _: &Tensor) {
        self.count(
            Operation::Rope,
            None,
            Work::default(),
            x.n_tokens * x.n_cols,
        );
    }

    fn kv_write(&mut self, _: &mut Kv, k: &Tensor, v: &Tensor, _: usize) {
        let values = k.n_tokens * (k.n_cols + v.n_cols);
        self.count(Operation::KvWrite, None, Work::default(), values);
    }

    fn kv_note(&mut self, kv: &mut Kv, q: &Tensor, start: usize, shape: &Attention) -> bool {
        let positions = start..start + q.n_tokens;
        let Some(work) = attention_noted::work(shape, &kv.options, positions.clone()) else {
            return false;
        };
        self.count(Operation::Attention, Some(Resource::F32), work, 0);
        let runs = attention_noted::scratch(shape, &kv.options, positions, self.n_threads);
        runs.into_iter().for_each(|lens| self.scratch.reserve(lens));
        true
    }

    fn attention(&mut self, q: &Tensor, kv: &Kv, start: usize, shape: &Attention) -> Tensor {
        let out = self.tensor(q.n_tokens, q.n_cols);
        let positions = start..start + q.n_tokens;
        let (step, n_threads) = (self.step, self.n_threads);
        let work = attention::work_selected(shape, &kv.options, positions.clone());
        let values = q.n_tokens * q.n_cols;
        self.count(Operation::Attention, Some(Resource::F32), work, values);
        let (operations, options) = (&self.operations, &kv.options);
        let runs =
            attention_selected::scratch(operations, shape, options, step, positions, n_threads);
        runs.into_iter().for_each(|lens| self.scratch.reserve(lens));
        out
    }

    fn short_conv(&mut self, bcx: &Tensor, _: &usize, conv: &mut (usize, usize)) -> Tensor {
        self.elementwise(Operation::ShortConv, bcx.n_tokens, conv.1)
    }

    fn glu(&mut self, gate: Tensor, _: &Tensor, _: Activation) -> Tensor {
        self.count(
            Operation::Glu,
            None,
            Work::default(),
            gate.n_tokens * gate.n_cols,
        );
        gate
    }

    fn add(&mut self, x: &mut Tensor, _: &Tensor) {
        self.count(Operation::Add, None, Work::default(), x.n_tokens * x.n_cols);
    }

    fn rows_from(&mut self, x: Tensor, from: usize) -> Tensor {
        self.step = step_of_wanted(self.step, x.n_tokens - from);
        if from == 0 {
            return x;
        }
        self.elementwise(Operation::RowsFrom, x.n_tokens - from, x.n_cols)
    }

    /// As many zeros as there would be numbers.
    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.resize(x.n_tokens * x.n_cols, 0.0);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }

    fn work(&self) -> Work {
        let mut sum = Work::default();
        self.tallies.iter().for_each(|tally| sum += tally.work);
        sum
    }

    fn tallies(&self) -> Vec<Tally> {
        self.tallies.clone()
    }
}
