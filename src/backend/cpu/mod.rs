//! The CPU backend: runs each operation at once, on the pool, with kernels from the table.

pub mod acts;
#[cfg(target_arch = "x86_64")]
mod amx;
pub(super) mod attention;
pub(super) mod attention_lanes;
pub(super) mod attention_noted;
pub(super) mod attention_selected;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512vbmi;
#[cfg(target_arch = "x86_64")]
mod avx512vnni;
pub mod isa;
pub mod logits;
pub(super) mod moe;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neon_dotprod;
mod pace;
pub(super) mod pages;
pub mod panels;
pub mod pool;
pub mod ranking;
pub mod residency;
pub mod roofline;
mod scalar;
pub(super) mod scratch;
pub mod stored;
pub mod table;
mod top;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::time::Duration;

use self::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8Row, Q8RowMut, Tile, bf16_floats, q8_floats};
use self::attention::KvCache;
use self::attention_lanes::Lanes;
use self::attention_selected::Plans;
use self::isa::Isa;
use self::pages::Pages;
use self::panels::{Copies, Panels};
use self::pool::{Output, Pool};
use self::residency::{Place, Residency};
use self::scratch::{Buffer, Scratch};
use self::stored::{Named, StoredExperts};
use self::table::{ActFormat, Gated, GatedRows, MatMul, Operations, Picked, Ready, ShortConvRows};
use self::top::Top;
use super::select::KvOptions;
use super::{
    Activation, Attention, Backend, GatedFfn, Linear, LinearOf, Lost, Moe, Rope, RopePairs, Runs,
    Step,
};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::profile::Work;
use crate::quant::{self, Bytes, DType, Tensor as FileTensor};

/// The CPU: a pool of threads, the kernels of this machine, scratch memory.
pub struct Cpu {
    /// Of the pass that runs.
    pool: Arc<Pool>,
    decode_pool: Arc<Pool>,
    prefill_pool: Arc<Pool>,
    residency: Arc<Residency>,
    experts: Option<Arc<StoredExperts>>,
    /// The experts of the layer that was routed last.
    named: Option<(usize, Named)>,
    operations: Operations,
    /// Where matrices are packed for decoding.
    copies: Option<Arc<Copies>>,
    plans: Plans,
    scratch: Scratch,
    /// For keys and values.
    pages: Arc<Pages>,
    top: Top,
    cancel: Cancel,
    work: Work,
    /// Whose kernels are used.
    step: Step,
}

/// Weights that lie in the mapped file.
pub struct Matrix {
    data: Bytes,
    dtype: DType,
    n_in: usize,
    n_out: usize,
    row_bytes: usize,
    kernels: Kernels,
    panels: Option<Panels>,
    place: Place,
    /// Of experts that are read when they are named: their layer in the store. The file is not read by way of the map then.
    stored: Option<usize>,
}

/// The kernels of a matrix, chosen when it is loaded.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    dtype: DType,
    gemv: Ready<MatMul>,
    picked: Option<Ready<Picked>>,
    gemm: Ready<MatMul>,
    tiles: Option<Ready<MatMul>>,
    gated: Option<Ready<Gated>>,
}

/// Activations, `(n_tokens, n_cols)`.
pub struct Tensor {
    data: Buffer,
    n_tokens: usize,
    n_cols: usize,
}

/// What a short convolution remembers: the `n_rows` that it reads, before them some more, by which it can be rewound.
pub struct ConvState {
    /// `(n_held, n_channels)`, oldest first. New rows are appended; where the room ends, the newest move to the front.
    u: Vec<f32>,
    n_rows: usize,
    n_channels: usize,
}

/// Tokens that a convolution can take back: those of a rejected draft. A longer way back is rebuilt.
const REWIND: usize = 16;

/// Floats of the memory of a convolution that reads `n_rows`.
pub(super) fn conv_floats(n_rows: usize, n_channels: usize) -> usize {
    (n_rows + 2 * REWIND) * n_channels
}

/// Weight bytes that a task of a decode step reads at most: long streams for the memory, an end that is not waited for.
const TASK_BYTES: usize = 256 << 10;

/// Rows of weights that a task of a prefill step reads at most.
const MAX_TASK_ROWS: usize = 256;

/// Rows whose logits are wanted below which unpacking weights costs more than reading them again.
const FEW: usize = 4;

/// Rows of a batch that are worth a region of their own for elementwise work.
const PARALLEL_ROWS: usize = 8;

impl Cpu {
    /// Rows of `q` at positions `start..`, to every key they see.
    fn attend_dense(
        &mut self,
        kv: &KvCache,
        attention: &Attention,
        start: usize,
        q: &[f32],
        out: &mut [f32],
    ) {
        let n_cols = attention.n_heads * attention.head_dim;
        let (kinds, positions) = (kv.kinds(), start..start + q.len() / n_cols);
        let lanes = Lanes::new(
            &self.operations,
            attention.head_dim,
            kinds,
            self.step,
            kv.delta(),
        );
        if let Some(lanes) = lanes {
            return self.attend_lanes(kv, attention, (lanes, start), q, out);
        }
        self.work += attention::work(attention, kinds, positions.clone());
        // Tasks of one token take nothing.
        if self.step == Step::Prefill {
            let (operations, n_threads) = (&self.operations, self.pool.n_threads());
            let runs = attention::scratch(
                operations, attention, kinds, self.step, positions, n_threads,
            );
            runs.into_iter().for_each(|lens| self.scratch.reserve(lens));
        }
        let attend = self.attend(kv, attention, start);
        if let Some(kernel) = attend.tiles(self.step) {
            attend.many_in_tiles(&self.pool, kernel, q, out);
        } else if attend.decode {
            // One, or a replay of some that came one by one.
            let rows = q.chunks_exact(n_cols).zip(out.chunks_exact_mut(n_cols));
            for (i, (q, out)) in rows.enumerate() {
                attend.one(&self.pool, start + i, q, out);
            }
        } else {
            attend.many(&self.pool, q, out);
        }
    }
}

impl Cpu {
    /// A backend on `pool` with the best kernels of this machine. Its weights stay in memory.
    pub fn new(pool: Arc<Pool>) -> Self {
        let residency = Arc::new(Residency::unlimited());
        Self::within([Arc::clone(&pool), pool], residency, None)
    }

    /// The same with a pool for decoding and one for prompts, with weights of which as many stay as `residency` says,
    /// and with experts of which some are in the slots of a store.
    pub fn within(
        [decode_pool, prefill_pool]: [Arc<Pool>; 2],
        residency: Arc<Residency>,
        experts: Option<Arc<StoredExperts>>,
    ) -> Self {
        Self {
            pool: Arc::clone(&prefill_pool),
            decode_pool,
            prefill_pool,
            residency,
            experts,
            named: None,
            operations: Operations::best(),
            copies: None,
            scratch: Scratch::default(),
            pages: Arc::default(),
            top: Top::default(),
            plans: Plans::default(),
            cancel: Cancel::default(),
            work: Work::default(),
            step: Step::Prefill,
        }
    }

    /// The same that asks `copies` for each matrix that decoding takes whole. They are to be made before the first pass.
    pub fn repacking(self, copies: Option<Arc<Copies>>) -> Self {
        Self { copies, ..self }
    }

    /// The kernels of the operations without weights.
    pub fn operations(&self) -> &Operations {
        &self.operations
    }

    /// What an operation returns. Each takes it first and outside of regions, so here a pass may end.
    fn tensor(&self, n_tokens: usize, n_cols: usize) -> Tensor {
        if let Err(cancelled) = self.cancel.check() {
            resume_unwind(Box::new(Lost(cancelled)));
        }
        Tensor {
            data: self.scratch.take(n_tokens * n_cols),
            n_tokens,
            n_cols,
        }
    }

    /// Calls `row` with each row of `out` and its index, in parallel where that pays.
    fn for_rows(&self, out: &mut Tensor, row: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        let n = out.n_cols;
        if out.n_tokens < PARALLEL_ROWS {
            return out
                .data
                .chunks_exact_mut(n)
                .enumerate()
                .for_each(|(i, out)| row(i, out));
        }
        let rows = out.n_tokens.div_ceil(4 * self.pool.n_threads());
        self.pool.run_pieces(&mut out.data, rows * n, &|i, piece| {
            piece
                .chunks_exact_mut(n)
                .enumerate()
                .for_each(|(j, out)| row(i * rows + j, out));
        });
    }

    /// Quantizes `n` rows of `n_in`.
    fn quantize<'x>(
        &self,
        n: usize,
        n_in: usize,
        row: &(dyn Fn(usize) -> &'x [f32] + Sync),
    ) -> Buffer {
        let row_bytes = Q8Row::bytes(n_in);
        let mut rows = self.scratch.take(q8_floats(n, n_in));
        let quantize = |i: usize, bytes: &mut [u8]| {
            let mut quantized = Q8RowMut::new(bytes, n_in);
            self.operations.quantize.run(row(i), &mut quantized);
        };
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut rows);
        if n < PARALLEL_ROWS {
            bytes
                .chunks_exact_mut(row_bytes)
                .enumerate()
                .for_each(|(i, bytes)| quantize(i, bytes));
        } else {
            self.pool.run_pieces(bytes, row_bytes, &quantize);
        }
        rows
    }

    fn pack(&self, x: &Tensor) -> Buffer {
        let n_k = x.n_cols / BF16_LEN;
        let mut groups = self.scratch.take(bf16_floats(x.n_tokens, x.n_cols));
        self.pool
            .run_pieces(bytemuck::cast_slice_mut(&mut groups), n_k, &|i, group| {
                let first = i * BF16_TOKENS * x.n_cols;
                let len = (BF16_TOKENS * x.n_cols).min(x.data.len() - first);
                let rows = &x.data[first..first + len];
                self.operations.pack_bf16.run(rows, x.n_cols, group);
            });
        groups
    }

    fn count(&mut self, weight: &Matrix, n_tokens: usize) {
        self.work.weight_bytes += weight.data.len() as u64;
        self.work.matmul_ops += 2 * (weight.n_in * weight.n_out * n_tokens) as u64;
    }

    /// The products of activations, in the formats that the kernels ask for, with the weights of some layers.
    fn products<const N: usize>(&mut self, acts: &Acts, layers: [&Linear<Self>; N]) -> [Tensor; N] {
        for layer in layers {
            self.count(&layer.weight, acts.n_tokens);
        }
        // Tasks cut where panels end, which they do only if the matrices beside them are of whole ones too.
        let in_panels = self.step == Step::Decode
            && layers
                .iter()
                .all(|layer| layer.weight.n_out.is_multiple_of(panels::ROWS));
        let step = self.step;
        let mut outs = layers.map(|l| self.tensor(acts.n_tokens, l.weight.n_out));
        let n_rows: usize = layers.iter().map(|l| l.weight.n_out).sum();
        let grain = if acts.n_tokens == 1 {
            // Two tasks a thread even out its speed; with four or more the streams get short: 4 to 15 % slower.
            let bytes = layers
                .iter()
                .map(|l| l.weight.row_bytes)
                .max()
                .expect("at least one layer");
            (TASK_BYTES / bytes)
                .min(n_rows / (2 * self.pool.n_threads()))
                .max(1)
                .next_multiple_of(if in_panels { panels::ROWS } else { 8 })
        } else {
            // Whole pairs of panels of the GEMM kernels; a few tasks a thread, for each reads all activations.
            (n_rows / (4 * self.pool.n_threads()))
                .clamp(32, MAX_TASK_ROWS)
                .next_multiple_of(32)
        };
        prefetch_after(&layers.map(|l| &l.weight));
        let mut outputs = outs
            .each_mut()
            .map(|out| Output::new(&mut out.data, out.n_cols));
        self.pool.run_columns(&mut outputs, grain, &|mut tile| {
            let layer = layers[tile.which];
            let cols = tile.first_col..tile.first_col + tile.out.n_cols();
            let weight = &layer.weight;
            match weight.panels.as_ref().filter(|_| in_panels) {
                Some(panels) => panels.multiply(acts, cols.clone(), &mut tile.out),
                None => weight.read(cols.clone(), |rows| {
                    weight.kernels.of(step).run(rows, acts, &mut tile.out);
                }),
            }
            if let Some(bias) = &layer.bias {
                for t in 0..tile.out.n_tokens() {
                    self.operations
                        .add
                        .run(tile.out.row(t), &bias[cols.clone()]);
                }
            }
        });
        outs
    }
}

impl Kernels {
    /// Those for `n_out` rows of `n_in` weights in `dtype`.
    ///
    /// # Errors
    /// If there are none; `name` is whose they would be.
    pub(super) fn new(dtype: DType, n_in: usize, n_out: usize, name: &str) -> Result<Self> {
        let gemv = table::gemv(dtype).ok_or_else(|| Error::Unsupported {
            kind: "tensor type on the CPU",
            found: format!("{dtype} of {name}"),
            supported: table::formats(),
        })?;
        Ok(Self {
            dtype,
            gemv,
            // All rows at a higher level beat some at a lower one.
            picked: table::picked(dtype).filter(|picked| picked.isa() >= gemv.isa()),
            // A GEMV with vectors beats a GEMM without.
            gemm: table::gemm(dtype)
                .filter(|gemm| gemm.isa() > Isa::Scalar)
                .unwrap_or(gemv),
            tiles: table::tiles(dtype).filter(|_| n_in.is_multiple_of(BF16_LEN)),
            gated: table::gated(dtype).filter(|_| n_out.is_multiple_of(BF16_LEN)),
        })
    }

    pub(super) fn of(&self, step: Step) -> Ready<MatMul> {
        match step {
            Step::Decode => self.gemv,
            Step::Prefill => self.tiles.unwrap_or(self.gemm),
        }
    }
}

/// The kernel that joins the products of a gated unit, gate, up and down, where this step and the formats have one.
pub(super) fn gated<M, V>(
    step: Step,
    layers: [&LinearOf<M, V>; 3],
    kernels: impl Fn(&M) -> &Kernels,
) -> Option<Ready<Gated>> {
    let [gate, up, down] = layers.map(|l| kernels(&l.weight));
    let fits = step == Step::Prefill
        && gate.dtype == up.dtype
        && layers[..2].iter().all(|layer| layer.bias.is_none())
        && gate.tiles.is_some()
        && down.tiles.is_some();
    gate.gated.filter(|_| fits)
}

fn of_matrix(matrix: &Matrix) -> &Kernels {
    &matrix.kernels
}

impl Matrix {
    /// The kernel of a product with all of it.
    fn of(&self, step: Step) -> Ready<MatMul> {
        let panels = self.panels.as_ref().filter(|_| step == Step::Decode);
        panels.map_or(self.kernels.of(step), |panels| panels.gemv())
    }

    /// Calls `with` with the bytes of some rows, which leave memory again if they are streamed.
    #[inline]
    fn read(&self, rows: Range<usize>, with: impl FnOnce(&[u8])) {
        let bytes = rows.start * self.row_bytes..rows.end * self.row_bytes;
        let streamed = self.place.is_streamed();
        if streamed {
            self.data.prefetch(bytes.clone());
        }
        with(&self.data[bytes.clone()]);
        if streamed {
            self.data.release(bytes);
        }
    }
}

/// Asks for the weights that are streamed after these.
fn prefetch_after(weights: &[&Matrix]) {
    let streamed = weights.iter().rfind(|weight| weight.place.is_streamed());
    if let Some(weight) = streamed {
        weight.place.prefetch_next();
    }
}

impl Tensor {
    fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.n_cols..][..self.n_cols]
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Tensor = Tensor;
    type Kv = KvCache;
    type Conv = ConvState;

    fn matrix(&self, tensor: &FileTensor) -> Result<Matrix> {
        let mut matrix = self.table(tensor)?;
        if let Some(copies) = self.copies.as_ref().filter(|_| matrix.stored.is_none()) {
            matrix.panels = Panels::of(tensor, copies);
        }
        Ok(matrix)
    }

    fn table(&self, tensor: &FileTensor) -> Result<Matrix> {
        let dtype = tensor.dtype;
        let kernels = Kernels::new(dtype, tensor.n_in(), tensor.n_out(), &tensor.name)?;
        let row_bytes = dtype.row_bytes(tensor.n_in()).filter(|bytes| *bytes > 0);
        let row_bytes =
            row_bytes.filter(|bytes| bytes.checked_mul(tensor.n_out()) == Some(tensor.data.len()));
        let row_bytes = row_bytes.ok_or_else(|| {
            Error::BadModel(format!(
                "tensor {}: expected {} rows of {} weights, found {} bytes",
                tensor.name,
                tensor.n_out(),
                tensor.n_in(),
                tensor.data.len()
            ))
        })?;
        let stored = self.experts.as_ref();
        let stored = stored.and_then(|experts| experts.layer(&tensor.name));
        let (data, place) = match stored {
            None => self.residency.place(&tensor.name, &tensor.data)?,
            Some(_) => (tensor.data.clone(), self.residency.outside()),
        };
        Ok(Matrix {
            panels: None,
            place,
            stored,
            data,
            dtype,
            n_in: tensor.n_in(),
            n_out: tensor.n_out(),
            row_bytes,
            kernels,
        })
    }

    fn vector(&self, data: Vec<f32>) -> Vec<f32> {
        data
    }

    fn kv(&self, attention: &Attention, options: &KvOptions) -> KvCache {
        KvCache::new(attention, options, &self.pages)
    }

    fn kv_reserve(&self, kv: &mut KvCache, positions: Range<usize>) -> Result<()> {
        kv.reserve(positions)
    }

    fn kv_copy(&self, kv: &KvCache) -> Result<KvCache> {
        Ok(kv.clone())
    }

    fn kv_save(
        &self,
        kv: &KvCache,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        kv.save(n, sink)
    }

    fn kv_load(
        &self,
        kv: &mut KvCache,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        kv.load(n, source)
    }

    fn kv_spare_bytes(&self, bytes: usize) -> usize {
        pages::spare_bytes(bytes)
    }

    fn kv_bytes(&self, kv: &KvCache) -> usize {
        kv.bytes()
    }

    fn conv_bytes(&self, conv: &ConvState) -> usize {
        conv.u.capacity() * size_of::<f32>()
    }

    fn conv(&self, n_rows: usize, n_channels: usize) -> ConvState {
        let mut conv = ConvState {
            u: Vec::with_capacity(conv_floats(n_rows, n_channels)),
            n_rows,
            n_channels,
        };
        self.conv_reset(&mut conv);
        conv
    }

    fn conv_reset(&self, conv: &mut ConvState) {
        conv.u.clear();
        conv.u.resize(conv.n_rows * conv.n_channels, 0.0);
    }

    fn conv_rewind(&self, conv: &mut ConvState, n: usize) -> bool {
        let kept = (conv.u.len() / conv.n_channels).checked_sub(n);
        match kept.filter(|kept| *kept >= conv.n_rows) {
            Some(kept) => conv.u.truncate(kept * conv.n_channels),
            None => return false,
        }
        true
    }

    fn conv_rows(&self, conv: &ConvState, out: &mut Vec<f32>) {
        out.extend_from_slice(conv.rows());
    }

    fn conv_set(&self, conv: &mut ConvState, rows: &[f32]) {
        assert_eq!(
            rows.len(),
            conv.n_rows * conv.n_channels,
            "rows of a convolution"
        );
        conv.u.clear();
        conv.u.extend_from_slice(rows);
    }

    fn set_cancel(&mut self, cancel: &Cancel) {
        self.cancel = cancel.clone();
    }

    fn stopped(&mut self) {
        self.named = None;
    }

    fn begin(&mut self, step: Step) {
        self.step = step;
        self.pool = Arc::clone(match step {
            Step::Decode => &self.decode_pool,
            Step::Prefill => &self.prefill_pool,
        });
        if let Some(experts) = &self.experts {
            experts.store().next_token();
        }
    }

    fn embed(&mut self, table: &Matrix, tokens: &[u32], scale: f32) -> Tensor {
        let mut out = self.tensor(tokens.len(), table.n_in);
        // Before a region, which no error leaves.
        let stride = table.row_bytes.next_multiple_of(64);
        let rows = table.place.table().map(|file| {
            let floats = tokens.len() * stride / size_of::<f32>();
            let mut rows = self.scratch.take(floats);
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut rows);
            for (token, row) in tokens.iter().zip(bytes.chunks_exact_mut(stride)) {
                let at = *token as usize * table.row_bytes;
                stored::read(file.read(at, &mut row[..table.row_bytes]));
            }
            rows
        });
        let rows: Option<&[u8]> = rows.as_deref().map(bytemuck::cast_slice);
        self.for_rows(&mut out, &|i, out| {
            let token = tokens[i] as usize;
            match rows {
                Some(rows) => {
                    let row = &rows[i * stride..][..table.row_bytes];
                    quant::dequantize(table.dtype, row, out);
                }
                None => table.read(token..token + 1, |row| {
                    quant::dequantize(table.dtype, row, out);
                }),
            }
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x *= scale);
            }
        });
        out
    }

    fn import(&mut self, rows: &[f32], n_cols: usize) -> Tensor {
        let mut out = self.tensor(rows.len() / n_cols, n_cols);
        out.data.copy_from_slice(rows);
        out
    }

    fn rms_norm(&mut self, x: &Tensor, gain: &Vec<f32>, eps: f32) -> Tensor {
        let mut out = self.tensor(x.n_tokens, x.n_cols);
        self.for_rows(&mut out, &|i, out| {
            for (x, out) in x
                .row(i)
                .chunks_exact(gain.len())
                .zip(out.chunks_exact_mut(gain.len()))
            {
                self.operations.rms_norm.run(x, gain, eps, out);
            }
        });
        out
    }

    fn linear<const N: usize>(&mut self, x: &Tensor, layers: [&Linear<Self>; N]) -> [Tensor; N] {
        let kernels = layers.map(|l| l.weight.of(self.step));
        let asked = |format| kernels.iter().any(|k| k.acts() == format);
        let q8 = asked(ActFormat::Q8).then(|| self.quantize(x.n_tokens, x.n_cols, &|i| x.row(i)));
        let bf16 = asked(ActFormat::Bf16).then(|| self.pack(x));
        let acts = Acts {
            n_tokens: x.n_tokens,
            n_in: x.n_cols,
            f32: &x.data,
            q8: q8.as_deref().map_or(&[], bytemuck::cast_slice),
            bf16: bf16.as_deref().map_or(&[], bytemuck::cast_slice),
        };
        self.products(&acts, layers)
    }

    fn gated_ffn(&mut self, x: &Tensor, ffn: &GatedFfn<Self>) -> Tensor {
        let Some(kernel) = gated(self.step, ffn.layers(), of_matrix) else {
            let [gate, up] = self.linear(x, [&ffn.gate, &ffn.up]);
            let h = self.glu(gate, &up, ffn.activation);
            let [out] = self.linear(&h, [&ffn.down]);
            return out;
        };
        let bf16 = self.pack(x);
        let acts = Acts {
            n_tokens: x.n_tokens,
            n_in: x.n_cols,
            f32: &[],
            q8: &[],
            bf16: bytemuck::cast_slice(&bf16),
        };
        let (gate, up) = (&ffn.gate.weight, &ffn.up.weight);
        self.count(gate, x.n_tokens);
        self.count(up, x.n_tokens);
        let (n_groups, n_chunks) = (x.n_tokens.div_ceil(BF16_TOKENS), gate.n_out / BF16_LEN);
        let mut h = self.scratch.take(bf16_floats(x.n_tokens, gate.n_out));
        let h: &mut [[Tile; 2]] = bytemuck::cast_slice_mut(&mut h);
        // As much unpacked in the second-level cache as `products` has; a few tasks a thread.
        let grain = (n_chunks / (4 * self.pool.n_threads())).clamp(1, 4);
        prefetch_after(&[gate, up]);
        let mut outputs = [Output::new(h, n_chunks)];
        self.pool
            .run_tiles(&mut outputs, (n_groups, grain), &|tile| {
                let first = tile.first_col * BF16_LEN;
                let rows = first..first + tile.out.n_cols() * BF16_LEN;
                gate.read(rows.clone(), |gate| {
                    up.read(rows, |up| {
                        kernel.run(&mut GatedRows {
                            gate,
                            up,
                            x: &acts,
                            activation: ffn.activation,
                            out: tile.out,
                        });
                    });
                });
            });
        let acts = Acts {
            n_in: gate.n_out,
            bf16: h,
            ..acts
        };
        let [out] = self.products(&acts, [&ffn.down]);
        out
    }

    fn foresee(&mut self, x: &Tensor, gain: &Vec<f32>, eps: f32, moe: &Moe<Self>) {
        self.run_foresee(x, gain, eps, moe);
    }

    fn route(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        self.run_route(x, from, moe)
    }

    fn moe(&mut self, x: &Tensor, routes: Tensor, moe: &Moe<Self>) -> Tensor {
        self.run_moe(x, &routes, moe)
    }

    fn rope_angles(&mut self, rope: &Rope, start: usize, n: usize) -> Tensor {
        let half = rope.inv_freq.len();
        let mut out = self.tensor(n, 2 * half);
        self.for_rows(&mut out, &|i, out| {
            let (cos, sin) = out.split_at_mut(half);
            for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
                // The product in f32, as the models were trained with; its sine in f64 keeps large angles exact.
                let angle = f64::from((start + i) as f32 * freq);
                *cos = angle.cos() as f32;
                *sin = angle.sin() as f32;
            }
        });
        out
    }

    fn rope(&mut self, x: &mut Tensor, head_dim: usize, pairs: RopePairs, angles: &Tensor) {
        let operations = self.operations;
        self.for_rows(x, &|i, row| {
            let (cos, sin) = angles.row(i).split_at(angles.n_cols / 2);
            for head in row.chunks_exact_mut(head_dim) {
                match pairs {
                    RopePairs::Halves => operations.rope_halves.run(head, cos, sin),
                    RopePairs::Neighbours => operations.rope_neighbours.run(head, cos, sin),
                }
            }
        });
    }

    fn kv_write(&mut self, kv: &mut KvCache, k: &Tensor, v: &Tensor, start: usize) {
        for i in 0..k.n_tokens {
            kv.write(start + i, k.row(i), v.row(i), self.operations.to_f16);
        }
        if !kv.waits_for_queries() {
            kv.sum_keys(start..start + k.n_tokens);
        }
    }

    fn kv_note(
        &mut self,
        kv: &mut KvCache,
        q: &Tensor,
        start: usize,
        attention: &Attention,
    ) -> bool {
        self.note(kv, attention, start, &q.data)
    }

    fn attention(
        &mut self,
        q: &Tensor,
        kv: &KvCache,
        start: usize,
        attention: &Attention,
    ) -> Tensor {
        let mut out = self.tensor(q.n_tokens, q.n_cols);
        let positions = start..start + q.n_tokens;
        let Some(select) = kv.select() else {
            self.attend_dense(kv, attention, start, &q.data, &mut out.data);
            return out;
        };
        for (is_dense, run) in attention::runs(attention, select, positions) {
            let rows = (run.start - start) * q.n_cols..(run.end - start) * q.n_cols;
            let (q, out) = (&q.data[rows.clone()], &mut out.data[rows]);
            match is_dense {
                true => self.attend_dense(kv, attention, run.start, q, out),
                false => {
                    self.attend_selected(kv, attention, run.start, select, q, out);
                    self.correct(
                        kv.differences(),
                        run.start,
                        out,
                        attention.n_heads * attention.head_dim,
                    );
                }
            }
        }
        out
    }

    fn short_conv(&mut self, bcx: &Tensor, taps: &Vec<f32>, conv: &mut ConvState) -> Tensor {
        let n = conv.n_channels;
        let mut out = self.tensor(bcx.n_tokens, n);
        let rows = bcx
            .n_tokens
            .div_ceil(4 * self.pool.n_threads())
            .max(PARALLEL_ROWS);
        let state = conv.rows();
        self.pool.run_pieces(&mut out.data, rows * n, &|i, out| {
            let mut rows = ShortConvRows {
                bcx: &bcx.data,
                n_channels: n,
                taps,
                state,
                first: i * rows,
                out,
            };
            self.operations.short_conv.run(&mut rows);
        });
        conv.push(bcx);
        out
    }

    fn glu(&mut self, mut gate: Tensor, up: &Tensor, activation: Activation) -> Tensor {
        let glu = self.operations.glu;
        if gate.n_tokens < PARALLEL_ROWS {
            glu.run(activation, &mut gate.data, &up.data);
        } else {
            self.for_rows(&mut gate, &|i, gate| glu.run(activation, gate, up.row(i)));
        }
        gate
    }

    fn add(&mut self, x: &mut Tensor, y: &Tensor) {
        let add = self.operations.add;
        self.for_rows(x, &|i, x| add.run(x, y.row(i)));
    }

    fn rows_from(&mut self, x: Tensor, from: usize) -> Tensor {
        // What follows leaves no trace in the caches: the kernels that are best for what is left.
        self.step = step_of_wanted(self.step, x.n_tokens - from);
        if from == 0 {
            return x;
        }
        let mut out = self.tensor(x.n_tokens - from, x.n_cols);
        out.data.copy_from_slice(&x.data[from * x.n_cols..]);
        out
    }

    fn read(&mut self, x: &Tensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.try_reserve_exact(x.data.len())
            .map_err(|_| Error::OutOfMemory {
                what: "logits".into(),
                bytes: size_of_val(&*x.data),
            })?;
        out.extend_from_slice(&x.data);
        Ok(())
    }

    fn read_top(&mut self, x: &Tensor, k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool> {
        Ok(x.n_tokens == 1 && self.top.find(&x.data, k, out))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Regions are those of the pools, whoever entered them.
    fn work(&self) -> Work {
        let mut regions = self.decode_pool.n_regions();
        if !Arc::ptr_eq(&self.decode_pool, &self.prefill_pool) {
            regions += self.prefill_pool.n_regions();
        }
        let experts = self.experts.as_ref().map(|experts| experts.work());
        Work {
            regions,
            experts: experts.unwrap_or_default(),
            ..self.work
        }
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.bytes()
    }

    fn kernel(&self, of: Runs<Self>) -> &'static str {
        let operations = &self.operations;
        match of {
            Runs::RmsNorm => operations.rms_norm.name(),
            Runs::Linear(matrix) => matrix.of(self.step).name(),
            Runs::GatedFfn(ffn) => {
                gated(self.step, ffn.layers(), of_matrix).map_or("", |kernel| kernel.name())
            }
            Runs::Route(moe) => moe.router.weight.kernels.of(self.step).name(),
            Runs::Moe(moe) => gated(self.step, moe.layers(), of_matrix).map_or_else(
                || moe.gate.weight.kernels.of(self.step).name(),
                |kernel| kernel.name(),
            ),
            Runs::Rope(RopePairs::Halves) => operations.rope_halves.name(),
            Runs::Rope(RopePairs::Neighbours) => operations.rope_neighbours.name(),
            Runs::KvWrite(kv) => kv.write_kernel(operations),
            Runs::Attention(kv) => attention::kernel(kv, self.step, operations),
            Runs::ShortConv => operations.short_conv.name(),
            Runs::Glu => operations.glu.name(),
            Runs::Add => operations.add.name(),
        }
    }

    fn time_waits(&self) {
        self.decode_pool.time_waits();
        self.prefill_pool.time_waits();
    }

    fn waited(&self) -> Duration {
        self.pool.waited()
    }

    fn worked(&self) -> Duration {
        self.pool.worked()
    }
}

/// The step whose kernels compute logits of `n_tokens` after a pass of `step`.
pub(super) fn step_of_wanted(step: Step, n_tokens: usize) -> Step {
    if n_tokens < FEW { Step::Decode } else { step }
}

impl ConvState {
    /// The newest `n_rows`.
    fn rows(&self) -> &[f32] {
        &self.u[self.u.len() - self.n_rows * self.n_channels..]
    }

    /// Appends the rows of `u = b * x`, as many of them as are worth keeping.
    fn push(&mut self, bcx: &Tensor) {
        let n = self.n_channels;
        let most = self.n_rows + REWIND;
        let new = bcx.n_tokens.min(most);
        let held = self.u.len() / n;
        if held + new > most + REWIND || new < bcx.n_tokens {
            let kept = (most - new).min(held); // none if some of the new ones are skipped: rows are in sequence
            self.u.copy_within((held - kept) * n.., 0);
            self.u.truncate(kept * n);
        }
        for t in bcx.n_tokens - new..bcx.n_tokens {
            let row = bcx.row(t);
            let u = row[..n].iter().zip(&row[2 * n..]).map(|(b, x)| b * x);
            self.u.extend(u);
        }
    }
}
