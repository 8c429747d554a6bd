//! The operations, each as the dispatches that it takes.

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;

use wgpu::BufferUsages;

use super::attention::{KvCache, MAX_HEAD};
use super::device::Span;
use super::host::is_of_experts;
use super::packed::Packed;
use super::pipeline::{Experts, Shader};
use super::products::Gemv;
use super::record::Bindings;
use super::times::Times;
use super::weights::{UNIT, Weights};
use super::{
    ConvState, Gpu, Heads, Input, Matrix, Norm, Product, REWIND, Rows, Sum, Tensor, Turn, Value,
    Vector,
};
use crate::backend::select::KvOptions;
use crate::backend::{
    Activation, Attention, Backend, GatedFfn, Linear, Lost, Moe, Rope, RopePairs, Runs, Step,
};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::profile::{PassKind, Trace, Work};
use crate::quant::Tensor as FileTensor;

/// Rows whose logits are wanted below which those of a prompt take the shaders of a token.
const FEW: usize = 4;

impl Gpu {
    /// An operation that cannot be done ends its pass.
    pub(super) fn done<T>(&self, result: Result<T>) -> T {
        result.unwrap_or_else(|error| resume_unwind(Box::new(Lost(error))))
    }

    /// The cancel flag, or a fault that somebody has noticed, ends a pass between operations.
    pub(super) fn check(&self) {
        self.done(self.cancel.check());
    }

    pub(super) fn dispatch(
        &self,
        shader: Shader,
        params: &[u32],
        buffers: &[Option<Span>],
        grid: [usize; 3],
    ) {
        self.dispatch_of(&[], shader, params, buffers, grid);
    }

    /// A dispatch that reads the matrices `names`.
    pub(super) fn dispatch_of(
        &self,
        names: &[&str],
        shader: Shader,
        params: &[u32],
        buffers: &[Option<Span>],
        grid: [usize; 3],
    ) {
        let of = (names, self.work.get());
        let mut recorder = self.recorder.borrow_mut();
        self.done(recorder.dispatch(of, shader, params, buffers, grid));
    }

    pub(super) fn take(&self, n: usize) -> Rows {
        let buffer = self.recorder.borrow_mut().take(n);
        Rows {
            buffer: self.done(buffer),
            at: 0,
            packed: None,
        }
    }

    /// Numbers of the host, for this pass.
    pub(super) fn upload(&self, data: &[u8]) -> Rows {
        let buffer = self.recorder.borrow_mut().take_for_upload(data.len() / 4);
        let buffer = self.done(buffer);
        self.device.queue.write_buffer(&buffer.raw, 0, data);
        Rows {
            buffer,
            at: 0,
            packed: None,
        }
    }

    /// The rows of a tensor, computed now if they have not been.
    pub(super) fn rows(&self, x: &Tensor) -> Rows {
        let value = x.value.borrow().clone();
        let rows = match value {
            Value::Rows(rows) => return rows,
            Value::Normed(norm) => self.norm(&norm, x.n_tokens, x.n_cols, None),
            Value::Heads(heads) => self.heads(&heads, x.n_tokens, x.n_cols),
            Value::Product(product) => self.product(&product, x.n_tokens, None),
            Value::Sum(sum) => self.product(&sum.product, x.n_tokens, Some(&sum.residual)),
        };
        *x.value.borrow_mut() = Value::Rows(rows.clone());
        rows
    }

    /// What a product reads: a norm that it can do itself, or rows.
    pub(super) fn input(&self, x: &Tensor) -> Input {
        if self.step == Step::Decode
            && let Value::Normed(norm) = &*x.value.borrow()
        {
            return Input::Normed(norm.clone());
        }
        Input::Rows(self.rows(x))
    }

    /// The norm of rows of `n_cols`, plus a residual.
    pub(super) fn norm(
        &self,
        norm: &Norm,
        n_tokens: usize,
        n_cols: usize,
        residual: Option<&Rows>,
    ) -> Rows {
        let out = self.take(n_tokens * n_cols);
        let n = norm.gain.n;
        let params = [
            n as u32,
            norm.x.at as u32,
            residual.map_or(0, |r| r.at as u32),
            norm.eps.to_bits(),
        ];
        let residual = residual.map(Rows::span);
        let shader = Shader::RmsNorm {
            residual: residual.is_some(),
        };
        let buffers = [
            Some(norm.x.span()),
            Some(norm.gain.span()),
            residual,
            Some(out.span()),
        ];
        let runs = n_tokens * n_cols / n;
        let most = self.device.limits.max_compute_workgroups_per_dimension as usize;
        assert!(runs <= most, "runs of a norm");
        self.dispatch(shader, &params, &buffers, [runs, 1, 1]);
        out
    }

    /// Heads that no cache waits for.
    pub(super) fn heads(&self, heads: &Heads, n_tokens: usize, n_cols: usize) -> Rows {
        let out = self.take(n_tokens * n_cols);
        self.turn(Some((heads, n_cols / heads.n, &out)), None, n_tokens);
        out
    }

    /// A dispatch some of whose writable bindings may be unused: they get a buffer each, which is thrown away.
    pub(super) fn dispatch_written(
        &self,
        shader: Shader,
        params: &[u32],
        buffers: &[Option<Span>],
        writable: &[usize],
        grid: [usize; 3],
    ) {
        let spare = [(); 3].map(|()| self.take(1));
        let mut spare = spare.iter();
        let mut filled = Bindings::new();
        for (i, buffer) in buffers.iter().enumerate() {
            match buffer {
                None if writable.contains(&i) => filled.push(spare.next().map(Rows::span)),
                buffer => filled.push(*buffer),
            }
        }
        self.dispatch(shader, params, &filled, grid);
    }

    /// `activation(gate) * up`, of `n` each.
    pub(super) fn unit(&self, gate: &Rows, up: &Rows, n: usize, activation: Activation) -> Rows {
        let out = self.take(n);
        let params = [n as u32, gate.at as u32, up.at as u32];
        let buffers = [Some(gate.span()), Some(up.span()), Some(out.span())];
        self.dispatch(Shader::Glu(activation), &params, &buffers, flat(n));
        out
    }

    /// Tells the work of a pass ahead from that of the sequence.
    pub(super) fn count_ahead(&mut self) {
        if let Some(before) = self.ahead.take() {
            self.done_ahead = self.work.replace(before).since(&before);
        }
    }

    /// A convolution has written `n_tokens` rows.
    fn wrote(&self, conv: &mut ConvState, n_tokens: usize) {
        match self.ahead {
            None => conv.take(n_tokens),
            // In the place of the oldest.
            Some(_) => conv.held = conv.held.min(conv.ring - n_tokens),
        }
    }

    pub(super) fn unsupported(&self, what: &'static str, found: String, supported: &str) -> ! {
        resume_unwind(Box::new(Lost(Error::Unsupported {
            kind: what,
            found,
            supported: supported.to_owned(),
        })))
    }
}

impl Rows {
    /// Those from another on.
    pub(super) fn from(self, at: usize) -> Self {
        Self {
            at,
            packed: self.packed.filter(|_| at == self.at),
            ..self
        }
    }

    pub(super) fn span(&self) -> Span<'_> {
        self.buffer.all()
    }
}

impl ConvState {
    /// So many rows have come.
    fn take(&mut self, n_tokens: usize) {
        self.count += n_tokens;
        self.held = (self.held + n_tokens).min(self.ring);
    }
}

impl Vector {
    pub(super) fn span(&self) -> Span<'_> {
        self.buffer.all()
    }
}

/// The offset of a row in vectors of four.
pub(super) fn vec4(at: usize) -> u32 {
    assert!(at.is_multiple_of(4), "rows of whole vectors");
    (at / 4) as u32
}

impl Backend for Gpu {
    type Matrix = Matrix;
    type Vector = Vector;
    type Tensor = Tensor;
    type Kv = KvCache;
    type Conv = ConvState;

    fn matrix(&self, tensor: &FileTensor) -> Result<Matrix> {
        let on_host = self.host.is_some() && is_of_experts(&tensor.name);
        Ok(Matrix(match on_host {
            true => Weights::on_host(tensor),
            false => Weights::upload(&self.device, tensor)?,
        }))
    }

    fn vector(&self, data: Vec<f32>) -> Vector {
        let bytes = bytemuck::cast_slice(&data);
        let buffer = self.device.buffer_of(bytes, "a vector of the model");
        Vector {
            buffer: Arc::new(self.done(buffer)),
            n: data.len(),
        }
    }

    /// Sessions see to it that policies have a rule.
    fn kv(&self, attention: &Attention, options: &KvOptions) -> KvCache {
        self.done(KvCache::new(attention, options))
    }

    fn kv_reserve(&self, kv: &mut KvCache, positions: Range<usize>) -> Result<()> {
        self.cache_reserve(kv, positions.end)
    }

    fn kv_copy(&self, kv: &KvCache) -> Result<KvCache> {
        self.cache_copy(kv)
    }

    fn kv_save(
        &self,
        kv: &KvCache,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.cache_save(kv, n, sink)
    }

    fn kv_load(
        &self,
        kv: &mut KvCache,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.cache_load(kv, n, source)
    }

    fn kv_bytes(&self, kv: &KvCache) -> usize {
        kv.bytes()
    }

    fn conv_bytes(&self, conv: &ConvState) -> usize {
        conv.memory.bytes as usize
    }

    fn conv(&self, n_rows: usize, n_channels: usize) -> ConvState {
        let ring = n_rows + REWIND;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let bytes = (ring * n_channels * size_of::<f32>()) as u64;
        let memory = self.device.buffer(bytes, usage, "convolutions");
        let mut conv = ConvState {
            memory: Arc::new(self.done(memory)),
            n_rows,
            n_channels,
            ring,
            count: 0,
            held: 0,
        };
        self.conv_reset(&mut conv);
        conv
    }

    fn conv_reset(&self, conv: &mut ConvState) {
        let rows = vec![0.0; conv.n_rows * conv.n_channels];
        self.conv_set(conv, &rows);
    }

    fn conv_rewind(&self, conv: &mut ConvState, n: usize) -> bool {
        let reaches = conv.held >= n + conv.n_rows;
        if reaches {
            conv.count -= n;
            conv.held -= n;
        }
        reaches
    }

    fn conv_rows(&self, conv: &ConvState, out: &mut Vec<f32>) {
        let n = conv.n_channels;
        let start = out.len();
        out.resize(start + conv.n_rows * n, 0.0);
        let held = self.device.download(&conv.memory, 0, conv.memory.bytes);
        let held = self.done(held);
        let held: &[f32] = bytemuck::cast_slice(&held);
        let first = conv.count - conv.n_rows;
        for (i, row) in out[start..].chunks_exact_mut(n).enumerate() {
            row.copy_from_slice(&held[(first + i) % conv.ring * n..][..n]);
        }
    }

    fn conv_set(&self, conv: &mut ConvState, rows: &[f32]) {
        assert_eq!(
            rows.len(),
            conv.n_rows * conv.n_channels,
            "rows of a convolution"
        );
        (conv.count, conv.held) = (conv.n_rows, conv.n_rows);
        let bytes = bytemuck::cast_slice(rows);
        self.device.queue.write_buffer(&conv.memory.raw, 0, bytes);
    }

    fn begin(&mut self, step: Step) {
        self.step = step;
        self.waiting = None;
        self.count_ahead();
        if let Some(host) = &mut self.host {
            host.begin(step);
        }
        let recorder = self.recorder.get_mut();
        recorder.begin();
        if let Some(times) = recorder.times() {
            times.begin(match step {
                Step::Prefill => PassKind::Prefill,
                Step::Decode => PassKind::Decode,
            });
        }
    }

    fn begin_ahead(&mut self) -> bool {
        self.count_ahead();
        let may = self.host.is_none() && self.largest.is_some();
        let begun = may && self.recorder.get_mut().begin_ahead();
        if begun {
            self.step = Step::Decode;
            self.waiting = None;
            self.ahead = Some(self.work.get());
        }
        begun
    }

    fn adopt<'a>(&mut self, convs: impl Iterator<Item = &'a mut ConvState>) {
        self.count_ahead();
        let mut work = self.work.get();
        work += std::mem::take(&mut self.done_ahead);
        self.work.set(work);
        convs.for_each(|conv| conv.take(1));
    }

    fn set_cancel(&mut self, cancel: &Cancel) {
        self.cancel = cancel.clone();
        if let Some(host) = &mut self.host {
            host.set_cancel(cancel);
        }
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32) -> Tensor {
        let weights = &*table.0;
        assert!(
            tokens.iter().all(|token| (*token as usize) < weights.n_out),
            "a token beyond the table"
        );
        if let Some(times) = self.recorder.get_mut().times() {
            times.tokens(tokens.len());
        }
        let ids = match self.largest.as_ref().filter(|_| self.ahead.is_some()) {
            Some(pair) => pair.clone().from(pair.at + 1),
            None => self.upload(bytemuck::cast_slice(tokens)),
        };
        let out = self.take(tokens.len() * weights.n_in);
        let n_units = weights.n_in.div_ceil(UNIT);
        for part in &weights.parts {
            let params = [
                n_units as u32,
                part.first as u32,
                part.n_rows as u32,
                scale.to_bits(),
                vec4(weights.n_in),
                ids.at as u32,
            ];
            let buffers = [
                Some(ids.span()),
                Some(part.main()),
                Some(part.aux()),
                Some(out.span()),
            ];
            let grid = [n_units.div_ceil(64), tokens.len(), 1];
            self.dispatch(Shader::Embed(weights.dtype), &params, &buffers, grid);
        }
        Tensor::new(tokens.len(), weights.n_in, Value::Rows(out))
    }

    fn import(&mut self, rows: &[f32], n_cols: usize) -> Tensor {
        let n = rows.len() / n_cols;
        if let Some(times) = self.recorder.get_mut().times() {
            times.tokens(n);
        }
        let rows = self.upload(bytemuck::cast_slice(rows));
        Tensor::new(n, n_cols, Value::Rows(rows))
    }

    fn rms_norm(&mut self, x: &Tensor, gain: &Vector, eps: f32) -> Tensor {
        self.check();
        assert!(x.n_cols.is_multiple_of(gain.n), "rows of whole groups");
        let sum = match &*x.value.borrow() {
            Value::Sum(sum) if gain.n == x.n_cols => Some(sum.clone()),
            _ => None,
        };
        if let Some(norm) = sum.and_then(|sum| self.sum_for_norm(&sum, x.n_tokens, gain, eps)) {
            *x.value.borrow_mut() = Value::Rows(norm.x.clone());
            return Tensor::new(x.n_tokens, x.n_cols, Value::Normed(norm));
        }
        let rows = self.rows(x);
        let gain = gain.clone();
        let value = match gain.n == x.n_cols {
            true => Value::Normed(Norm {
                x: rows,
                gain,
                eps,
                packed: None,
            }),
            false if gain.n <= MAX_HEAD => Value::Heads(Heads {
                x: rows,
                n: gain.n,
                norm: Some((gain, eps)),
                rope: None,
            }),
            false => {
                let norm = Norm {
                    x: rows,
                    gain,
                    eps,
                    packed: None,
                };
                Value::Rows(self.norm(&norm, x.n_tokens, x.n_cols, None))
            }
        };
        Tensor::new(x.n_tokens, x.n_cols, value)
    }

    fn linear<const N: usize>(&mut self, x: &Tensor, layers: [&Linear<Self>; N]) -> [Tensor; N] {
        self.check();
        for layer in layers {
            assert_eq!(x.n_cols, layer.weight.0.n_in, "inputs of {}", layer.name);
        }
        let input = self.input(x);
        let tensor = |i: usize, value| Tensor::new(x.n_tokens, layers[i].weight.0.n_out, value);
        if N > 1 && self.step == Step::Decode {
            let of = layers.map(|layer| (&*layer.weight.0, layer.bias.as_ref()));
            let outs = self.gemv(&input, of, x.n_tokens, None);
            let mut outs = outs.into_iter();
            return std::array::from_fn(|i| {
                tensor(i, Value::Rows(outs.next().expect("as many as layers")))
            });
        }
        std::array::from_fn(|i| {
            let product = Product {
                x: input.clone(),
                weights: Arc::clone(&layers[i].weight.0),
                bias: layers[i].bias.clone(),
                routes: None,
            };
            tensor(i, Value::Product(product))
        })
    }

    fn rope_angles(&mut self, rope: &Rope, start: usize, n: usize) -> Tensor {
        let half = rope.inv_freq.len();
        let mut angles = std::mem::take(&mut self.angles);
        angles.clear();
        angles.resize(n * 2 * half, 0.0f32);
        for (i, row) in angles.chunks_exact_mut(2 * half).enumerate() {
            let (cos, sin) = row.split_at_mut(half);
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
                // As on the CPU: the product in f32, its sine in f64.
                let angle = f64::from((start + i) as f32 * freq);
                *cos = angle.cos() as f32;
                *sin = angle.sin() as f32;
            }
        }
        let rows = self.upload(bytemuck::cast_slice(&angles));
        self.angles = angles;
        Tensor::new(n, 2 * half, Value::Rows(rows))
    }

    fn rope(&mut self, x: &mut Tensor, head_dim: usize, pairs: RopePairs, angles: &Tensor) {
        let fits = x.n_cols.is_multiple_of(head_dim) && angles.n_cols <= head_dim;
        assert!(fits && x.n_tokens == angles.n_tokens, "heads and positions");
        let turn = Turn {
            pairs,
            angles: self.rows(angles),
            half: angles.n_cols / 2,
        };
        let waits = match &*x.value.borrow() {
            Value::Heads(heads) if heads.rope.is_none() && heads.n == head_dim => {
                Some(heads.clone())
            }
            _ => None,
        };
        let heads = waits.unwrap_or_else(|| Heads {
            x: self.rows(x),
            n: head_dim,
            norm: None,
            rope: None,
        });
        *x.value.get_mut() = Value::Heads(Heads {
            rope: Some(turn),
            ..heads
        });
    }

    fn kv_write(&mut self, kv: &mut KvCache, k: &Tensor, v: &Tensor, start: usize) {
        self.cache_write(kv, k, v, start);
    }

    fn attention(
        &mut self,
        q: &Tensor,
        kv: &KvCache,
        start: usize,
        attention: &Attention,
    ) -> Tensor {
        self.check();
        self.attend(q, kv, start, attention)
    }

    fn short_conv(&mut self, bcx: &Tensor, taps: &Vector, conv: &mut ConvState) -> Tensor {
        self.check();
        let (n, n_tokens) = (conv.n_channels, bcx.n_tokens);
        assert_eq!(bcx.n_cols, 3 * n, "gates and inputs of a convolution");
        assert_eq!(taps.n, (conv.n_rows + 1) * n, "taps of a convolution");
        let product = match &*bcx.value.borrow() {
            Value::Product(product) if n_tokens == 1 => Some(product.clone()),
            _ => None,
        };
        if let Some(out) = product.and_then(|product| self.conv_packed(&product, taps, conv)) {
            self.wrote(conv, 1);
            return Tensor::new(1, n, Value::Rows(out));
        }
        let x = self.rows(bcx);
        let mut out = self.take(n_tokens * n);
        out.packed = self.packs(n).then(|| self.take_packed(n_tokens, n));
        let run = |first: usize, n_run: usize, store: bool, push: bool| {
            let params = [
                n as u32,
                (conv.n_rows + 1) as u32,
                n_tokens as u32,
                conv.ring as u32,
                (conv.count % conv.ring) as u32,
                x.at as u32,
                first as u32,
            ];
            let packed = out.packed.as_ref().filter(|_| !push);
            let buffers = [
                Some(x.span()),
                Some(taps.span()),
                Some(conv.memory.all()),
                Some(out.span()),
                packed.map(Packed::span),
            ];
            let pack = packed.is_some();
            let buffers = &buffers[..4 + usize::from(pack)];
            let grid = [n.div_ceil(64), n_run, 1];
            let shader = Shader::ShortConv { store, push, pack };
            self.dispatch(shader, &params, buffers, grid);
        };
        let one = n_tokens == 1;
        run(0, n_tokens, one, false);
        if !one {
            let kept = n_tokens.min(conv.ring);
            run(n_tokens - kept, kept, false, true);
        }
        self.wrote(conv, n_tokens);
        Tensor::new(n_tokens, n, Value::Rows(out))
    }

    fn glu(&mut self, gate: Tensor, up: &Tensor, activation: Activation) -> Tensor {
        let (g, u) = (self.rows(&gate), self.rows(up));
        let out = self.unit(&g, &u, gate.n_tokens * gate.n_cols, activation);
        Tensor::new(gate.n_tokens, gate.n_cols, Value::Rows(out))
    }

    fn gated_ffn(&mut self, x: &Tensor, ffn: &GatedFfn<Self>) -> Tensor {
        self.check();
        let [gate, up] = [&ffn.gate, &ffn.up].map(|layer| &*layer.weight.0);
        let joins = self.step == Step::Decode
            && self.most_matrices() >= 2
            && gate.dtype == up.dtype
            && gate.splits_as(up)
            && ffn.gate.bias.is_none()
            && ffn.up.bias.is_none();
        let h = if joins {
            let input = self.input(x);
            let down = &ffn.down.weight.0;
            let (n_tokens, activation) = (x.n_tokens, ffn.activation);
            let layers = [gate, up, down];
            if let Some(h) = self.glu_packed(&input, layers, activation, n_tokens, None) {
                let product = Product {
                    x: Input::Packed(h),
                    weights: Arc::clone(down),
                    bias: ffn.down.bias.clone(),
                    routes: None,
                };
                return Tensor::new(n_tokens, down.n_out, Value::Product(product));
            }
            let out = self.take(x.n_tokens * gate.n_out);
            let call = Gemv {
                x: &input,
                layers: &[(gate, None), (up, None)],
                outs: std::slice::from_ref(&out),
                residual: None,
                glu: Some(ffn.activation),
                experts: Experts::None,
                routes: None,
            };
            self.run_gemv(&call, [x.n_tokens, 1]);
            Tensor::new(x.n_tokens, gate.n_out, Value::Rows(out))
        } else {
            let [gate, up] = self.linear(x, [&ffn.gate, &ffn.up]);
            self.glu(gate, &up, ffn.activation)
        };
        let [out] = self.linear(&h, [&ffn.down]);
        out
    }

    fn route(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        self.check();
        if moe.router.weight.0.host().is_some() {
            return self.route_on_host(x, from, moe);
        }
        self.choose(x, from, moe)
    }

    fn moe(&mut self, x: &Tensor, routes: Tensor, moe: &Moe<Self>) -> Tensor {
        self.check();
        if moe.router.weight.0.host().is_some() {
            return self.moe_on_host(x, moe);
        }
        self.mixture(x, &routes, moe)
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) {
        assert_eq!(
            (x.n_tokens, x.n_cols),
            (y.n_tokens, y.n_cols),
            "rows of a sum"
        );
        let residual = self.rows(x);
        let value = y.value.borrow().clone();
        let sum = match value {
            // A norm of the sum may follow, which wants more than the sum.
            Value::Product(product) if self.packs(x.n_cols) => {
                *x.value.get_mut() = Value::Sum(Sum { residual, product });
                return;
            }
            Value::Product(product) => self.product(&product, x.n_tokens, Some(&residual)),
            Value::Normed(norm) => self.norm(&norm, x.n_tokens, x.n_cols, Some(&residual)),
            _ => {
                let y = self.rows(y);
                let n = x.n_tokens * x.n_cols;
                let out = self.take(n);
                let params = [n as u32, residual.at as u32, y.at as u32];
                let buffers = [Some(residual.span()), Some(y.span()), Some(out.span())];
                self.dispatch(Shader::Add, &params, &buffers, flat(n));
                out
            }
        };
        *x.value.get_mut() = Value::Rows(sum);
    }

    fn rows_from(&mut self, x: Tensor, from: usize) -> Tensor {
        if from == 0 && self.step == Step::Decode {
            return x;
        }
        let n_tokens = x.n_tokens - from;
        let rows = self.rows(&x);
        // What follows leaves no trace in the caches.
        if n_tokens < FEW {
            self.step = Step::Decode;
        }
        let at = rows.at + from * x.n_cols;
        Tensor::new(n_tokens, x.n_cols, Value::Rows(rows.from(at)))
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        self.settle();
        let rows = self.rows(x);
        let n = x.n_tokens * x.n_cols;
        out.clear();
        out.try_reserve_exact(n).map_err(|_| Error::OutOfMemory {
            what: "logits".into(),
            bytes: n * size_of::<f32>(),
        })?;
        let take = |bytes: &[u8]| out.extend_from_slice(bytemuck::cast_slice(bytes));
        self.recorder
            .get_mut()
            .read(Some((&rows.buffer, rows.at, n)), take)
    }

    fn read_top(&mut self, x: &Tensor, k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool> {
        self.top(x, k, out)
    }

    fn ask_largest(&mut self, x: &Tensor) -> Result<bool> {
        self.ask(x)
    }

    fn answer(&mut self) -> Result<(u32, f32)> {
        self.answered()
    }

    fn flush(&mut self) -> Result<()> {
        self.settle();
        let recorder = self.recorder.get_mut();
        recorder.finish()?;
        if let Some(times) = recorder.times() {
            times.end();
        }
        Ok(())
    }

    fn scratch_bytes(&self) -> usize {
        let host = self.host.as_ref().map_or(0, |host| host.scratch_bytes());
        self.recorder.borrow().bytes() + host
    }

    fn work(&self) -> Work {
        let mut work = self.work.get();
        if let Some(host) = &self.host {
            work += host.work();
        }
        work
    }

    fn take_trace(&mut self) -> Option<Trace> {
        self.recorder.get_mut().times().map(Times::take)
    }

    fn kernel(&self, of: Runs<Self>) -> &'static str {
        match of {
            Runs::GatedFfn(_) => "gpu",
            _ => "",
        }
    }
}

/// Workgroups of 256 for `n` elements, in rows of 65535.
fn flat(n: usize) -> [usize; 3] {
    let groups = n.div_ceil(256);
    [groups.min(65_535), groups.div_ceil(65_535), 1]
}
