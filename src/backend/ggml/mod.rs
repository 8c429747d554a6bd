//! The reference backend: ggml's own kernels behind our operations, so that whole models, every weight format and
//! speed can be compared side by side. The cargo feature `ggml` builds it.
//!
//! Operations are recorded and run as one graph when a result is read. Weights are read where they lie in the file, or,
//! as llama.cpp has it, copied into the layouts that ggml likes best on this CPU.

mod graph;
mod memory;
mod sys;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use self::graph::{CacheView, Graph, Node};
use self::memory::{Memory, Repacked};
use super::select::KvOptions;
use super::{
    Activation, Attention, Backend, Gating, KV_PAGE, KvType, Linear, Moe, Rope, RopePairs, Step,
};
use crate::error::{Error, Result};
use crate::quant::{Bytes, DType, Tensor as FileTensor};

/// Positions by which a cache grows.
const KV_STEP: usize = 256;

/// The half float for "this key is not seen".
const HIDDEN: u16 = half::f16::NEG_INFINITY.to_bits();

/// ggml on some threads.
pub struct Ggml {
    graph: Graph,
    /// Caches and memories belong to the backend that made them: only its graph touches them.
    owner: Arc<()>,
    repacks: bool,
    /// Masks that this pass has made already.
    masks: Vec<(Mask, Node)>,
}

/// Weights that lie in the mapped file.
pub struct Matrix {
    data: Bytes,
    dtype: DType,
    n_in: usize,
    n_out: usize,
    /// The copy for linear layers, made when the first of them wants it.
    repacked: OnceLock<Option<Repacked>>,
}

/// Floats of a model.
pub struct Vector {
    data: Arc<[f32]>,
    /// The taps of a convolution, those of a channel together.
    by_channel: OnceLock<Arc<[f32]>>,
}

/// Activations to be, `(n_tokens, n_cols)`; or the angles of a rotary embedding; or the choice of a router.
pub struct Tensor {
    node: Node,
    n_tokens: usize,
    n_cols: usize,
    /// What positions are divided by, where `node` is positions; the weights of experts, where it is experts.
    factors: Option<Node>,
}

/// Keys and values, `(n_positions, n_kv_heads, head_dim)` each.
pub struct KvCache {
    owner: Arc<()>,
    memory: Option<[Arc<Memory>; 2]>,
    n_positions: usize,
    /// Of keys, and of values.
    kinds: [KvType; 2],
    n_kv_heads: usize,
    head_dim: usize,
}

/// What a short convolution remembers: `(n_channels, n_rows)`, oldest first.
pub struct ConvState {
    owner: Arc<()>,
    memory: Option<Arc<Memory>>,
    n_rows: usize,
    n_channels: usize,
}

/// Which keys each query of a pass sees.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mask {
    start: usize,
    n_tokens: usize,
    window: Option<usize>,
}

/// The instruction sets that ggml was built for.
pub fn features() -> Vec<&'static str> {
    graph::features()
}

impl Ggml {
    /// ggml on `n_threads`.
    ///
    /// # Errors
    /// If these are more threads than ggml has room for.
    pub fn new(n_threads: usize) -> Result<Self> {
        Self::with(n_threads, false)
    }

    /// The same with a copy of the matrices of linear layers in ggml's own layouts.
    ///
    /// # Errors
    /// As [`Ggml::new`].
    pub fn repacking(n_threads: usize) -> Result<Self> {
        Self::with(n_threads, true)
    }

    fn with(n_threads: usize, repacks: bool) -> Result<Self> {
        Ok(Self {
            graph: Graph::new(n_threads, repacks)?,
            owner: Arc::new(()),
            repacks,
            masks: Vec::new(),
        })
    }

    fn check(&self, owner: &Arc<()>) {
        assert!(
            Arc::ptr_eq(owner, &self.owner),
            "a cache or memory of another backend"
        );
    }

    /// A matrix as it lies in the file.
    fn matrix_node(&mut self, matrix: &Matrix) -> Node {
        self.graph
            .matrix(matrix.dtype as u32, matrix.size(), &matrix.data)
    }

    /// A matrix that activations are multiplied by.
    fn factor_node(&mut self, matrix: &Matrix) -> Node {
        if self.repacks {
            let repack = || match Repacked::new(matrix.dtype as u32, matrix.size(), &matrix.data) {
                Ok(repacked) => repacked,
                Err(error) => {
                    self.graph.fail(error);
                    None
                }
            };
            if let Some(repacked) = matrix.repacked.get_or_init(repack) {
                return self
                    .graph
                    .repacked(matrix.dtype as u32, matrix.size(), repacked);
            }
        }
        self.matrix_node(matrix)
    }

    fn run(&mut self, wanted: Option<Node>, out: &mut Vec<f32>) -> Result<()> {
        self.masks.clear();
        self.graph.run(wanted, out)
    }

    /// `(n_keys, n_tokens)`, keys from the first that any query sees.
    fn mask(&mut self, mask: Mask) -> Node {
        if let Some((_, node)) = self.masks.iter().find(|(made, _)| *made == mask) {
            return *node;
        }
        let keys = mask.keys();
        let n_keys = keys.len();
        let mut data = vec![HIDDEN; n_keys * mask.n_tokens].into_boxed_slice();
        for (t, row) in data.chunks_exact_mut(n_keys).enumerate() {
            let position = mask.start + t;
            let first = mask.first_key(position);
            row[first - keys.start..position + 1 - keys.start].fill(0);
        }
        let node = self.graph.halves([n_keys, mask.n_tokens], data);
        self.masks.push((mask, node));
        node
    }
}

impl Matrix {
    fn size(&self) -> [usize; 2] {
        [self.n_in, self.n_out]
    }
}

impl Mask {
    fn first_key(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// All keys that some query sees.
    fn keys(&self) -> Range<usize> {
        self.first_key(self.start)..self.start + self.n_tokens
    }
}

impl Tensor {
    fn rows(node: Node, n_tokens: usize, n_cols: usize) -> Self {
        Self {
            node,
            n_tokens,
            n_cols,
            factors: None,
        }
    }
}

impl KvCache {
    /// `n` positions from `start` of the keys (0) or the values (1): `(head_dim, n_positions, n_kv_heads)`.
    fn view(&self, which: usize, start: usize, n: usize) -> CacheView<'_> {
        let row = self.n_kv_heads * self.head_dim;
        CacheView {
            memory: &self.memory()[which],
            kind: self.kinds[which],
            size: [self.head_dim, n, self.n_kv_heads],
            strides: [row, self.head_dim],
            offset: start * row,
        }
    }

    fn memory(&self) -> &[Arc<Memory>; 2] {
        self.memory.as_ref().expect("room was made before")
    }

    /// What [`Backend::kv_save`] tells of the first `n` positions: for each head in each page its memory, the bytes of a
    /// row there, and where the rows lie.
    fn spans(
        &self,
        n: usize,
    ) -> impl Iterator<Item = (&Memory, usize, impl ExactSizeIterator<Item = usize>)> {
        let pages = (0..n).step_by(KV_PAGE);
        pages.flat_map(move |first| {
            let heads = move |which: usize| (0..self.n_kv_heads).map(move |head| (which, head));
            (0..2).flat_map(heads).map(move |(which, head)| {
                let bytes = self.kinds[which].row_bytes(self.head_dim);
                let positions = first..n.min(first + KV_PAGE);
                let row = move |p: usize| (p * self.n_kv_heads + head) * bytes;
                (&*self.memory()[which], bytes, positions.map(row))
            })
        })
    }
}

impl ConvState {
    /// Each element of `rows`, `(n_rows, n_channels)`, with its place.
    fn elements<'a>(
        &'a self,
        rows: &'a mut [f32],
    ) -> impl Iterator<Item = (&'a Memory, &'a mut f32, usize)> {
        let (n_rows, n) = (self.n_rows, self.n_channels);
        self.memory
            .iter()
            .zip(std::iter::once(rows))
            .flat_map(move |(memory, rows)| {
                let place = move |i: usize| (i % n * n_rows + i / n) * size_of::<f32>();
                rows.iter_mut()
                    .enumerate()
                    .map(move |(i, x)| (&**memory, x, place(i)))
            })
    }

    fn view<'a>(&self, memory: &'a Arc<Memory>) -> CacheView<'a> {
        CacheView {
            memory,
            kind: KvType::F32,
            size: [self.n_rows, self.n_channels, 1],
            strides: [self.n_rows, 0],
            offset: 0,
        }
    }
}

impl Backend for Ggml {
    type Matrix = Matrix;
    type Vector = Vector;
    type Tensor = Tensor;
    type Kv = KvCache;
    type Conv = ConvState;

    fn matrix(&self, tensor: &FileTensor) -> Result<Matrix> {
        let (dtype, n_in, n_out) = (tensor.dtype, tensor.n_in(), tensor.n_out());
        let bytes = dtype
            .row_bytes(n_in)
            .and_then(|bytes| bytes.checked_mul(n_out));
        if bytes.is_none_or(|bytes| bytes == 0 || bytes != tensor.data.len()) {
            return Err(Error::BadModel(format!(
                "tensor {}: expected {n_out} rows of {n_in} weights, found {} bytes",
                tensor.name,
                tensor.data.len()
            )));
        }
        Ok(Matrix {
            data: tensor.data.clone(),
            dtype,
            n_in,
            n_out,
            repacked: OnceLock::new(),
        })
    }

    fn vector(&self, data: Vec<f32>) -> Vector {
        Vector {
            data: data.into(),
            by_channel: OnceLock::new(),
        }
    }

    /// Sessions see to it that nothing here selects keys.
    fn kv(&self, attention: &Attention, options: &KvOptions) -> KvCache {
        let kinds = options.kinds;
        KvCache {
            owner: Arc::clone(&self.owner),
            memory: None,
            n_positions: 0,
            kinds: [kinds.keys, kinds.values],
            n_kv_heads: attention.n_kv_heads,
            head_dim: attention.head_dim,
        }
    }

    fn kv_reserve(&self, kv: &mut KvCache, positions: Range<usize>) -> Result<()> {
        self.check(&kv.owner);
        let n = positions.end;
        assert!(self.graph.is_empty(), "a cache grows between passes");
        if n <= kv.n_positions {
            return Ok(());
        }
        let n = n.max(2 * kv.n_positions).next_multiple_of(KV_STEP);
        let grown = |kind: KvType, old: Option<&Arc<Memory>>| {
            let bytes = kind.row_bytes(n * kv.n_kv_heads * kv.head_dim);
            let mut memory = Memory::zeroed(bytes, "keys and values")?;
            if let Some(old) = old {
                memory.copy_from(old);
            }
            Ok(Arc::new(memory))
        };
        let old = |which: usize| kv.memory.as_ref().map(|memory| &memory[which]);
        kv.memory = Some([grown(kv.kinds[0], old(0))?, grown(kv.kinds[1], old(1))?]);
        kv.n_positions = n;
        Ok(())
    }

    fn kv_copy(&self, kv: &KvCache) -> Result<KvCache> {
        let copy = |memory: &Arc<Memory>| {
            let mut copy = Memory::zeroed(memory.bytes(), "keys and values")?;
            copy.copy_from(memory);
            Ok(Arc::new(copy))
        };
        let memory = match &kv.memory {
            Some([k, v]) => Some([copy(k)?, copy(v)?]),
            None => None,
        };
        Ok(KvCache {
            owner: Arc::clone(&self.owner),
            memory,
            ..*kv
        })
    }

    fn kv_save(
        &self,
        kv: &KvCache,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut span = Vec::new();
        for (memory, row_bytes, rows) in kv.spans(n) {
            span.resize(rows.len() * row_bytes, 0);
            for (row, at) in span.chunks_exact_mut(row_bytes).zip(rows) {
                memory.read(at, row);
            }
            sink(&span)?;
        }
        Ok(())
    }

    fn kv_load(
        &self,
        kv: &mut KvCache,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.check(&kv.owner);
        let mut span = Vec::new();
        for (memory, row_bytes, rows) in kv.spans(n) {
            span.resize(rows.len() * row_bytes, 0);
            source(&mut span)?;
            for (row, at) in span.chunks_exact(row_bytes).zip(rows) {
                memory.write(at, row);
            }
        }
        Ok(())
    }

    fn kv_bytes(&self, kv: &KvCache) -> usize {
        let memory = kv.memory.iter().flatten();
        memory.map(|memory| memory.bytes()).sum()
    }

    fn conv_bytes(&self, conv: &ConvState) -> usize {
        conv.memory.as_ref().map_or(0, |memory| memory.bytes())
    }

    fn conv(&self, n_rows: usize, n_channels: usize) -> ConvState {
        let bytes = n_rows * n_channels * size_of::<f32>();
        let memory = || Memory::zeroed(bytes, "convolutions").expect("a few rows of floats");
        ConvState {
            owner: Arc::clone(&self.owner),
            memory: (bytes > 0).then(|| Arc::new(memory())),
            n_rows,
            n_channels,
        }
    }

    fn conv_reset(&self, conv: &mut ConvState) {
        self.check(&conv.owner);
        conv.memory.iter().for_each(|memory| memory.clear());
    }

    fn conv_rewind(&self, _: &mut ConvState, n: usize) -> bool {
        n == 0
    }

    fn conv_rows(&self, conv: &ConvState, out: &mut Vec<f32>) {
        let start = out.len();
        out.resize(start + conv.n_rows * conv.n_channels, 0.0);
        for (memory, x, at) in conv.elements(&mut out[start..]) {
            memory.read(at, bytemuck::bytes_of_mut(x));
        }
    }

    fn conv_set(&self, conv: &mut ConvState, rows: &[f32]) {
        self.check(&conv.owner);
        assert_eq!(
            rows.len(),
            conv.n_rows * conv.n_channels,
            "rows of a convolution"
        );
        for (memory, x, at) in conv.elements(&mut rows.to_vec()) {
            memory.write(at, bytemuck::bytes_of(x));
        }
    }

    fn begin(&mut self, _: Step) {}

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32) -> Tensor {
        assert!(
            tokens.iter().all(|token| (*token as usize) < table.n_out),
            "a token beyond the table"
        );
        let rows = self.graph.ints(tokens.iter().map(|token| *token as i32));
        let table_node = self.matrix_node(table);
        let mut node = self.graph.get_rows(table_node, rows);
        if scale != 1.0 {
            node = self.graph.scale(node, scale);
        }
        Tensor::rows(node, tokens.len(), table.n_in)
    }

    fn import(&mut self, rows: &[f32], n_cols: usize) -> Tensor {
        let n = rows.len() / n_cols;
        let node = self.graph.floats([n_cols, n], &rows.into());
        Tensor::rows(node, n, n_cols)
    }

    fn rms_norm(&mut self, x: &Tensor, gain: &Vector, eps: f32) -> Tensor {
        let n = gain.data.len();
        assert!(x.n_cols.is_multiple_of(n), "rows of whole groups");
        let g = &mut self.graph;
        let groups = g.reshape(x.node, [n, x.n_cols / n, x.n_tokens]);
        let normed = g.rms_norm(groups, eps);
        let gain = g.floats([n, 1], &gain.data);
        let scaled = g.mul(normed, gain);
        let node = g.reshape(scaled, [x.n_cols, x.n_tokens, 1]);
        Tensor::rows(node, x.n_tokens, x.n_cols)
    }

    fn linear<const N: usize>(&mut self, x: &Tensor, layers: [&Linear<Self>; N]) -> [Tensor; N] {
        layers.map(|layer| {
            let (n_in, n_out) = (layer.weight.n_in, layer.weight.n_out);
            assert_eq!(x.n_cols, n_in, "inputs of a linear layer");
            let weight = self.factor_node(&layer.weight);
            let mut node = self.graph.mul_mat(weight, x.node);
            if let Some(bias) = &layer.bias {
                let bias = self.graph.floats([n_out, 1], &bias.data);
                node = self.graph.add(node, bias);
            }
            Tensor::rows(node, x.n_tokens, n_out)
        })
    }

    fn route(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        let (n, k, n_tokens) = (moe.routing.n_experts, moe.routing.n_used, x.n_tokens - from);
        let size = [x.n_cols, n_tokens, 1];
        let rows = self
            .graph
            .view(x.node, size, [x.n_cols, 0], from * x.n_cols);
        let rows = Tensor::rows(rows, n_tokens, x.n_cols);
        let [z] = self.linear(&rows, [&moe.router]);
        let g = &mut self.graph;
        let scores = match moe.routing.gating {
            Gating::Softmax => g.softmax(z.node),
            Gating::Sigmoid => g.sigmoid(z.node),
        };
        let keys = match (&moe.selection_bias, moe.routing.gating) {
            (None, _) => z.node,
            (Some(bias), gating) => {
                let bias = g.floats([n, 1], &bias.data);
                let scores = match gating {
                    Gating::Softmax => z.node,
                    Gating::Sigmoid => scores,
                };
                g.add(scores, bias)
            }
        };
        let picks = g.top_k(keys, k);
        let scores = g.reshape(scores, [1, n, n_tokens]);
        let picked = g.get_rows(scores, picks);
        let picked = g.reshape(picked, [k, n_tokens, 1]);
        Tensor {
            node: picks,
            factors: Some(g.normalize(picked, moe.routing.sum_eps)),
            n_tokens,
            n_cols: k,
        }
    }

    fn moe(&mut self, x: &Tensor, routes: Tensor, moe: &Moe<Self>) -> Tensor {
        if moe.down_by_neuron {
            self.graph.fail(Error::Unsupported {
                kind: "layout in ggml",
                found: format!("{}: a row for each neuron", moe.down.name),
                supported: "a row for each output".into(),
            });
            return Tensor::rows(x.node, x.n_tokens, x.n_cols);
        }
        let (n, n_experts, k) = (x.n_cols, moe.routing.n_experts, routes.n_cols);
        let layers = moe.layers().map(|layer| {
            let (node, weight) = (self.matrix_node(&layer.weight), &layer.weight);
            let size = [weight.n_in, weight.n_out / n_experts, n_experts];
            self.graph.reshape(node, size)
        });
        let g = &mut self.graph;
        let rows = g.reshape(x.node, [n, 1, x.n_tokens]);
        let [gate, up] = [layers[0], layers[1]].map(|w| g.mul_mat_picked(w, rows, routes.node));
        let h = g.glu(gate, up, moe.activation);
        let out = g.mul_mat_picked(layers[2], h, routes.node);
        let weights = routes.factors.expect("routes, not activations");
        let weights = g.reshape(weights, [1, k, x.n_tokens]);
        let out = g.mul(out, weights);
        let part = |g: &mut Graph, j: usize| g.view(out, [n, x.n_tokens, 1], [k * n, 0], j * n);
        let mut sum = part(g, 0);
        for j in 1..k {
            let next = part(g, j);
            sum = g.add(sum, next);
        }
        Tensor::rows(sum, x.n_tokens, n)
    }

    fn rope_angles(&mut self, rope: &Rope, start: usize, n: usize) -> Tensor {
        let factors: Arc<[f32]> = rope.inv_freq.iter().map(|freq| 1.0 / freq).collect();
        Tensor {
            node: self.graph.ints((start..start + n).map(|p| p as i32)),
            n_tokens: n,
            n_cols: 2 * factors.len(),
            factors: Some(self.graph.floats([factors.len(), 1], &factors)),
        }
    }

    fn rope(&mut self, x: &mut Tensor, head_dim: usize, pairs: RopePairs, angles: &Tensor) {
        let factors = angles.factors.expect("angles, not activations");
        let fits = x.n_cols.is_multiple_of(head_dim) && angles.n_cols <= head_dim;
        assert!(fits && x.n_tokens == angles.n_tokens, "heads and positions");
        let g = &mut self.graph;
        let heads = g.reshape(x.node, [head_dim, x.n_cols / head_dim, x.n_tokens]);
        let turned = g.rope(heads, angles.node, factors, pairs);
        x.node = g.reshape(turned, [x.n_cols, x.n_tokens, 1]);
    }

    fn kv_write(&mut self, kv: &mut KvCache, k: &Tensor, v: &Tensor, start: usize) {
        self.check(&kv.owner);
        let n_cols = kv.n_kv_heads * kv.head_dim;
        for (which, x) in [k, v].into_iter().enumerate() {
            assert_eq!(x.n_cols, n_cols, "a row of a cache");
            let rows = CacheView {
                memory: &kv.memory()[which],
                kind: kv.kinds[which],
                size: [n_cols, x.n_tokens, 1],
                strides: [n_cols, 0],
                offset: start * n_cols,
            };
            self.graph.store(x.node, &rows);
        }
    }

    fn attention(
        &mut self,
        q: &Tensor,
        kv: &KvCache,
        start: usize,
        attention: &Attention,
    ) -> Tensor {
        self.check(&kv.owner);
        let (n_heads, n) = (attention.n_heads, attention.head_dim);
        assert_eq!(q.n_cols, n_heads * n, "a row of queries");
        let mask = Mask {
            start,
            n_tokens: q.n_tokens,
            window: attention.window,
        };
        let keys = mask.keys();
        // A single query sees all the keys that it is given.
        let mask = (q.n_tokens > 1).then(|| self.mask(mask));
        let g = &mut self.graph;
        let [k, v] = [0, 1].map(|which| g.load(&kv.view(which, keys.start, keys.len())));
        let heads = g.reshape(q.node, [n, n_heads, q.n_tokens]);
        let queries = g.swap_rows(heads);
        let out = g.flash_attention([queries, k, v], mask, attention.scale);
        let node = g.reshape(out, [q.n_cols, q.n_tokens, 1]);
        Tensor::rows(node, q.n_tokens, q.n_cols)
    }

    fn short_conv(&mut self, bcx: &Tensor, taps: &Vector, conv: &mut ConvState) -> Tensor {
        self.check(&conv.owner);
        let (n, n_tokens, n_taps) = (conv.n_channels, bcx.n_tokens, conv.n_rows + 1);
        assert_eq!(bcx.n_cols, 3 * n, "gates and inputs of a convolution");
        assert_eq!(taps.data.len(), n_taps * n, "taps of a convolution");
        let g = &mut self.graph;
        let [b, c, x] = [0, n, 2 * n].map(|at| g.view(bcx.node, [n, n_tokens, 1], [3 * n, 0], at));
        let u = g.mul(b, x);
        let mut u = g.transpose(u); // (n_tokens, n_channels)
        u = match &conv.memory {
            Some(memory) => {
                let past = g.load(&conv.view(memory));
                let u = g.concat(past, u);
                let newest = g.view(
                    u,
                    [conv.n_rows, n, 1],
                    [conv.n_rows + n_tokens, 0],
                    n_tokens,
                );
                g.store(newest, &conv.view(memory));
                u
            }
            None => g.contiguous(u),
        };
        let by_channel = taps.by_channel.get_or_init(|| {
            let by_channel = (0..n * n_taps).map(|at| taps.data[at % n_taps * n + at / n_taps]);
            by_channel.collect()
        });
        let taps = g.floats([n_taps, n], by_channel);
        let y = g.short_conv(u, taps);
        let node = g.mul(y, c);
        Tensor::rows(node, n_tokens, n)
    }

    fn glu(&mut self, gate: Tensor, up: &Tensor, activation: Activation) -> Tensor {
        let node = self.graph.glu(gate.node, up.node, activation);
        Tensor::rows(node, gate.n_tokens, gate.n_cols)
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) {
        x.node = self.graph.add(x.node, y.node);
    }

    fn rows_from(&mut self, x: Tensor, from: usize) -> Tensor {
        let n_tokens = x.n_tokens - from;
        let size = [x.n_cols, n_tokens, 1];
        let mut view = |node| self.graph.view(node, size, [x.n_cols, 0], from * x.n_cols);
        Tensor {
            node: view(x.node),
            factors: x.factors.map(view),
            n_tokens,
            ..x
        }
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        self.run(Some(x.node), out)
    }

    fn flush(&mut self) -> Result<()> {
        self.run(None, &mut Vec::new())
    }

    fn scratch_bytes(&self) -> usize {
        self.graph.bytes()
    }
}
