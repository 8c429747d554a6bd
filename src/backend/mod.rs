//! What a forward pass is written in: a dozen operations over opaque tensors.
//!
//! The CPU backend runs each call at once; a GPU backend records it and submits at [`Backend::read`] or
//! [`Backend::flush`], one of which ends every pass. So a model never looks at numbers in the middle of a token: shapes
//! and positions are the only things it may branch on.
//!
//! Activations are row-major `(n_tokens, n)` matrices of `f32`. Weights keep the format of the file.

pub mod cpu;
pub mod delta;
#[cfg(feature = "ggml")]
pub mod ggml;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod notes;
pub mod planner;
pub mod predictor;
pub mod select;
pub mod tracer;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use self::select::KvOptions;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::profile::{Trace, Work};
use crate::quant::{DType, Tensor};

/// The backends of this build.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BackendKind {
    /// Our kernels on the CPU.
    #[default]
    Cpu,
    /// ggml's kernels on the CPU: the reference.
    #[cfg(feature = "ggml")]
    Ggml,
    /// The same with a copy of the weights in ggml's own layouts, as llama.cpp runs a model.
    #[cfg(feature = "ggml")]
    GgmlRepack,
    /// Our shaders on a GPU.
    #[cfg(feature = "gpu")]
    Gpu,
}

impl BackendKind {
    /// Every backend of this build.
    pub const ALL: &[BackendKind] = &[
        BackendKind::Cpu,
        #[cfg(feature = "ggml")]
        BackendKind::Ggml,
        #[cfg(feature = "ggml")]
        BackendKind::GgmlRepack,
        #[cfg(feature = "gpu")]
        BackendKind::Gpu,
    ];

    /// The name in `--backend`.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Cpu => "cpu",
            #[cfg(feature = "ggml")]
            BackendKind::Ggml => "ggml",
            #[cfg(feature = "ggml")]
            BackendKind::GgmlRepack => "ggml-repack",
            #[cfg(feature = "gpu")]
            BackendKind::Gpu => "gpu",
        }
    }

    /// The instruction sets that it was built for, where they are not chosen when it runs: a backend without those of
    /// the machine is no fair peer.
    pub fn built_for(self) -> Vec<&'static str> {
        match self {
            BackendKind::Cpu => Vec::new(),
            #[cfg(feature = "ggml")]
            BackendKind::Ggml | BackendKind::GgmlRepack => ggml::features(),
            #[cfg(feature = "gpu")]
            BackendKind::Gpu => Vec::new(),
        }
    }

    /// Whether it can keep keys and values in these types, where heads are whole blocks of them.
    pub fn caches(self, kinds: KvTypes) -> bool {
        match (self, kinds) {
            (BackendKind::Cpu, _) => true,
            #[cfg(feature = "gpu")]
            (BackendKind::Gpu, kinds) => ![kinds.keys, kinds.values].contains(&KvType::Q4_0),
            #[cfg(feature = "ggml")]
            (BackendKind::Ggml | BackendKind::GgmlRepack, kinds) => !kinds.is_quantized(),
        }
    }

    /// The backend called `name`, if this build has it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

/// The activation of a gated unit, applied to the gate.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh form of GELU.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// What a router makes of its logits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gating {
    /// `exp(z)`, over all experts or those chosen: their shares of each other are the same.
    Softmax,
    /// `1 / (1 + exp(-z))`.
    Sigmoid,
}

/// How a token's experts and their weights follow from the logits `z` of a router: the `n_used` experts of the largest
/// `z`, or of the largest `score(z) + bias` where there is a bias, which orders and does not weigh; of equals the first.
/// Their weights are their scores, divided by the sum of these and `sum_eps`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Routing {
    /// Experts of a layer.
    pub n_experts: usize,
    /// Experts of a token.
    pub n_used: usize,
    /// The scores.
    pub gating: Gating,
    /// Added to the sum of scores.
    pub sum_eps: f32,
}

/// Experts of a token at most.
pub const MAX_USED: usize = 64;

/// Which elements of a head a rotary embedding pairs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RopePairs {
    /// `(x[i], x[i + n/2])`: GPT-NeoX.
    Halves,
    /// `(x[2i], x[2i + 1])`: the original form, kept by Llama files.
    Neighbours,
}

/// A rotary position embedding (Su et al., arXiv:2104.09864).
#[derive(Clone, PartialEq, Debug)]
pub struct Rope {
    /// Angle per position of each pair, in radians; twice as many elements of each head rotate.
    pub inv_freq: Vec<f32>,
    /// Which elements make a pair.
    pub pairs: RopePairs,
}

impl Rope {
    /// `base^(-2i / n_rot)` for each pair.
    pub fn new(base: f32, n_rot: usize, pairs: RopePairs) -> Self {
        let power = |i: usize| f64::from(base).powf(-2.0 * i as f64 / n_rot as f64) as f32;
        Self {
            inv_freq: (0..n_rot / 2).map(power).collect(),
            pairs,
        }
    }
}

/// The shape and the mask of an attention.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Attention {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; query head `h` reads head `h * n_kv_heads / n_heads`.
    pub n_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on `q . k`.
    pub scale: f32,
    /// A query at position `p` sees keys in `(p - window, p]`; `None`: all keys up to `p`.
    pub window: Option<usize>,
}

/// Positions of a page of [`Backend::kv_save`].
pub const KV_PAGE: usize = 256;

/// The element type of cached keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum KvType {
    /// 32-bit float: for comparisons.
    F32,
    /// 16-bit float.
    #[default]
    F16,
    /// 8 bits, one scale per 32 elements of a head.
    Q8_0,
    /// 4 bits, one scale per 32 elements of a head.
    Q4_0,
}

impl KvType {
    /// All of them, the largest first.
    pub const ALL: [KvType; 4] = [KvType::F32, KvType::F16, KvType::Q8_0, KvType::Q4_0];

    /// The name, as llama.cpp writes it.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8_0 => "q8_0",
            KvType::Q4_0 => "q4_0",
        }
    }

    /// The layout of a row.
    pub fn dtype(self) -> DType {
        match self {
            KvType::F32 => DType::F32,
            KvType::F16 => DType::F16,
            KvType::Q8_0 => DType::Q8_0,
            KvType::Q4_0 => DType::Q4_0,
        }
    }

    /// Whether rows are blocks with a scale, not floats.
    pub fn is_quantized(self) -> bool {
        self.dtype().block_len() > 1
    }

    /// Bytes of `n` elements, whole blocks of them.
    pub fn row_bytes(self, n: usize) -> usize {
        n / self.dtype().block_len() * self.dtype().block_bytes()
    }
}

/// The types of cached keys and of cached values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KvTypes {
    /// Of keys.
    pub keys: KvType,
    /// Of values.
    pub values: KvType,
}

impl KvTypes {
    /// Whether either is quantized.
    pub fn is_quantized(self) -> bool {
        self.keys.is_quantized() || self.values.is_quantized()
    }

    /// Bytes of `n` elements of a key and as many of its value.
    pub fn row_bytes(self, n: usize) -> usize {
        self.keys.row_bytes(n) + self.values.row_bytes(n)
    }
}

/// `f16`, or `q8_0 keys and q4_0 values`.
impl std::fmt::Display for KvTypes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (keys, values) = (self.keys.name(), self.values.name());
        match keys == values {
            true => f.write_str(keys),
            false => write!(f, "{keys} keys and {values} values"),
        }
    }
}

impl From<KvType> for KvTypes {
    /// Both the same.
    fn from(kind: KvType) -> Self {
        Self {
            keys: kind,
            values: kind,
        }
    }
}

/// What a pass is a part of. Kernels for many tokens may round otherwise than those for one; what a token leaves in the
/// cache depends on its step alone, not on how many were computed with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Reading tokens that are known.
    Prefill,
    /// One token after the other.
    Decode,
}

/// What unwinds out of a pass for whose activations there is no memory: operations return tensors and no errors, and who
/// runs passes turns this into one.
pub(crate) struct NoMemory {
    /// Bytes of the buffer that could not be had.
    pub(crate) bytes: usize,
}

/// What unwinds out of a pass for which a part of the weights could not be read, or that is not wanted any more, likewise.
pub(crate) struct Lost(pub(crate) Error);

/// The operations of a forward pass. Tensors are `(n_tokens, n)`; `n` is the row length.
pub trait Backend {
    /// A weight matrix `(n_out, n_in)` in the format of the file.
    type Matrix: Send + Sync;
    /// A weight vector of floats: norm gains, biases, convolution taps.
    type Vector: Send + Sync;
    /// Activations.
    type Tensor;
    /// Keys and values of one attention layer.
    type Kv: Send + 'static;
    /// The inputs that a short convolution remembers.
    type Conv: Send + 'static;

    /// Takes a matrix by reference.
    ///
    /// # Errors
    /// If this backend has no kernel for the format.
    fn matrix(&self, tensor: &Tensor) -> Result<Self::Matrix>;

    /// The same of a table whose rows are looked up one by one.
    ///
    /// # Errors
    /// As [`Backend::matrix`].
    fn table(&self, tensor: &Tensor) -> Result<Self::Matrix> {
        self.matrix(tensor)
    }

    /// The numbers of a tensor that the model itself looks at or rearranges.
    fn floats(&self, tensor: &Tensor) -> Vec<f32> {
        tensor.to_f32()
    }

    /// Takes a vector, in the order of the file, or of `data` where the model has rearranged it.
    fn vector(&self, data: Vec<f32>) -> Self::Vector;

    /// An empty cache for keys and values of `attention`.
    fn kv(&self, attention: &Attention, options: &KvOptions) -> Self::Kv;

    /// Makes room to write at `positions`: they exist, and belong to this cache alone.
    ///
    /// # Errors
    /// If there is no memory for them.
    fn kv_reserve(&self, kv: &mut Self::Kv, positions: Range<usize>) -> Result<()>;

    /// A cache of this backend that holds the same, for a timeline that parts from another. What both hold may lie in
    /// one place until either writes there.
    ///
    /// # Errors
    /// If there is no memory for it.
    fn kv_copy(&self, kv: &Self::Kv) -> Result<Self::Kv>;

    /// Tells `sink` the first `n` positions as they are cached: for each page of [`KV_PAGE`] positions, of which the
    /// last may hold fewer, the keys `(n_kv_heads, n_in_page, head_dim)`, then the values. After them what queries left.
    ///
    /// # Errors
    /// What `sink` returns.
    fn kv_save(
        &self,
        kv: &Self::Kv,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()>;

    /// Takes the first `n` positions, for which there is room, from `source`, which fills what it is given with what
    /// [`Backend::kv_save`] told.
    ///
    /// # Errors
    /// What `source` returns; the positions are unspecified then.
    fn kv_load(
        &self,
        kv: &mut Self::Kv,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()>;

    /// Bytes that the cache holds.
    fn kv_bytes(&self, kv: &Self::Kv) -> usize;

    /// Bytes that all caches of a session together may take beside their own, which are so many.
    fn kv_spare_bytes(&self, _bytes: usize) -> usize {
        0
    }

    /// Bytes that the memory of a convolution holds.
    fn conv_bytes(&self, conv: &Self::Conv) -> usize;

    /// A zeroed memory of `n_rows` inputs of `n_channels`.
    fn conv(&self, n_rows: usize, n_channels: usize) -> Self::Conv;

    /// Forgets all inputs.
    fn conv_reset(&self, conv: &mut Self::Conv);

    /// Takes the newest `n` inputs back. `false` if what came before them is not remembered: nothing has changed then.
    fn conv_rewind(&self, conv: &mut Self::Conv, n: usize) -> bool;

    /// Appends what it remembers to `out`: `(n_rows, n_channels)`, oldest first.
    fn conv_rows(&self, conv: &Self::Conv, out: &mut Vec<f32>);

    /// Makes it remember `rows`, as [`Backend::conv_rows`] gave them.
    fn conv_set(&self, conv: &mut Self::Conv, rows: &[f32]);

    /// A pass begins that uses the kernels of `step`, however many tokens it has.
    fn begin(&mut self, step: Step);

    /// A pass begins of the one token that the last [`Backend::ask_largest`] will have found, which need not be known yet:
    /// [`Backend::embed`] takes that one, whatever it is told. None of the sequence before [`Backend::adopt`]: until then
    /// convolutions are where they were, but for one input less that they can take back, and what is behind the newest
    /// position of a cache is anything. `false`, and nothing done: passes begin here when their tokens are known.
    fn begin_ahead(&mut self) -> bool {
        false
    }

    /// The pass that was begun ahead is one of the sequence, whose convolutions are `convs`.
    fn adopt<'a>(&mut self, _convs: impl Iterator<Item = &'a mut Self::Conv>)
    where
        Self::Conv: 'a,
    {
    }

    /// A pass was stopped: what it held for its next operations, and other sessions may wait for, is let go of.
    fn stopped(&mut self) {}

    /// A pass ends between two operations where `cancel` says so. A backend that takes no notice runs it to its end.
    fn set_cancel(&mut self, _cancel: &Cancel) {}

    /// The rows `tokens` of a table, times `scale`.
    fn embed(&mut self, table: &Self::Matrix, tokens: &[u32], scale: f32) -> Self::Tensor;

    /// Rows of numbers that another backend has computed.
    fn import(&mut self, rows: &[f32], n_cols: usize) -> Self::Tensor;

    /// `x / sqrt(mean(x^2) + eps) * gain`, over each run of `gain` length in a row (so over each head for a gain of
    /// `head_dim`).
    fn rms_norm(&mut self, x: &Self::Tensor, gain: &Self::Vector, eps: f32) -> Self::Tensor;

    /// `x W^T + bias`, for several matrices that share the input.
    fn linear<const N: usize>(
        &mut self,
        x: &Self::Tensor,
        weights: [&Linear<Self>; N],
    ) -> [Self::Tensor; N];

    /// The sines and cosines of `n` positions from `start`.
    fn rope_angles(&mut self, rope: &Rope, start: usize, n: usize) -> Self::Tensor;

    /// Rotates the first elements of each run of `head_dim` in the rows of `x`.
    fn rope(
        &mut self,
        x: &mut Self::Tensor,
        head_dim: usize,
        pairs: RopePairs,
        angles: &Self::Tensor,
    );

    /// Writes the rows of `k` and `v` to the cache at positions `start..`, for which there is room.
    fn kv_write(&mut self, kv: &mut Self::Kv, k: &Self::Tensor, v: &Self::Tensor, start: usize);

    /// Keeps what the cache's [`select::Select`] wants to remember of the queries `q` at positions `start..`, of which the
    /// keys have just been written. `false` if that is nothing.
    fn kv_note(
        &mut self,
        _kv: &mut Self::Kv,
        _q: &Self::Tensor,
        _start: usize,
        _attention: &Attention,
    ) -> bool {
        false
    }

    /// Attends from the rows of `q`, at positions `start..`, to all cached positions that causality and the window
    /// let them see, or to those of them that the cache's [`select::Select`] chooses.
    fn attention(
        &mut self,
        q: &Self::Tensor,
        kv: &Self::Kv,
        start: usize,
        attention: &Attention,
    ) -> Self::Tensor;

    /// Gated short convolution: rows `[b | c | x]`; `u = b * x`, `y[t] = sum_j taps[j] * u[t - L + 1 + j]`, out
    /// `c * y`. `taps` is `(L, n_channels)`, oldest first; `conv` holds the `L - 1` rows of `u` before this call and
    /// after it.
    fn short_conv(
        &mut self,
        bcx: &Self::Tensor,
        taps: &Self::Vector,
        conv: &mut Self::Conv,
    ) -> Self::Tensor;

    /// `activation(gate) * up`.
    fn glu(
        &mut self,
        gate: Self::Tensor,
        up: &Self::Tensor,
        activation: Activation,
    ) -> Self::Tensor;

    /// `down(activation(gate(x)) * up(x))`: a gated feed-forward layer.
    fn gated_ffn(&mut self, x: &Self::Tensor, ffn: &GatedFfn<Self>) -> Self::Tensor {
        let [gate, up] = self.linear(x, [&ffn.gate, &ffn.up]);
        let h = self.glu(gate, &up, ffn.activation);
        let [out] = self.linear(&h, [&ffn.down]);
        out
    }

    /// A layer begins whose router will read `x` after the layer's mixer has added to it and a norm with `gain` has run:
    /// what it would choose now is a guess at what it will choose, on which experts may be read ahead. Changes no result.
    fn foresee(&mut self, _x: &Self::Tensor, _gain: &Self::Vector, _eps: f32, _moe: &Moe<Self>) {}

    /// The experts of the rows `from..` of `x` and their weights, see [`Routing`]: rows of `n_used` indices, the best first,
    /// then as many weights. Where experts are read from a file, this is where their reading begins.
    fn route(&mut self, x: &Self::Tensor, from: usize, moe: &Moe<Self>) -> Self::Tensor;

    /// `sum_j weights[j] * down_j(activation(gate_j(x)) * up_j(x))` over the experts `j` of each row as
    /// [`Backend::route`] gave them, in that order.
    fn moe(&mut self, x: &Self::Tensor, routes: Self::Tensor, moe: &Moe<Self>) -> Self::Tensor;

    /// `x += y`.
    fn add(&mut self, x: &mut Self::Tensor, y: &Self::Tensor);

    /// The rows `from..` of `x` alone.
    fn rows_from(&mut self, x: Self::Tensor, from: usize) -> Self::Tensor;

    /// The numbers, after everything before has run.
    ///
    /// # Errors
    /// If something before could not be run; caches and memories it should have changed are then unspecified.
    fn read(&mut self, x: &Self::Tensor, out: &mut Vec<f32>) -> Result<()>;

    /// The `k` largest of the single row `x` and where they stand, the largest first and of equals the one that stands
    /// first, after everything before has run; what is no number comes before all. `false`, and nothing done: reading them
    /// all is as fast here.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn read_top(
        &mut self,
        _x: &Self::Tensor,
        _k: usize,
        _out: &mut Vec<(u32, f32)>,
    ) -> Result<bool> {
        Ok(false)
    }

    /// Has everything before run, and what [`Backend::read_top`] finds for `k = 1`, without waiting for it: each answer is
    /// there once, the oldest first. `false`, and nothing done: waiting costs nothing here.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn ask_largest(&mut self, _x: &Self::Tensor) -> Result<bool> {
        Ok(false)
    }

    /// What was asked for first and not answered yet: the largest and where it stands.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn answer(&mut self) -> Result<(u32, f32)> {
        unreachable!("of a backend that can be asked")
    }

    /// Runs everything before: the end of a pass that is not read.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn flush(&mut self) -> Result<()>;

    /// Bytes of activations held, in use or not.
    fn scratch_bytes(&self) -> usize;

    /// What was done so far; nothing where a backend does not count.
    fn work(&self) -> Work {
        Work::default()
    }

    /// The kernel that an operation would run now; empty where a backend does not say.
    fn kernel(&self, _of: Runs<Self>) -> &'static str {
        ""
    }

    /// From now on measures how long threads wait for each other.
    fn time_waits(&self) {}

    /// How long the caller has waited for other threads; nothing where that is not measured.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    /// How long the other threads have worked, all together; nothing where that is not measured.
    fn worked(&self) -> Duration {
        Duration::ZERO
    }

    /// What was traced since the last call, where that is done: see [`tracer`].
    fn take_trace(&mut self) -> Option<Trace> {
        None
    }

    /// The same for each operation; nothing where a backend does not tell them apart.
    fn tallies(&self) -> Vec<planner::Tally> {
        Vec::new()
    }
}

/// An operation, with what its kernel depends on.
pub enum Runs<'a, B: Backend + ?Sized> {
    /// [`Backend::rms_norm`].
    RmsNorm,
    /// [`Backend::linear`].
    Linear(&'a B::Matrix),
    /// [`Backend::gated_ffn`], if one kernel runs more than a matrix of it.
    GatedFfn(&'a GatedFfn<B>),
    /// [`Backend::route`].
    Route(&'a Moe<B>),
    /// [`Backend::moe`].
    Moe(&'a Moe<B>),
    /// [`Backend::rope`].
    Rope(RopePairs),
    /// [`Backend::kv_write`].
    KvWrite(&'a B::Kv),
    /// [`Backend::attention`].
    Attention(&'a B::Kv),
    /// [`Backend::short_conv`].
    ShortConv,
    /// [`Backend::glu`].
    Glu,
    /// [`Backend::add`].
    Add,
}

/// A linear layer of a backend. One that wraps another and takes its weights passes its layers on as they are.
pub type Linear<B> = LinearOf<<B as Backend>::Matrix, <B as Backend>::Vector>;

/// A linear layer with weights of these types.
pub struct LinearOf<M, V> {
    /// The name of its tensors, without `.weight`: `blk.3.attn_q`.
    pub name: Arc<str>,
    /// `(n_out, n_in)`.
    pub weight: M,
    /// `(n_out)`.
    pub bias: Option<V>,
}

/// A gated feed-forward layer of a backend.
pub type GatedFfn<B> = GatedFfnOf<<B as Backend>::Matrix, <B as Backend>::Vector>;

/// A gated feed-forward layer with weights of these types.
pub struct GatedFfnOf<M, V> {
    /// `(n_ffn, hidden)`.
    pub gate: LinearOf<M, V>,
    /// `(n_ffn, hidden)`.
    pub up: LinearOf<M, V>,
    /// `(hidden, n_ffn)`.
    pub down: LinearOf<M, V>,
    /// Applied to the gate.
    pub activation: Activation,
}

impl<M, V> GatedFfnOf<M, V> {
    /// Gate, up, down.
    pub fn layers(&self) -> [&LinearOf<M, V>; 3] {
        [&self.gate, &self.up, &self.down]
    }
}

/// A mixture of experts of a backend.
pub type Moe<B> = MoeOf<<B as Backend>::Matrix, <B as Backend>::Vector>;

/// A mixture of gated feed-forward layers with weights of these types (Shazeer et al., arXiv:1701.06538). The rows of all
/// experts lie one after the other.
pub struct MoeOf<M, V> {
    /// `(n_experts, hidden)`, floats.
    pub router: LinearOf<M, V>,
    /// `(n_experts)`: added to scores where experts are chosen.
    pub selection_bias: Option<V>,
    /// From logits to experts.
    pub routing: Routing,
    /// `(n_experts * n_ffn, hidden)`.
    pub gate: LinearOf<M, V>,
    /// `(n_experts * n_ffn, hidden)`.
    pub up: LinearOf<M, V>,
    /// `(n_experts * hidden, n_ffn)`, or `(n_experts * n_ffn, hidden)` if [`MoeOf::down_by_neuron`].
    pub down: LinearOf<M, V>,
    /// Whether a row of `down` is what one neuron adds, not what one output sums.
    pub down_by_neuron: bool,
    /// Neurons of an expert.
    pub n_ffn: usize,
    /// Applied to the gate.
    pub activation: Activation,
}

impl<M, V> MoeOf<M, V> {
    /// Gate, up, down.
    pub fn layers(&self) -> [&LinearOf<M, V>; 3] {
        [&self.gate, &self.up, &self.down]
    }
}
