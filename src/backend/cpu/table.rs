//! Every kernel of the CPU backend: dispatcher, test list and bench list. A kernel not named here does not exist.
//!
//! Rows of a table are ordered best first. The first row whose level this CPU has, and `KINGLET_ISA` allows, is taken;
//! `KINGLET_KERNEL=name[,name]` puts the named rows first. Choice happens once, when weights are loaded or a backend
//! is made.
#![allow(
    unsafe_code,
    reason = "calls to target-feature kernels, each through a `Ready`"
)]

use std::sync::OnceLock;

use super::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8RowMut, Tile};
use super::isa::Isa;
use super::logits::{self, Largest};
use super::panels;
use super::pool::OutCols;
use super::ranking;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512vbmi, avx512vnni};
#[cfg(target_arch = "aarch64")]
use super::{neon, neon_dotprod};
use crate::backend::delta::Exact;
use crate::backend::{Activation, KvType};
use crate::profile::DeltaWork;
use crate::quant::{self, BlockQ4_0, BlockQ8_0, DType};

/// What all rows of all tables have.
pub trait Kernel: Sync + 'static {
    /// Operation, weights, activations, level: `gemv_q8_0_q8_avx2`.
    fn name(&self) -> &'static str;
    /// The level it needs.
    fn isa(&self) -> Isa;
}

/// A kernel that this CPU can run. Holding one is the proof.
pub struct Ready<K: 'static>(&'static K);

impl<K> Clone for Ready<K> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<K> Copy for Ready<K> {}

impl<K: Kernel> Ready<K> {
    /// `kernel`, if this CPU has its level.
    pub fn new(kernel: &'static K) -> Option<Self> {
        kernel.isa().detected().then_some(Self(kernel))
    }

    /// The best of `rows` that this CPU has and the environment allows.
    pub fn best(rows: impl Iterator<Item = &'static K> + Clone) -> Option<Self> {
        let named = std::env::var("KINGLET_KERNEL").unwrap_or_default();
        let forced = rows
            .clone()
            .find(|k| named.split(',').any(|name| name == k.name()) && k.isa().detected());
        forced
            .or_else(|| rows.clone().find(|k| k.isa().usable()))
            .map(Self)
    }

    /// The row's name.
    pub fn name(&self) -> &'static str {
        self.0.name()
    }

    /// The row's level.
    pub fn isa(&self) -> Isa {
        self.0.isa()
    }
}

/// How a matrix kernel wants its activations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ActFormat {
    /// 32-bit floats.
    F32,
    /// 8-bit blocks: `acts.rs`.
    Q8,
    /// Tiles of bf16: `acts.rs`.
    Bf16,
}

/// How the rows of a matrix lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// One after the other, as in a file.
    Rows,
    /// Sixteen side by side: `panels.rs`.
    Panels,
}

/// A product of activations and a weight matrix: `y[t, r] = sum_k w[r, k] x[t, k]`.
pub struct MatMul {
    name: &'static str,
    /// Format of the weights.
    pub weights: DType,
    /// How they lie.
    pub layout: Layout,
    /// Format of the activations.
    pub acts: ActFormat,
    isa: Isa,
    run: unsafe fn(&[u8], &Acts, &mut OutCols),
}

impl Kernel for MatMul {
    fn name(&self) -> &'static str {
        self.name
    }
    fn isa(&self) -> Isa {
        self.isa
    }
}

impl Ready<MatMul> {
    /// Format of the activations.
    pub fn acts(&self) -> ActFormat {
        self.0.acts
    }

    /// How the rows of its weights lie.
    pub fn layout(&self) -> Layout {
        self.0.layout
    }

    /// Computes the columns of `y`. `w` is the rows of the matrix that belong to them, whole blocks, adjacent; or their
    /// panels, then these are whole.
    ///
    /// # Panics
    /// If the sizes contradict each other.
    pub fn run(&self, w: &[u8], x: &Acts, y: &mut OutCols) {
        let dtype = self.0.weights;
        let (bytes, of) = match self.0.layout {
            Layout::Rows => (dtype.row_bytes(x.n_in), 1),
            Layout::Panels => (panels::panel_bytes(dtype, x.n_in), panels::ROWS),
        };
        let bytes = bytes.expect("whole blocks, checked when the model was loaded");
        assert!(
            w.len() * of == bytes * y.n_cols() && y.n_cols().is_multiple_of(of),
            "{}: bytes of {} rows of {}",
            self.0.name,
            y.n_cols(),
            x.n_in
        );
        assert_eq!(
            x.n_tokens,
            y.n_tokens(),
            "{}: tokens in and out",
            self.0.name
        );
        // SAFETY: `Ready` exists, so the CPU has the features of the kernel's level.
        unsafe { (self.0.run)(w, x, y) }
    }
}

/// Two products whose results meet in a gated unit, see [`GatedRows`].
pub struct Gated {
    name: &'static str,
    /// Format of both matrices.
    pub weights: DType,
    isa: Isa,
    run: unsafe fn(&mut GatedRows),
}

impl Kernel for Gated {
    fn name(&self) -> &'static str {
        self.name
    }
    fn isa(&self) -> Isa {
        self.isa
    }
}

impl Ready<Gated> {
    /// Runs the kernel.
    ///
    /// # Panics
    /// If the sizes contradict each other.
    pub fn run(&self, rows: &mut GatedRows) {
        let row_bytes = self.0.weights.row_bytes(rows.x.n_in);
        let row_bytes = row_bytes.expect("whole blocks, checked when the model was loaded");
        let n_rows = rows.out.n_cols() * BF16_LEN;
        assert!(
            [rows.gate, rows.up].map(<[u8]>::len) == [row_bytes * n_rows; 2],
            "{}: bytes of {n_rows} rows of {}",
            self.0.name,
            rows.x.n_in
        );
        assert_eq!(
            rows.x.n_tokens.div_ceil(BF16_TOKENS),
            rows.out.n_tokens(),
            "{}: groups of tokens in and out",
            self.0.name
        );
        // SAFETY: `Ready` exists, so the CPU has the features of the kernel's level.
        unsafe { (self.0.run)(rows) }
    }
}

/// Some rows of a product of one token's activations, in 8 bits, and a weight matrix: `y[i] = sum_k w[picks[i], k] x[k]`.
pub struct Picked {
    name: &'static str,
    /// Format of the weights.
    pub weights: DType,
    isa: Isa,
    run: unsafe fn(&[u8], &[u32], &Acts, &mut [f32]),
}

impl Kernel for Picked {
    fn name(&self) -> &'static str {
        self.name
    }
    fn isa(&self) -> Isa {
        self.isa
    }
}

impl Ready<Picked> {
    /// Computes the rows `picks` of the matrix that `w` is.
    ///
    /// # Panics
    /// If the sizes contradict each other, or there is no such row.
    pub fn run(&self, w: &[u8], picks: &[u32], x: &Acts, y: &mut [f32]) {
        assert!(
            picks.len() == y.len() && x.n_tokens == 1,
            "{}: {} rows of {} tokens into {}",
            self.0.name,
            picks.len(),
            x.n_tokens,
            y.len()
        );
        // SAFETY: `Ready` exists, so the CPU has the features of the kernel's level.
        unsafe { (self.0.run)(w, picks, x, y) }
    }
}

/// The best GEMV (few tokens) for a format.
pub fn gemv(weights: DType) -> Option<Ready<MatMul>> {
    Ready::best(GEMV.iter().filter(move |k| k.weights == weights))
}

/// The same over panels; `None` if rows of the format are not packed.
pub fn gemv_panels(weights: DType) -> Option<Ready<MatMul>> {
    Ready::best(GEMV_PANELS.iter().filter(move |k| k.weights == weights))
}

/// The best kernel for some rows of a matrix in a format.
pub fn picked(weights: DType) -> Option<Ready<Picked>> {
    Ready::best(PICKED.iter().filter(move |k| k.weights == weights))
}

/// The best GEMM (many tokens) for a format.
pub fn gemm(weights: DType) -> Option<Ready<MatMul>> {
    Ready::best(GEMM.iter().filter(move |k| k.weights == weights))
}

/// The best kernel of a matrix unit (many tokens, tiles of bf16) for a format.
pub fn tiles(weights: DType) -> Option<Ready<MatMul>> {
    Ready::best(TILES.iter().filter(move |k| k.weights == weights))
}

/// The best kernel of a matrix unit for two matrices of a format that a gated unit joins.
pub fn gated(weights: DType) -> Option<Ready<Gated>> {
    Ready::best(GATED.iter().filter(move |k| k.weights == weights))
}

/// The formats that have a kernel, for messages.
pub(crate) fn formats() -> String {
    let names = DType::ALL
        .iter()
        .filter(|t| gemv(**t).is_some())
        .map(|t| t.name());
    names.collect::<Vec<_>>().join(", ")
}

macro_rules! operation {
    ($(#[$doc:meta])* $kernel:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        pub struct $kernel {
            name: &'static str,
            isa: Isa,
            run: unsafe fn($($ty),*),
        }

        impl Kernel for $kernel {
            fn name(&self) -> &'static str {
                self.name
            }
            fn isa(&self) -> Isa {
                self.isa
            }
        }

        impl Ready<$kernel> {
            /// Runs the kernel.
            #[inline]
            #[allow(clippy::too_many_arguments, reason = "an operation has as many as it has")]
            pub fn run(&self, $($arg: $ty),*) {
                // SAFETY: `Ready` exists, so the CPU has the features of the kernel's level.
                unsafe { (self.0.run)($($arg),*) }
            }
        }
    };
}

operation! {
    /// Quantizes a row of activations: `x` (n), `q` and `u` (n), `d` and `s` (n / 32), see [`acts`](super::acts).
    Quantize(x: &[f32], row: &mut Q8RowMut)
}
operation! {
    /// Packs rows `x` (n_tokens, n_in), at most 32, into a group of bf16 tiles, see [`acts`](super::acts).
    PackBf16(x: &[f32], n_in: usize, group: &mut [[Tile; 2]])
}
operation! {
    /// `y = x / sqrt(mean(x^2) + eps) * gain`, all of one length.
    RmsNorm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32])
}
operation! {
    /// Rotates the pairs `(x[i], x[i + n])` of one head by the angles with cosines `cos` (n) and sines `sin` (n).
    RopeHalves(x: &mut [f32], cos: &[f32], sin: &[f32])
}
operation! {
    /// Rotates the pairs `(x[2i], x[2i + 1])` of one head by the angles with cosines `cos` (n) and sines `sin` (n).
    RopeNeighbours(x: &mut [f32], cos: &[f32], sin: &[f32])
}
operation! {
    /// `gate = activation(gate) * up`.
    Glu(activation: Activation, gate: &mut [f32], up: &[f32])
}
operation! {
    /// `weights[i] = exp(logits[i] - max)`, all of one length.
    Weigh(logits: &[f32], max: f32, weights: &mut [f32])
}
operation! {
    /// The largest of logits, see [`Largest`].
    LargestOf(logits: &[f32], found: &mut Largest)
}
operation! {
    /// Ranks chunks by the scores of one query more, see [`ranking`].
    Rank(scores: &[f32], keys: &mut [i32])
}
operation! {
    /// What lies on the two sides of `at`.
    Divide(keys: &[i32], at: i32, sides: &mut ranking::Sides)
}
operation! {
    /// Which keys are at least `least`: bit `i % 64` of word `i / 64` for key `i`.
    Mark(keys: &[i32], least: i32, words: &mut [u64])
}
operation! {
    /// `x += y`.
    Add(x: &mut [f32], y: &[f32])
}
operation! {
    /// Floats to half floats.
    ToF16(x: &[f32], y: &mut [u16])
}
operation! {
    /// Some rows of a gated short convolution, see [`ShortConvRows`].
    ShortConv(rows: &mut ShortConvRows)
}
operation! {
    /// Attends to one span of keys, see [`AttendSpan`].
    Attend(span: &mut AttendSpan)
}

operation! {
    /// Attends from some tokens of a batch, see [`AttendBatch`].
    AttendTokens(batch: &mut AttendBatch)
}
operation! {
    /// Attends from some tokens of a batch, scores from differences of keys where asked, see [`LanesBatch`].
    AttendLanes(batch: &mut LanesBatch)
}
operation! {
    /// Multiplies queries with rows that lie turned, see [`PanelProducts`].
    MultiplyPanels(products: &mut PanelProducts)
}
operation! {
    /// Reads all of `x`: adds the exclusive or of its 64-bit words to `sum` by exclusive or.
    Read(x: &[Line], sum: &mut u64)
}
operation! {
    /// Products of bytes, see [`Products`].
    ProductsI8(products: &mut Products<u8, i8, 64>)
}
operation! {
    /// Products of bf16, see [`Products`].
    ProductsBf16(products: &mut Products<u16, u16, 32>)
}
operation! {
    /// Products of floats, see [`Products`].
    ProductsF32(products: &mut Products<f32, f32, 16>)
}

/// 64 bytes, as they lie in memory: a cache line of today's machines.
pub type Line = [u8; 64];

/// Work that needs no memory, to see how fast a level can multiply and add: adds `rounds` times the sum of all
/// `w[i][k] * x[j][k]` to `sum`. Exact for whole numbers `w` of 0 to 15, floats `x` of -15 to 15, and at most
/// [`Products::MAX_ROUNDS`].
pub struct Products<'a, W, X, const N: usize> {
    /// One side.
    pub w: &'a [[W; N]; 4],
    /// The other.
    pub x: &'a [[X; N]; 4],
    /// How often.
    pub rounds: usize,
    /// The sum.
    pub sum: f64,
}

impl<W, X, const N: usize> Products<'_, W, X, N> {
    /// Rounds whose sums 32 bits hold: at most 32 products meet in a lane, and `32 * 15 * 127 * 2^14` is below `2^31`;
    /// of floats it is four, and `4 * 15 * 15 * 2^14` is below `2^24`.
    pub const MAX_ROUNDS: usize = 1 << 14;
    /// Multiplications, and as many additions, of a round.
    pub const PER_ROUND: usize = 4 * 4 * N;
}

/// A gated short convolution over rows `first..` of a batch: `out[t] = c[t] * sum_j taps[j] * u[t - L + 1 + j]` with
/// `u = b * x`, rows before the batch from `state`.
pub struct ShortConvRows<'a> {
    /// The batch, `(n_tokens, 3 * n_channels)`: `[b | c | x]`.
    pub bcx: &'a [f32],
    /// Channels.
    pub n_channels: usize,
    /// `(L, n_channels)`, oldest first.
    pub taps: &'a [f32],
    /// `(L - 1, n_channels)`: `u` of the positions before the batch, oldest first.
    pub state: &'a [f32],
    /// The first row of the batch to compute.
    pub first: usize,
    /// As many rows as are to be computed, `(_, n_channels)`.
    pub out: &'a mut [f32],
}

/// Keys or values of one head, `(n_keys, head_dim)`, as they are cached.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// Floats.
    F32(&'a [f32]),
    /// Half floats.
    F16(&'a [u16]),
    /// 8 bits.
    Q8_0(&'a [BlockQ8_0]),
    /// 4 bits.
    Q4_0(&'a [BlockQ4_0]),
}

impl<'a> Rows<'a> {
    /// Whole elements of `kind` in `bytes`.
    ///
    /// # Panics
    /// If they are not whole or not aligned.
    pub fn new(kind: KvType, bytes: &'a [u8]) -> Self {
        match kind {
            KvType::F32 => Rows::F32(bytemuck::cast_slice(bytes)),
            KvType::F16 => Rows::F16(bytemuck::cast_slice(bytes)),
            KvType::Q8_0 => Rows::Q8_0(bytemuck::cast_slice(bytes)),
            KvType::Q4_0 => Rows::Q4_0(bytemuck::cast_slice(bytes)),
        }
    }

    /// What [`Rows::new`] was given.
    pub fn bytes(self) -> &'a [u8] {
        match self {
            Rows::F32(rows) => bytemuck::cast_slice(rows),
            Rows::F16(rows) => bytemuck::cast_slice(rows),
            Rows::Q8_0(rows) => bytemuck::cast_slice(rows),
            Rows::Q4_0(rows) => bytemuck::cast_slice(rows),
        }
    }
}

/// Adds one span of keys to running softmax sums (streaming softmax: Milakov and Gimelshein, arXiv:1805.02867).
///
/// All queries read the same key and value head. Query `i` sees keys `visible[i].0..visible[i].1` of the span.
/// For a fresh sum `max` is -inf, `sum` and `out` are 0; after the last span the result is `out / sum`.
pub struct AttendSpan<'a> {
    /// Queries, `(n_queries, head_dim)`, already scaled.
    pub q: &'a [f32],
    /// Keys.
    pub k: Rows<'a>,
    /// Values.
    pub v: Rows<'a>,
    /// Keys of the span that will be read after this one, where that is known: they may be asked for ahead.
    pub next: &'a [u8],
    /// Elements of a head, whole blocks of the types of `k` and `v`.
    pub head_dim: usize,
    /// Whether these are the queries of one decoded token, whose sums may run in another order than those of a prefill.
    /// In a prefill the result for a query must not depend on which others are beside it.
    pub decode: bool,
    /// First and end of the keys that each query sees, `(n_queries)`.
    pub visible: &'a [(usize, usize)],
    /// Largest score so far, `(n_queries)`.
    pub max: &'a mut [f32],
    /// Sum of `exp(score - max)`, `(n_queries)`.
    pub sum: &'a mut [f32],
    /// Sum of `exp(score - max) * v`, `(n_queries, head_dim)`.
    pub out: &'a mut [f32],
}

/// `activation(W_gate x) * W_up x`, rounded and packed as the next matrix of a matrix unit takes it.
pub struct GatedRows<'a> {
    /// Rows of the gate that belong to the columns of `out`: whole blocks, adjacent.
    pub gate: &'a [u8],
    /// The same rows of the other matrix.
    pub up: &'a [u8],
    /// Activations in tiles of bf16.
    pub x: &'a Acts<'a>,
    /// Applied to the products of the gate.
    pub activation: Activation,
    /// `(groups of 32 tokens, chunks of 32 rows)`; absent tokens become zeros.
    pub out: OutCols<'a, [Tile; 2]>,
}

/// Attention of adjacent tokens of a batch, all query heads of one key and value head, to every key they see.
pub struct AttendBatch<'a> {
    /// Queries, a row of `group` heads for each token, at distances of `q_stride`.
    pub q: &'a [f32],
    /// Floats from one token's queries to the next's.
    pub q_stride: usize,
    /// Query heads.
    pub group: usize,
    /// Elements of a head, a multiple of 64.
    pub head_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Position of the first token.
    pub start: usize,
    /// A query at position `p` sees keys in `(p - window, p]`.
    pub window: Option<usize>,
    /// Position of the first key.
    pub first: usize,
    /// Keys in a page, a multiple of 64.
    pub page: usize,
    /// Pages of keys, each `(page, head_dim)`, up to the one of the last token.
    pub keys: &'a [Rows<'a>],
    /// Pages of values likewise.
    pub values: &'a [Rows<'a>],
    /// `(n_tokens, group * head_dim)`.
    pub out: OutCols<'a>,
}

/// The same; where asked, with scores from the differences of adjacent keys, as [`Delta`](crate::backend::delta::Delta)
/// says.
pub struct LanesBatch<'a> {
    /// What attends to what; heads of any length.
    pub attend: AttendBatch<'a>,
    /// Keys of a frame, a multiple of 32 of which a page is a multiple; [`LanesBatch::FRAME_TO_CHOOSE`] where tokens choose.
    pub frame: usize,
    /// Frames that begin before this position are exact.
    pub sink: usize,
    /// Which others are.
    pub exact: Exact,
    /// Of each channel, `(head_dim)`.
    pub thresholds: &'a [f32],
    /// Changes of a frame beyond which it is exact; 0: every frame is, and no thresholds are needed.
    pub most: usize,
    /// Keys that tokens choose, all of which they see, and all exact; `None`: each reads all it sees.
    pub chosen: Option<Chosen<'a>>,
    /// At least [`LanesBatch::room`] floats.
    pub room: &'a mut [f32],
    /// What was done is added here; of chosen keys nothing.
    pub done: DeltaWork,
}

/// Keys that each token of a batch reads.
#[derive(Clone, Copy)]
pub struct Chosen<'a> {
    /// `(n_words, n_tokens)`: bit `j` of word `i` is the key `32 i + j` after the first. Words of whole frames, as far as
    /// any key is read.
    pub words: &'a [u32],
}

impl LanesBatch<'_> {
    /// Keys of a frame where tokens choose keys: many, since a token reads few of them, and what it sums is moved once for
    /// all. On an EPYC (Zen 5) a prompt is read 5 % faster with 256 than with 128.
    pub const FRAME_TO_CHOOSE: usize = 256;

    /// Floats for `n_queries`.
    pub fn room(n_queries: usize, head_dim: usize, frame: usize) -> usize {
        let tiles = n_queries.next_multiple_of(64) * (2 * head_dim + 2);
        // Keys, values, changes, their channels; where those of a key end.
        tiles + frame * (3 * head_dim + head_dim / 4 + 1) + 4 * 16 + head_dim
    }
}

/// Rows of a panel.
pub const PANEL_ROWS: usize = 16;

/// Products of queries with rows that lie turned, in panels of sixteen: `out[q][16 p + r] = sum_c queries[q][c]
/// panels[p][c][r]`, each sum from the first channel to the last, so it does not depend on what stands beside it.
pub struct PanelProducts<'a> {
    /// `(n_queries, n_in)`.
    pub queries: &'a [f32],
    /// Channels.
    pub n_in: usize,
    /// `(n_panels, n_in, PANEL_ROWS)`.
    pub panels: &'a [f32],
    /// `(n_queries, n_panels * PANEL_ROWS)`.
    pub out: &'a mut [f32],
}

/// The kernels of the operations that have no weight format, chosen once for a backend.
#[derive(Clone, Copy)]
pub struct Operations {
    /// Activations to 8 bits.
    pub quantize: Ready<Quantize>,
    /// Activations to tiles of bf16.
    pub pack_bf16: Ready<PackBf16>,
    /// RMS norm.
    pub rms_norm: Ready<RmsNorm>,
    /// Rotary embedding, NeoX pairs.
    pub rope_halves: Ready<RopeHalves>,
    /// Rotary embedding, adjacent pairs.
    pub rope_neighbours: Ready<RopeNeighbours>,
    /// Gated unit.
    pub glu: Ready<Glu>,
    /// Residual sum.
    pub add: Ready<Add>,
    /// Half floats for the cache.
    pub to_f16: Ready<ToF16>,
    /// Gated short convolution.
    pub short_conv: Ready<ShortConv>,
    /// Attention.
    pub attend: Ready<Attend>,
    /// Attention of a batch on a matrix unit.
    pub attend_tiles: Option<Ready<AttendTokens>>,
    /// Attention of a batch with queries in the lanes.
    pub attend_lanes: Ready<AttendLanes>,
    /// Products of queries with sums of keys.
    pub products: Ready<MatMul>,
    /// The same where many queries meet them.
    pub multiply_panels: Ready<MultiplyPanels>,
}

impl Operations {
    /// The best rows for this CPU.
    pub fn best() -> Self {
        fn best<K: Kernel>(rows: &'static [K]) -> Ready<K> {
            Ready::best(rows.iter()).expect("every table ends with a scalar row")
        }
        Self {
            quantize: best(QUANTIZE),
            pack_bf16: best(PACK_BF16),
            rms_norm: best(RMS_NORM),
            rope_halves: best(ROPE_HALVES),
            rope_neighbours: best(ROPE_NEIGHBOURS),
            glu: best(GLU),
            add: best(ADD),
            to_f16: best(TO_F16),
            short_conv: best(SHORT_CONV),
            attend: best(ATTEND),
            attend_tiles: Ready::best(ATTEND_TILES.iter()),
            attend_lanes: best(ATTEND_LANES),
            products: gemm(DType::F32).expect("a row for floats"),
            multiply_panels: best(MULTIPLY_PANELS),
        }
    }
}

/// The kernels of passes over logits, chosen once for a program.
#[derive(Clone, Copy)]
pub struct Logits {
    /// Weights of a draw.
    pub weigh: Ready<Weigh>,
    /// The largest.
    pub largest: Ready<LargestOf>,
}

impl Logits {
    /// The best rows for this CPU.
    pub fn best() -> &'static Self {
        static BEST: OnceLock<Logits> = OnceLock::new();
        BEST.get_or_init(|| Self {
            weigh: Ready::best(WEIGH.iter()).expect("the table ends with a scalar row"),
            largest: Ready::best(LARGEST.iter()).expect("the table ends with a scalar row"),
        })
    }
}

/// The kernels of passes over scores of chunks, chosen once for a program.
#[derive(Clone, Copy)]
pub struct Ranking {
    /// Ranks by one query more.
    pub rank: Ready<Rank>,
    /// What ranks so high, and what does not.
    pub divide: Ready<Divide>,
    /// Which these are.
    pub mark: Ready<Mark>,
}

impl Ranking {
    /// The best rows for this CPU.
    pub fn best() -> &'static Self {
        static BEST: OnceLock<Ranking> = OnceLock::new();
        BEST.get_or_init(|| Self {
            rank: Ready::best(RANK.iter()).expect("the table ends with a scalar row"),
            divide: Ready::best(DIVIDE.iter()).expect("the table ends with a scalar row"),
            mark: Ready::best(MARK.iter()).expect("the table ends with a scalar row"),
        })
    }
}

macro_rules! rows {
    ($(#[$doc:meta])* $table:ident: $kernel:ident { $($(#[$cfg:meta])* $name:literal, $isa:ident, $run:path;)* }) => {
        $(#[$doc])*
        pub static $table: &[$kernel] = &[$($(#[$cfg])* $kernel { name: $name, isa: Isa::$isa, run: $run },)*];
    };
}

macro_rules! matmuls {
    ($(#[$doc:meta])* $table:ident of $layout:ident { $($(#[$cfg:meta])* $name:literal, $weights:ident, $acts:ident, $isa:ident, $run:path;)* }) => {
        $(#[$doc])*
        pub static $table: &[MatMul] = &[$($(#[$cfg])* MatMul {
            name: $name,
            weights: DType::$weights,
            layout: Layout::$layout,
            acts: ActFormat::$acts,
            isa: Isa::$isa,
            run: $run,
        },)*];
    };
}

macro_rules! pickeds {
    ($(#[$doc:meta])* $table:ident { $($(#[$cfg:meta])* $name:literal, $weights:ident, $isa:ident, $run:path;)* }) => {
        $(#[$doc])*
        pub static $table: &[Picked] = &[$($(#[$cfg])* Picked {
            name: $name,
            weights: DType::$weights,
            isa: Isa::$isa,
            run: $run,
        },)*];
    };
}

macro_rules! gateds {
    ($(#[$doc:meta])* $table:ident { $($(#[$cfg:meta])* $name:literal, $weights:ident, $isa:ident, $run:path;)* }) => {
        $(#[$doc])*
        pub static $table: &[Gated] = &[$($(#[$cfg])* Gated {
            name: $name,
            weights: DType::$weights,
            isa: Isa::$isa,
            run: $run,
        },)*];
    };
}

matmuls! {
    /// One token, or a few: weights are read from memory once for each token.
    GEMV of Rows {
        #[cfg(target_arch = "x86_64")]
        "gemv_f16_f32_avx512vnni", F16, F32, Avx512Vnni, avx512vnni::gemv_float::f16;
        #[cfg(target_arch = "x86_64")]
        "gemv_f16_f32_avx2", F16, F32, Avx2, avx2::gemv_float::f16;
        #[cfg(target_arch = "aarch64")]
        "gemv_f16_f32_neon", F16, F32, Neon, neon::gemv_float::f16;
        "gemv_f16_f32_scalar", F16, F32, Scalar, scalar::gemv::f32::<quant::BlockF16>;
        #[cfg(target_arch = "x86_64")]
        "gemv_bf16_f32_avx512vnni", BF16, F32, Avx512Vnni, avx512vnni::gemv_float::bf16;
        #[cfg(target_arch = "x86_64")]
        "gemv_bf16_f32_avx2", BF16, F32, Avx2, avx2::gemv_float::bf16;
        #[cfg(target_arch = "aarch64")]
        "gemv_bf16_f32_neon", BF16, F32, Neon, neon::gemv_float::bf16;
        "gemv_bf16_f32_scalar", BF16, F32, Scalar, scalar::gemv::f32::<quant::BlockBF16>;
        #[cfg(target_arch = "x86_64")]
        "gemv_f32_f32_avx512vnni", F32, F32, Avx512Vnni, avx512vnni::gemv_float::f32;
        #[cfg(target_arch = "x86_64")]
        "gemv_f32_f32_avx2", F32, F32, Avx2, avx2::gemv_float::f32;
        #[cfg(target_arch = "aarch64")]
        "gemv_f32_f32_neon", F32, F32, Neon, neon::gemv_float::f32;
        "gemv_f32_f32_scalar", F32, F32, Scalar, scalar::gemv::f32::<quant::BlockF32>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_0_q8_avx512vbmi", Q4_0, Q8, Avx512Vbmi, avx512vbmi::gemv_q4_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_0_q8_avx512vnni", Q4_0, Q8, Avx512Vnni, avx512vnni::gemv_q4_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_0_q8_avx2", Q4_0, Q8, Avx2, avx2::gemv_q4_0::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_0_q8_neon_dotprod", Q4_0, Q8, NeonDotprod, neon_dotprod::gemv::q4_0;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_0_q8_neon", Q4_0, Q8, Neon, neon::gemv::q4_0;
        "gemv_q4_0_q8_scalar", Q4_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_1_q8_avx512vbmi", Q4_1, Q8, Avx512Vbmi, avx512vbmi::gemv_q4_1::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_1_q8_avx512vnni", Q4_1, Q8, Avx512Vnni, avx512vnni::gemv_q4_1::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_1_q8_avx2", Q4_1, Q8, Avx2, avx2::gemv_q4_1::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_1_q8_neon_dotprod", Q4_1, Q8, NeonDotprod, neon_dotprod::gemv::q4_1;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_1_q8_neon", Q4_1, Q8, Neon, neon::gemv::q4_1;
        "gemv_q4_1_q8_scalar", Q4_1, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4_1>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_0_q8_avx512vbmi", Q5_0, Q8, Avx512Vbmi, avx512vbmi::gemv_q5_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_0_q8_avx512vnni", Q5_0, Q8, Avx512Vnni, avx512vnni::gemv_q5_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_0_q8_avx2", Q5_0, Q8, Avx2, avx2::gemv_q5_0::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q5_0_q8_neon_dotprod", Q5_0, Q8, NeonDotprod, neon_dotprod::gemv::q5_0;
        #[cfg(target_arch = "aarch64")]
        "gemv_q5_0_q8_neon", Q5_0, Q8, Neon, neon::gemv::q5_0;
        "gemv_q5_0_q8_scalar", Q5_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q8_0_q8_avx512vnni", Q8_0, Q8, Avx512Vnni, avx512vnni::gemv_q8_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q8_0_q8_avx2", Q8_0, Q8, Avx2, avx2::gemv_q8_0::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q8_0_q8_neon_dotprod", Q8_0, Q8, NeonDotprod, neon_dotprod::gemv::q8_0;
        #[cfg(target_arch = "aarch64")]
        "gemv_q8_0_q8_neon", Q8_0, Q8, Neon, neon::gemv::q8_0;
        "gemv_q8_0_q8_scalar", Q8_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ8_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_k_q8_avx512vnni", Q4_K, Q8, Avx512Vnni, avx512vnni::gemv_q4_k::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q4_k_q8_avx2", Q4_K, Q8, Avx2, avx2::gemv_q4_k::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_k_q8_neon_dotprod", Q4_K, Q8, NeonDotprod, neon_dotprod::gemv::q4_k;
        #[cfg(target_arch = "aarch64")]
        "gemv_q4_k_q8_neon", Q4_K, Q8, Neon, neon::gemv::q4_k;
        "gemv_q4_k_q8_scalar", Q4_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_k_q8_avx512vnni", Q5_K, Q8, Avx512Vnni, avx512vnni::gemv_q5_k::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_k_q8_avx2", Q5_K, Q8, Avx2, avx2::gemv_q5_k::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q5_k_q8_neon_dotprod", Q5_K, Q8, NeonDotprod, neon_dotprod::gemv::q5_k;
        #[cfg(target_arch = "aarch64")]
        "gemv_q5_k_q8_neon", Q5_K, Q8, Neon, neon::gemv::q5_k;
        "gemv_q5_k_q8_scalar", Q5_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q6_k_q8_avx512vnni", Q6_K, Q8, Avx512Vnni, avx512vnni::gemv_q6_k::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_q6_k_q8_avx2", Q6_K, Q8, Avx2, avx2::gemv_q6_k::gemv;
        #[cfg(target_arch = "aarch64")]
        "gemv_q6_k_q8_neon_dotprod", Q6_K, Q8, NeonDotprod, neon_dotprod::gemv::q6_k;
        #[cfg(target_arch = "aarch64")]
        "gemv_q6_k_q8_neon", Q6_K, Q8, Neon, neon::gemv::q6_k;
        "gemv_q6_k_q8_scalar", Q6_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ6K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q5_1_q8_avx2", Q5_1, Q8, Avx2, avx2::gemv_unpacked::q5_1::gemv;
        "gemv_q5_1_q8_scalar", Q5_1, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5_1>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q2_k_q8_avx2", Q2_K, Q8, Avx2, avx2::gemv_unpacked::q2_k::gemv;
        "gemv_q2_k_q8_scalar", Q2_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ2K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_q3_k_q8_avx2", Q3_K, Q8, Avx2, avx2::gemv_unpacked::q3_k::gemv;
        "gemv_q3_k_q8_scalar", Q3_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ3K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_iq4_nl_q8_avx2", IQ4_NL, Q8, Avx2, avx2::gemv_unpacked::iq4_nl::gemv;
        "gemv_iq4_nl_q8_scalar", IQ4_NL, Q8, Scalar, scalar::gemv::q8::<quant::BlockIQ4NL>;
        #[cfg(target_arch = "x86_64")]
        "gemv_iq4_xs_q8_avx2", IQ4_XS, Q8, Avx2, avx2::gemv_unpacked::iq4_xs::gemv;
        "gemv_iq4_xs_q8_scalar", IQ4_XS, Q8, Scalar, scalar::gemv::q8::<quant::BlockIQ4XS>;
        "gemv_tq1_0_q8_scalar", TQ1_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockTQ1_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_tq2_0_q8_avx2", TQ2_0, Q8, Avx2, avx2::gemv_unpacked::tq2_0::gemv;
        "gemv_tq2_0_q8_scalar", TQ2_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockTQ2_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_mxfp4_q8_avx2", MXFP4, Q8, Avx2, avx2::gemv_unpacked::mxfp4::gemv;
        "gemv_mxfp4_q8_scalar", MXFP4, Q8, Scalar, scalar::gemv::q8::<quant::BlockMXFP4>;
    }
}

matmuls! {
    /// One token, or a few, over panels.
    GEMV_PANELS of Panels {
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_0_q8_avx512vnni", Q4_0, Q8, Avx512Vnni, avx512vnni::panels::q4_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_0_q8_avx2", Q4_0, Q8, Avx2, avx2::panels::q4_0::gemv;
        "gemv_panels_q4_0_q8_scalar", Q4_0, Q8, Scalar, scalar::panels::q8::<quant::BlockQ4_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_1_q8_avx512vnni", Q4_1, Q8, Avx512Vnni, avx512vnni::panels::q4_1::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_1_q8_avx2", Q4_1, Q8, Avx2, avx2::panels::q4_1::gemv;
        "gemv_panels_q4_1_q8_scalar", Q4_1, Q8, Scalar, scalar::panels::q8::<quant::BlockQ4_1>;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q5_0_q8_avx512vnni", Q5_0, Q8, Avx512Vnni, avx512vnni::panels::q5_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q5_0_q8_avx2", Q5_0, Q8, Avx2, avx2::panels::q5_0::gemv;
        "gemv_panels_q5_0_q8_scalar", Q5_0, Q8, Scalar, scalar::panels::q8::<quant::BlockQ5_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q8_0_q8_avx512vnni", Q8_0, Q8, Avx512Vnni, avx512vnni::panels::q8_0::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q8_0_q8_avx2", Q8_0, Q8, Avx2, avx2::panels::q8_0::gemv;
        "gemv_panels_q8_0_q8_scalar", Q8_0, Q8, Scalar, scalar::panels::q8::<quant::BlockQ8_0>;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_k_q8_avx512vnni", Q4_K, Q8, Avx512Vnni, avx512vnni::panels::q4_k::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q4_k_q8_avx2", Q4_K, Q8, Avx2, avx2::panels::q4_k::gemv;
        "gemv_panels_q4_k_q8_scalar", Q4_K, Q8, Scalar, scalar::panels::q8::<quant::BlockQ4K>;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q6_k_q8_avx512vnni", Q6_K, Q8, Avx512Vnni, avx512vnni::panels::q6_k::gemv;
        #[cfg(target_arch = "x86_64")]
        "gemv_panels_q6_k_q8_avx2", Q6_K, Q8, Avx2, avx2::panels::q6_k::gemv;
        "gemv_panels_q6_k_q8_scalar", Q6_K, Q8, Scalar, scalar::panels::q8::<quant::BlockQ6K>;
    }
}

matmuls! {
    /// Many tokens: each tile of weights is unpacked once and used for all of them.
    GEMM of Rows {
        #[cfg(target_arch = "x86_64")]
        "gemm_f16_f32_avx512vnni", F16, F32, Avx512Vnni, avx512vnni::gemm_float::f16;
        #[cfg(target_arch = "x86_64")]
        "gemm_f16_f32_avx2", F16, F32, Avx2, avx2::gemm_float::f16;
        "gemm_f16_f32_scalar", F16, F32, Scalar, scalar::gemv::f32::<quant::BlockF16>;
        #[cfg(target_arch = "x86_64")]
        "gemm_bf16_f32_avx512vnni", BF16, F32, Avx512Vnni, avx512vnni::gemm_float::bf16;
        #[cfg(target_arch = "x86_64")]
        "gemm_bf16_f32_avx2", BF16, F32, Avx2, avx2::gemm_float::bf16;
        "gemm_bf16_f32_scalar", BF16, F32, Scalar, scalar::gemv::f32::<quant::BlockBF16>;
        #[cfg(target_arch = "x86_64")]
        "gemm_f32_f32_avx512vnni", F32, F32, Avx512Vnni, avx512vnni::gemm_float::f32;
        #[cfg(target_arch = "x86_64")]
        "gemm_f32_f32_avx2", F32, F32, Avx2, avx2::gemm_float::f32;
        "gemm_f32_f32_scalar", F32, F32, Scalar, scalar::gemv::f32::<quant::BlockF32>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_0_q8_avx512vnni", Q4_0, Q8, Avx512Vnni, avx512vnni::gemm_q4_0::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_0_q8_avx2", Q4_0, Q8, Avx2, avx2::gemm_q4_0::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q4_0_q8_neon_dotprod", Q4_0, Q8, NeonDotprod, neon_dotprod::gemm::q4_0;
        "gemm_q4_0_q8_scalar", Q4_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4_0>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_1_q8_avx512vnni", Q4_1, Q8, Avx512Vnni, avx512vnni::gemm_q4_1::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_1_q8_avx2", Q4_1, Q8, Avx2, avx2::gemm_q4_1::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q4_1_q8_neon_dotprod", Q4_1, Q8, NeonDotprod, neon_dotprod::gemm::q4_1;
        "gemm_q4_1_q8_scalar", Q4_1, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4_1>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_0_q8_avx512vnni", Q5_0, Q8, Avx512Vnni, avx512vnni::gemm_q5_0::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_0_q8_avx2", Q5_0, Q8, Avx2, avx2::gemm_q5_0::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q5_0_q8_neon_dotprod", Q5_0, Q8, NeonDotprod, neon_dotprod::gemm::q5_0;
        "gemm_q5_0_q8_scalar", Q5_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5_0>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q8_0_q8_avx512vnni", Q8_0, Q8, Avx512Vnni, avx512vnni::gemm_q8_0::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q8_0_q8_avx2", Q8_0, Q8, Avx2, avx2::gemm_q8_0::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q8_0_q8_neon_dotprod", Q8_0, Q8, NeonDotprod, neon_dotprod::gemm::q8_0;
        "gemm_q8_0_q8_scalar", Q8_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ8_0>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_k_q8_avx512vnni", Q4_K, Q8, Avx512Vnni, avx512vnni::gemm_q4_k::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_k_q8_avx2", Q4_K, Q8, Avx2, avx2::gemm_q4_k::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q4_k_q8_neon_dotprod", Q4_K, Q8, NeonDotprod, neon_dotprod::gemm::q4_k;
        "gemm_q4_k_q8_scalar", Q4_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ4K>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_k_q8_avx512vnni", Q5_K, Q8, Avx512Vnni, avx512vnni::gemm_q5_k::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_k_q8_avx2", Q5_K, Q8, Avx2, avx2::gemm_q5_k::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q5_k_q8_neon_dotprod", Q5_K, Q8, NeonDotprod, neon_dotprod::gemm::q5_k;
        "gemm_q5_k_q8_scalar", Q5_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5K>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q6_k_q8_avx512vnni", Q6_K, Q8, Avx512Vnni, avx512vnni::gemm_q6_k::gemm;
        #[cfg(target_arch = "x86_64")]
        "gemm_q6_k_q8_avx2", Q6_K, Q8, Avx2, avx2::gemm_q6_k::gemm;
        #[cfg(target_arch = "aarch64")]
        "gemm_q6_k_q8_neon_dotprod", Q6_K, Q8, NeonDotprod, neon_dotprod::gemm::q6_k;
        "gemm_q6_k_q8_scalar", Q6_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ6K>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_1_q8_avx512vnni", Q5_1, Q8, Avx512Vnni, avx512vnni::gemm::q5_1;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_1_q8_avx2", Q5_1, Q8, Avx2, avx2::gemm::q5_1;
        "gemm_q5_1_q8_scalar", Q5_1, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ5_1>;
        "gemm_q2_k_q8_scalar", Q2_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ2K>;
        #[cfg(target_arch = "x86_64")]
        "gemm_q3_k_q8_avx512vnni", Q3_K, Q8, Avx512Vnni, avx512vnni::gemm::q3_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_q3_k_q8_avx2", Q3_K, Q8, Avx2, avx2::gemm::q3_k;
        "gemm_q3_k_q8_scalar", Q3_K, Q8, Scalar, scalar::gemv::q8::<quant::BlockQ3K>;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_nl_q8_avx512vnni", IQ4_NL, Q8, Avx512Vnni, avx512vnni::gemm::iq4_nl;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_nl_q8_avx2", IQ4_NL, Q8, Avx2, avx2::gemm::iq4_nl;
        "gemm_iq4_nl_q8_scalar", IQ4_NL, Q8, Scalar, scalar::gemv::q8::<quant::BlockIQ4NL>;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_xs_q8_avx512vnni", IQ4_XS, Q8, Avx512Vnni, avx512vnni::gemm::iq4_xs;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_xs_q8_avx2", IQ4_XS, Q8, Avx2, avx2::gemm::iq4_xs;
        "gemm_iq4_xs_q8_scalar", IQ4_XS, Q8, Scalar, scalar::gemv::q8::<quant::BlockIQ4XS>;
        "gemm_tq1_0_q8_scalar", TQ1_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockTQ1_0>;
        #[cfg(target_arch = "x86_64")]
        "gemm_tq2_0_q8_avx512vnni", TQ2_0, Q8, Avx512Vnni, avx512vnni::gemm::tq2_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_tq2_0_q8_avx2", TQ2_0, Q8, Avx2, avx2::gemm::tq2_0;
        "gemm_tq2_0_q8_scalar", TQ2_0, Q8, Scalar, scalar::gemv::q8::<quant::BlockTQ2_0>;
        #[cfg(target_arch = "x86_64")]
        "gemm_mxfp4_q8_avx512vnni", MXFP4, Q8, Avx512Vnni, avx512vnni::gemm::mxfp4;
        #[cfg(target_arch = "x86_64")]
        "gemm_mxfp4_q8_avx2", MXFP4, Q8, Avx2, avx2::gemm::mxfp4;
        "gemm_mxfp4_q8_scalar", MXFP4, Q8, Scalar, scalar::gemv::q8::<quant::BlockMXFP4>;
    }
}

matmuls! {
    /// Many tokens on a matrix unit; rows of a multiple of 32 weights. F16 and F32 weights hold more than bf16 keeps.
    TILES of Rows {
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_0_bf16_amx", Q4_0, Bf16, Amx, amx::gemm::q4_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_1_bf16_amx", Q4_1, Bf16, Amx, amx::gemm::q4_1;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_0_bf16_amx", Q5_0, Bf16, Amx, amx::gemm::q5_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_q8_0_bf16_amx", Q8_0, Bf16, Amx, amx::gemm::q8_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_q4_k_bf16_amx", Q4_K, Bf16, Amx, amx::gemm::q4_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_k_bf16_amx", Q5_K, Bf16, Amx, amx::gemm::q5_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_q6_k_bf16_amx", Q6_K, Bf16, Amx, amx::gemm::q6_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_bf16_bf16_amx", BF16, Bf16, Amx, amx::gemm::bf16;
        #[cfg(target_arch = "x86_64")]
        "gemm_q5_1_bf16_amx", Q5_1, Bf16, Amx, amx::gemm::q5_1;
        #[cfg(target_arch = "x86_64")]
        "gemm_q2_k_bf16_amx", Q2_K, Bf16, Amx, amx::gemm::q2_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_q3_k_bf16_amx", Q3_K, Bf16, Amx, amx::gemm::q3_k;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_nl_bf16_amx", IQ4_NL, Bf16, Amx, amx::gemm::iq4_nl;
        #[cfg(target_arch = "x86_64")]
        "gemm_iq4_xs_bf16_amx", IQ4_XS, Bf16, Amx, amx::gemm::iq4_xs;
        #[cfg(target_arch = "x86_64")]
        "gemm_tq1_0_bf16_amx", TQ1_0, Bf16, Amx, amx::gemm::tq1_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_tq2_0_bf16_amx", TQ2_0, Bf16, Amx, amx::gemm::tq2_0;
        #[cfg(target_arch = "x86_64")]
        "gemm_mxfp4_bf16_amx", MXFP4, Bf16, Amx, amx::gemm::mxfp4;
    }
}

gateds! {
    /// The two matrices of a gated unit, many tokens on a matrix unit.
    GATED {
        #[cfg(target_arch = "x86_64")]
        "gated_q4_0_bf16_amx", Q4_0, Amx, amx::gemm::gated_q4_0;
        #[cfg(target_arch = "x86_64")]
        "gated_q4_1_bf16_amx", Q4_1, Amx, amx::gemm::gated_q4_1;
        #[cfg(target_arch = "x86_64")]
        "gated_q5_0_bf16_amx", Q5_0, Amx, amx::gemm::gated_q5_0;
        #[cfg(target_arch = "x86_64")]
        "gated_q8_0_bf16_amx", Q8_0, Amx, amx::gemm::gated_q8_0;
        #[cfg(target_arch = "x86_64")]
        "gated_q4_k_bf16_amx", Q4_K, Amx, amx::gemm::gated_q4_k;
        #[cfg(target_arch = "x86_64")]
        "gated_q5_k_bf16_amx", Q5_K, Amx, amx::gemm::gated_q5_k;
        #[cfg(target_arch = "x86_64")]
        "gated_q6_k_bf16_amx", Q6_K, Amx, amx::gemm::gated_q6_k;
        #[cfg(target_arch = "x86_64")]
        "gated_bf16_bf16_amx", BF16, Amx, amx::gemm::gated_bf16;
        #[cfg(target_arch = "x86_64")]
        "gated_q5_1_bf16_amx", Q5_1, Amx, amx::gemm::gated_q5_1;
        #[cfg(target_arch = "x86_64")]
        "gated_q2_k_bf16_amx", Q2_K, Amx, amx::gemm::gated_q2_k;
        #[cfg(target_arch = "x86_64")]
        "gated_q3_k_bf16_amx", Q3_K, Amx, amx::gemm::gated_q3_k;
        #[cfg(target_arch = "x86_64")]
        "gated_iq4_nl_bf16_amx", IQ4_NL, Amx, amx::gemm::gated_iq4_nl;
        #[cfg(target_arch = "x86_64")]
        "gated_iq4_xs_bf16_amx", IQ4_XS, Amx, amx::gemm::gated_iq4_xs;
        #[cfg(target_arch = "x86_64")]
        "gated_tq1_0_bf16_amx", TQ1_0, Amx, amx::gemm::gated_tq1_0;
        #[cfg(target_arch = "x86_64")]
        "gated_tq2_0_bf16_amx", TQ2_0, Amx, amx::gemm::gated_tq2_0;
        #[cfg(target_arch = "x86_64")]
        "gated_mxfp4_bf16_amx", MXFP4, Amx, amx::gemm::gated_mxfp4;
    }
}

pickeds! {
    /// Some rows of a matrix for one token: those of neurons that a gate let through.
    PICKED {
        #[cfg(target_arch = "x86_64")]
        "picked_q4_0_q8_avx512vbmi", Q4_0, Avx512Vbmi, avx512vbmi::gemv_q4_0::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_0_q8_avx512vnni", Q4_0, Avx512Vnni, avx512vnni::gemv_q4_0::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_0_q8_avx2", Q4_0, Avx2, avx2::gemv_q4_0::gemv_picked;
        "picked_q4_0_q8_scalar", Q4_0, Scalar, scalar::gemv::q8_picked::<quant::BlockQ4_0>;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_1_q8_avx512vbmi", Q4_1, Avx512Vbmi, avx512vbmi::gemv_q4_1::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_1_q8_avx512vnni", Q4_1, Avx512Vnni, avx512vnni::gemv_q4_1::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_1_q8_avx2", Q4_1, Avx2, avx2::gemv_q4_1::gemv_picked;
        "picked_q4_1_q8_scalar", Q4_1, Scalar, scalar::gemv::q8_picked::<quant::BlockQ4_1>;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_0_q8_avx512vbmi", Q5_0, Avx512Vbmi, avx512vbmi::gemv_q5_0::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_0_q8_avx512vnni", Q5_0, Avx512Vnni, avx512vnni::gemv_q5_0::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_0_q8_avx2", Q5_0, Avx2, avx2::gemv_q5_0::gemv_picked;
        "picked_q5_0_q8_scalar", Q5_0, Scalar, scalar::gemv::q8_picked::<quant::BlockQ5_0>;
        #[cfg(target_arch = "x86_64")]
        "picked_q8_0_q8_avx512vnni", Q8_0, Avx512Vnni, avx512vnni::gemv_q8_0::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q8_0_q8_avx2", Q8_0, Avx2, avx2::gemv_q8_0::gemv_picked;
        "picked_q8_0_q8_scalar", Q8_0, Scalar, scalar::gemv::q8_picked::<quant::BlockQ8_0>;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_k_q8_avx512vnni", Q4_K, Avx512Vnni, avx512vnni::gemv_q4_k::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q4_k_q8_avx2", Q4_K, Avx2, avx2::gemv_q4_k::gemv_picked;
        "picked_q4_k_q8_scalar", Q4_K, Scalar, scalar::gemv::q8_picked::<quant::BlockQ4K>;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_k_q8_avx512vnni", Q5_K, Avx512Vnni, avx512vnni::gemv_q5_k::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_k_q8_avx2", Q5_K, Avx2, avx2::gemv_q5_k::gemv_picked;
        "picked_q5_k_q8_scalar", Q5_K, Scalar, scalar::gemv::q8_picked::<quant::BlockQ5K>;
        #[cfg(target_arch = "x86_64")]
        "picked_q6_k_q8_avx512vnni", Q6_K, Avx512Vnni, avx512vnni::gemv_q6_k::gemv_picked;
        #[cfg(target_arch = "x86_64")]
        "picked_q6_k_q8_avx2", Q6_K, Avx2, avx2::gemv_q6_k::gemv_picked;
        "picked_q6_k_q8_scalar", Q6_K, Scalar, scalar::gemv::q8_picked::<quant::BlockQ6K>;
        #[cfg(target_arch = "x86_64")]
        "picked_q5_1_q8_avx2", Q5_1, Avx2, avx2::gemv_unpacked::q5_1::gemv_picked;
        "picked_q5_1_q8_scalar", Q5_1, Scalar, scalar::gemv::q8_picked::<quant::BlockQ5_1>;
        #[cfg(target_arch = "x86_64")]
        "picked_q2_k_q8_avx2", Q2_K, Avx2, avx2::gemv_unpacked::q2_k::gemv_picked;
        "picked_q2_k_q8_scalar", Q2_K, Scalar, scalar::gemv::q8_picked::<quant::BlockQ2K>;
        #[cfg(target_arch = "x86_64")]
        "picked_q3_k_q8_avx2", Q3_K, Avx2, avx2::gemv_unpacked::q3_k::gemv_picked;
        "picked_q3_k_q8_scalar", Q3_K, Scalar, scalar::gemv::q8_picked::<quant::BlockQ3K>;
        #[cfg(target_arch = "x86_64")]
        "picked_iq4_nl_q8_avx2", IQ4_NL, Avx2, avx2::gemv_unpacked::iq4_nl::gemv_picked;
        "picked_iq4_nl_q8_scalar", IQ4_NL, Scalar, scalar::gemv::q8_picked::<quant::BlockIQ4NL>;
        #[cfg(target_arch = "x86_64")]
        "picked_iq4_xs_q8_avx2", IQ4_XS, Avx2, avx2::gemv_unpacked::iq4_xs::gemv_picked;
        "picked_iq4_xs_q8_scalar", IQ4_XS, Scalar, scalar::gemv::q8_picked::<quant::BlockIQ4XS>;
        "picked_tq1_0_q8_scalar", TQ1_0, Scalar, scalar::gemv::q8_picked::<quant::BlockTQ1_0>;
        #[cfg(target_arch = "x86_64")]
        "picked_tq2_0_q8_avx2", TQ2_0, Avx2, avx2::gemv_unpacked::tq2_0::gemv_picked;
        "picked_tq2_0_q8_scalar", TQ2_0, Scalar, scalar::gemv::q8_picked::<quant::BlockTQ2_0>;
        #[cfg(target_arch = "x86_64")]
        "picked_mxfp4_q8_avx2", MXFP4, Avx2, avx2::gemv_unpacked::mxfp4::gemv_picked;
        "picked_mxfp4_q8_scalar", MXFP4, Scalar, scalar::gemv::q8_picked::<quant::BlockMXFP4>;
    }
}

rows! {
    /// Activations to tiles of bf16.
    PACK_BF16: PackBf16 {
        #[cfg(target_arch = "x86_64")]
        "pack_bf16_amx", Amx, amx::pack::pack;
        "pack_bf16_scalar", Scalar, scalar::elementwise::pack_bf16;
    }
}
rows! {
    /// Activations to 8 bits.
    QUANTIZE: Quantize {
        #[cfg(target_arch = "x86_64")]
        "quantize_q8_avx512vnni", Avx512Vnni, avx512vnni::elementwise::quantize;
        #[cfg(target_arch = "x86_64")]
        "quantize_q8_avx2", Avx2, avx2::elementwise::quantize;
        #[cfg(target_arch = "aarch64")]
        "quantize_q8_neon", Neon, neon::elementwise::quantize;
        "quantize_q8_scalar", Scalar, scalar::elementwise::quantize;
    }
}
rows! {
    /// RMS norm of one row.
    RMS_NORM: RmsNorm {
        #[cfg(target_arch = "x86_64")]
        "rms_norm_avx512vnni", Avx512Vnni, avx512vnni::elementwise::rms_norm;
        #[cfg(target_arch = "x86_64")]
        "rms_norm_avx2", Avx2, avx2::elementwise::rms_norm;
        "rms_norm_scalar", Scalar, scalar::elementwise::rms_norm;
    }
}
rows! {
    /// Rotary embedding of one head, NeoX pairs.
    ROPE_HALVES: RopeHalves {
        #[cfg(target_arch = "x86_64")]
        "rope_halves_avx512vnni", Avx512Vnni, avx512vnni::elementwise::rope_halves;
        #[cfg(target_arch = "x86_64")]
        "rope_halves_avx2", Avx2, avx2::elementwise::rope_halves;
        "rope_halves_scalar", Scalar, scalar::elementwise::rope_halves;
    }
}
rows! {
    /// Rotary embedding of one head, adjacent pairs.
    ROPE_NEIGHBOURS: RopeNeighbours {
        #[cfg(target_arch = "x86_64")]
        "rope_neighbours_avx512vnni", Avx512Vnni, avx512vnni::elementwise::rope_neighbours;
        #[cfg(target_arch = "x86_64")]
        "rope_neighbours_avx2", Avx2, avx2::elementwise::rope_neighbours;
        "rope_neighbours_scalar", Scalar, scalar::elementwise::rope_neighbours;
    }
}
rows! {
    /// Gated unit.
    GLU: Glu {
        #[cfg(target_arch = "x86_64")]
        "glu_avx512vnni", Avx512Vnni, avx512vnni::elementwise::glu;
        #[cfg(target_arch = "x86_64")]
        "glu_avx2", Avx2, avx2::elementwise::glu;
        #[cfg(target_arch = "aarch64")]
        "glu_neon", Neon, neon::elementwise::glu;
        "glu_scalar", Scalar, scalar::elementwise::glu;
    }
}
rows! {
    /// Residual sum.
    ADD: Add {
        #[cfg(target_arch = "x86_64")]
        "add_avx512vnni", Avx512Vnni, avx512vnni::elementwise::add;
        #[cfg(target_arch = "x86_64")]
        "add_avx2", Avx2, avx2::elementwise::add;
        "add_scalar", Scalar, scalar::elementwise::add;
    }
}
rows! {
    /// Weights of a draw.
    WEIGH: Weigh {
        #[cfg(target_arch = "x86_64")]
        "weigh_avx512vnni", Avx512Vnni, avx512vnni::elementwise::weigh;
        #[cfg(target_arch = "x86_64")]
        "weigh_avx2", Avx2, avx2::elementwise::weigh;
        "weigh_scalar", Scalar, logits::weigh;
    }
}
rows! {
    /// The largest logit.
    LARGEST: LargestOf {
        #[cfg(target_arch = "x86_64")]
        "largest_avx512vnni", Avx512Vnni, avx512vnni::elementwise::largest;
        #[cfg(target_arch = "x86_64")]
        "largest_avx2", Avx2, avx2::elementwise::largest;
        "largest_scalar", Scalar, logits::largest;
    }
}
rows! {
    /// Ranks of chunks.
    RANK: Rank {
        #[cfg(target_arch = "x86_64")]
        "rank_avx512vnni", Avx512Vnni, avx512vnni::elementwise::rank;
        #[cfg(target_arch = "x86_64")]
        "rank_avx2", Avx2, avx2::elementwise::rank;
        "rank_scalar", Scalar, ranking::rank;
    }
}
rows! {
    /// What chunks rank so high, and what do not.
    DIVIDE: Divide {
        #[cfg(target_arch = "x86_64")]
        "divide_avx512vnni", Avx512Vnni, avx512vnni::elementwise::divide;
        #[cfg(target_arch = "x86_64")]
        "divide_avx2", Avx2, avx2::elementwise::divide;
        "divide_scalar", Scalar, ranking::divide;
    }
}
rows! {
    /// Which chunks rank so high.
    MARK: Mark {
        #[cfg(target_arch = "x86_64")]
        "mark_avx512vnni", Avx512Vnni, avx512vnni::elementwise::mark;
        #[cfg(target_arch = "x86_64")]
        "mark_avx2", Avx2, avx2::elementwise::mark;
        "mark_scalar", Scalar, ranking::mark;
    }
}
rows! {
    /// Half floats for the cache.
    TO_F16: ToF16 {
        #[cfg(target_arch = "x86_64")]
        "to_f16_avx512vnni", Avx512Vnni, avx512vnni::elementwise::to_f16;
        #[cfg(target_arch = "x86_64")]
        "to_f16_avx2", Avx2, avx2::elementwise::to_f16;
        #[cfg(target_arch = "aarch64")]
        "to_f16_neon", Neon, neon::elementwise::to_f16;
        "to_f16_scalar", Scalar, scalar::elementwise::to_f16;
    }
}
rows! {
    /// Gated short convolution.
    SHORT_CONV: ShortConv {
        #[cfg(target_arch = "x86_64")]
        "short_conv_avx512vnni", Avx512Vnni, avx512vnni::elementwise::short_conv;
        #[cfg(target_arch = "x86_64")]
        "short_conv_avx2", Avx2, avx2::elementwise::short_conv;
        "short_conv_scalar", Scalar, scalar::short_conv::short_conv;
    }
}
rows! {
    /// Attention over keys and values of any type.
    ATTEND: Attend {
        #[cfg(target_arch = "x86_64")]
        "attend_avx512vnni", Avx512Vnni, avx512vnni::attend::attend;
        #[cfg(target_arch = "x86_64")]
        "attend_avx2", Avx2, avx2::attend::attend;
        #[cfg(target_arch = "aarch64")]
        "attend_neon", Neon, neon::attend::attend;
        "attend_scalar", Scalar, scalar::attend::attend;
    }
}
rows! {
    /// Attention of a batch on a matrix unit, heads of a multiple of 64.
    ATTEND_TILES: AttendTokens {
        #[cfg(target_arch = "x86_64")]
        "attend_bf16_amx", Amx, amx::attend::attend;
    }
}
rows! {
    /// Attention of a batch with queries in the lanes.
    ATTEND_LANES: AttendLanes {
        #[cfg(target_arch = "x86_64")]
        "attend_lanes_avx512vnni", Avx512Vnni, avx512vnni::attend_lanes::attend;
        #[cfg(target_arch = "x86_64")]
        "attend_lanes_avx2", Avx2, avx2::attend_lanes::attend;
        "attend_lanes_scalar", Scalar, scalar::attend_lanes::attend;
    }
}
rows! {
    /// Products of queries with turned rows.
    MULTIPLY_PANELS: MultiplyPanels {
        #[cfg(target_arch = "x86_64")]
        "multiply_panels_avx512vnni", Avx512Vnni, avx512vnni::multiply_panels::multiply;
        #[cfg(target_arch = "x86_64")]
        "multiply_panels_avx2", Avx2, avx2::multiply_panels::multiply;
        "multiply_panels_scalar", Scalar, scalar::multiply_panels::multiply;
    }
}
rows! {
    /// Memory at full speed.
    READ: Read {
        #[cfg(target_arch = "x86_64")]
        "read_stream_avx512vnni", Avx512Vnni, avx512vnni::roofline::read_stream;
        #[cfg(target_arch = "x86_64")]
        "read_streams_avx512vnni", Avx512Vnni, avx512vnni::roofline::read_streams;
        #[cfg(target_arch = "x86_64")]
        "read_stream_avx2", Avx2, avx2::roofline::read_stream;
        #[cfg(target_arch = "x86_64")]
        "read_streams_avx2", Avx2, avx2::roofline::read_streams;
        "read_stream_scalar", Scalar, scalar::roofline::read_stream;
        "read_streams_scalar", Scalar, scalar::roofline::read_streams;
    }
}
rows! {
    /// Products of bytes at full speed.
    PRODUCTS_I8: ProductsI8 {
        #[cfg(target_arch = "x86_64")]
        "products_i8_amx", Amx, amx::roofline::products_i8;
        #[cfg(target_arch = "x86_64")]
        "products_i8_avx512vnni", Avx512Vnni, avx512vnni::roofline::products_i8;
        #[cfg(target_arch = "x86_64")]
        "products_i8_avx2", Avx2, avx2::roofline::products_i8;
        #[cfg(target_arch = "aarch64")]
        "products_i8_neon_dotprod", NeonDotprod, neon_dotprod::roofline::products_i8;
        "products_i8_scalar", Scalar, scalar::roofline::products_i8;
    }
}
rows! {
    /// Products of bf16 at full speed.
    PRODUCTS_BF16: ProductsBf16 {
        #[cfg(target_arch = "x86_64")]
        "products_bf16_amx", Amx, amx::roofline::products_bf16;
        "products_bf16_scalar", Scalar, scalar::roofline::products_bf16;
    }
}
rows! {
    /// Products of floats at full speed.
    PRODUCTS_F32: ProductsF32 {
        #[cfg(target_arch = "x86_64")]
        "products_f32_avx512vnni", Avx512Vnni, avx512vnni::roofline::products_f32;
        #[cfg(target_arch = "x86_64")]
        "products_f32_avx2", Avx2, avx2::roofline::products_f32;
        #[cfg(target_arch = "aarch64")]
        "products_f32_neon", Neon, neon::roofline::products_f32;
        "products_f32_scalar", Scalar, scalar::roofline::products_f32;
    }
}
