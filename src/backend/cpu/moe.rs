//! Mixture of experts: the choice of each token, and the experts' products.
//!
//! A decoded token runs its experts side by side: one region for all gates and ups, one for all downs, each cut into tasks
//! of adjacent rows whichever expert they belong to. A prompt is sorted by expert: each expert's tokens make one product.
//! Either way an expert's row is computed as if it were alone, and a token's rows are summed in the order of its routes.

use super::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8Row, Tile, bf16_floats};
use super::pool::{OutCols, Output};
use super::scratch::Buffer;
use super::table::{ActFormat, GatedRows, MatMul, Ready};
use super::{Cpu, MAX_TASK_ROWS, Matrix, TASK_BYTES, Tensor, gated, of_matrix, prefetch_after};
use crate::backend::{Activation, Backend, Gating, Moe, Routing, Step};
use crate::quant;

/// Rows of a task of a decoded token at most.
const MAX_CHUNK: usize = 512;

/// Rows of `gate` and `up` that a task of a decoded token computes: a chunk of an expert's neurons.
pub(in crate::backend) fn chunk_rows(n_ffn: usize, row_bytes: usize, n_tasks: usize) -> usize {
    let most = (TASK_BYTES / row_bytes.max(1)).min(n_ffn / n_tasks.max(1));
    let most = most.clamp(8, MAX_CHUNK);
    let n_chunks = n_ffn.div_ceil(most);
    n_ffn.div_ceil(n_chunks).next_multiple_of(8)
}

/// Chunks of an expert's neurons for a decoded token on `n_threads`: two tasks a thread even out its speed.
pub(in crate::backend) fn n_chunks(n_used: usize, n_threads: usize) -> usize {
    (2 * n_threads).div_ceil(n_used)
}

/// Groups of 32 that rows of `n_experts` experts fill at most, `n_rows` together.
pub(in crate::backend) fn max_groups(n_rows: usize, n_experts: usize) -> usize {
    let n_experts = n_experts.min(n_rows);
    (n_rows + (BF16_TOKENS - 1) * n_experts) / BF16_TOKENS
}

/// The tokens of one expert.
struct Segment {
    expert: usize,
    /// Its rows in the sorted batch.
    first: usize,
    n_rows: usize,
    /// Its first group of bf16 tiles.
    first_group: usize,
}

impl Segment {
    fn n_groups(&self) -> usize {
        self.n_rows.div_ceil(BF16_TOKENS)
    }
}

/// A batch sorted by expert.
struct Sorted {
    segments: Vec<Segment>,
    /// The row of the batch behind each sorted one, `(n_rows)`.
    tokens: Vec<u32>,
    /// The sorted row of each token's experts, `(n_tokens, n_used)`.
    places: Vec<u32>,
}

impl Sorted {
    fn new(routes: &Tensor, routing: &Routing) -> Self {
        let k = routing.n_used;
        let mut ends = vec![0usize; routing.n_experts];
        let ids = |t: usize| routes.row(t)[..k].iter().map(|id| *id as usize);
        (0..routes.n_tokens)
            .flat_map(ids)
            .for_each(|id| ends[id] += 1);
        let (mut segments, mut first, mut first_group) = (Vec::new(), 0, 0);
        for (expert, n) in ends.iter_mut().enumerate() {
            let n_rows = std::mem::replace(n, first);
            if n_rows > 0 {
                segments.push(Segment {
                    expert,
                    first,
                    n_rows,
                    first_group,
                });
                first += n_rows;
                first_group += n_rows.div_ceil(BF16_TOKENS);
            }
        }
        let mut sorted = Self {
            segments,
            tokens: vec![0; first],
            places: Vec::with_capacity(first),
        };
        for t in 0..routes.n_tokens {
            for id in ids(t) {
                sorted.tokens[ends[id]] = t as u32;
                sorted.places.push(ends[id] as u32);
                ends[id] += 1;
            }
        }
        sorted
    }

    fn n_rows(&self) -> usize {
        self.tokens.len()
    }
}

/// The rows of a sorted batch in the formats that kernels ask for.
struct SortedActs<'a> {
    n_in: usize,
    f32: &'a [f32],
    q8: &'a [u8],
    bf16: &'a [[Tile; 2]],
}

impl<'a> SortedActs<'a> {
    fn of(&self, segment: &Segment) -> Acts<'a> {
        /// Part of a slice that is empty where nobody asked for it.
        fn part<T>(all: &[T], unit: usize, first: usize, n: usize) -> &[T] {
            match all.is_empty() {
                true => &[],
                false => &all[first * unit..(first + n) * unit],
            }
        }
        let (first, n) = (segment.first, segment.n_rows);
        Acts {
            n_tokens: n,
            n_in: self.n_in,
            f32: part(self.f32, self.n_in, first, n),
            q8: part(self.q8, Q8Row::bytes(self.n_in), first, n),
            bf16: part(
                self.bf16,
                self.n_in / BF16_LEN,
                segment.first_group,
                segment.n_groups(),
            ),
        }
    }
}

/// Writes a row of a [`Backend::route`]: the experts, then their weights.
///
/// `out` serves as the list of the best so far, their keys where the weights will be.
fn route_row(z: &[f32], bias: Option<&[f32]>, routing: &Routing, out: &mut [f32]) {
    let sigmoid = |z: f32| 1.0 / (1.0 + (-z).exp());
    // Scores rise with logits, and unlike these some are equal: without a bias logits choose.
    let key = |e: usize| match (bias, routing.gating) {
        (None, _) => z[e],
        (Some(bias), Gating::Sigmoid) => sigmoid(z[e]) + bias[e],
        (Some(bias), Gating::Softmax) => z[e] + bias[e],
    };
    let (ids, keys) = out.split_at_mut(routing.n_used);
    for e in 0..z.len() {
        let new = match key(e) {
            key if key.is_nan() => f32::NEG_INFINITY,
            key => key,
        };
        let held = e.min(ids.len());
        let at = keys[..held].partition_point(|key| *key >= new);
        if at == ids.len() {
            continue;
        }
        let end = (held + 1).min(ids.len());
        ids[at..end].rotate_right(1);
        keys[at..end].rotate_right(1);
        (ids[at], keys[at]) = (e as f32, new);
    }
    let largest = ids
        .iter()
        .fold(f32::NEG_INFINITY, |max, id| max.max(z[*id as usize]));
    let mut sum = routing.sum_eps;
    for (id, weight) in ids.iter().zip(&mut *keys) {
        let z = z[*id as usize];
        *weight = match routing.gating {
            Gating::Sigmoid => sigmoid(z),
            Gating::Softmax => (z - largest).exp(),
        };
        sum += *weight;
    }
    // Where every score has vanished, so does the sum: no weight rather than none that is a number.
    let sum = sum.max(f32::MIN_POSITIVE);
    keys.iter_mut().for_each(|weight| *weight /= sum);
}

impl Cpu {
    pub(super) fn run_route(&mut self, x: &Tensor, moe: &Moe<Self>) -> Tensor {
        let [logits] = self.linear(x, [&moe.router]);
        let mut out = self.tensor(x.n_tokens, 2 * moe.routing.n_used);
        let bias = moe.selection_bias.as_deref();
        self.for_rows(&mut out, &|i, out| {
            route_row(logits.row(i), bias, &moe.routing, out);
        });
        out
    }

    pub(super) fn run_moe(&mut self, x: &Tensor, routes: &Tensor, moe: &Moe<Self>) -> Tensor {
        let mut out = self.tensor(x.n_tokens, x.n_cols);
        prefetch_after(&[&moe.gate.weight, &moe.up.weight, &moe.down.weight]);
        if self.step == Step::Decode {
            // One, or a replay of some that came one by one.
            for t in 0..x.n_tokens {
                self.moe_token(
                    x.row(t),
                    routes.row(t),
                    moe,
                    &mut out.data[t * x.n_cols..][..x.n_cols],
                );
            }
        } else {
            self.moe_batch(x, routes, moe, &mut out);
        }
        out
    }

    fn moe_token(&mut self, x: &[f32], routes: &[f32], moe: &Moe<Self>, out: &mut [f32]) {
        let (ids, weights) = routes.split_at(moe.routing.n_used);
        let (gate, up, down) = (&moe.gate.weight, &moe.up.weight, &moe.down.weight);
        let (n_ffn, n_used) = (moe.n_ffn, ids.len());
        self.count_experts(moe, n_used, n_used);
        let kernels = [gate, up, down].map(|weight| weight.kernels.of(Step::Decode));
        let asked = kernels[..2].iter().any(|k| k.acts() == ActFormat::Q8);
        let row = asked.then(|| self.quantize(1, x.len(), &|_| x));
        let acts = Acts {
            n_tokens: 1,
            n_in: x.len(),
            f32: x,
            q8: row.as_deref().map_or(&[], bytemuck::cast_slice),
            bf16: &[],
        };
        // Of each expert, chunk by chunk: the products of the gate, then those of up.
        let chunk = chunk_rows(
            n_ffn,
            gate.row_bytes.max(up.row_bytes),
            n_chunks(n_used, self.pool.n_threads()),
        );
        let n_chunks = n_ffn.div_ceil(chunk);
        let mut h = self.scratch.take(n_used * n_chunks * 2 * chunk);
        let operations = self.operations;
        // A neuron whose gate is 0 needs no other product.
        let picked = up
            .kernels
            .picked
            .filter(|_| moe.activation == Activation::Relu);
        self.pool.run_pieces(&mut h, 2 * chunk, &|i, piece| {
            let (expert, first) = (ids[i / n_chunks] as usize, i % n_chunks * chunk);
            let n = chunk.min(n_ffn - first);
            let rows = expert * n_ffn + first..expert * n_ffn + first + n;
            let (g, u) = piece.split_at_mut(chunk);
            let (g, u) = (&mut g[..n], &mut u[..n]);
            gate.read(rows.clone(), |w| {
                kernels[0].run(w, &acts, &mut OutCols::whole(g, n))
            });
            if let Some(picked) = picked {
                let mut picks = [0; MAX_CHUNK];
                let n = picks_of(g, &mut picks);
                up.read(rows, |w| picked.run(w, &picks[..n], &acts, &mut u[..n]));
                relu_picked(g, &picks[..n], u);
                return;
            }
            up.read(rows, |w| {
                kernels[1].run(w, &acts, &mut OutCols::whole(u, n))
            });
            operations.glu.run(moe.activation, g, u);
        });
        // Each expert's neurons together.
        for j in 0..n_used {
            for c in 0..n_chunks {
                let (from, to) = ((j * n_chunks + c) * 2 * chunk, j * n_ffn + c * chunk);
                let n = chunk.min(n_ffn - c * chunk);
                h.copy_within(from..from + n, to);
            }
        }
        let h = &h[..n_used * n_ffn];
        self.work.neurons += h.len() as u64;
        if picked.is_some() || moe.down_by_neuron {
            self.work.skipped_neurons += h.iter().filter(|h| **h == 0.0).count() as u64;
        }
        let mut rows = self.tensor(n_used, out.len());
        if moe.down_by_neuron {
            let segments: Vec<Segment> = (0..n_used).map(|j| one(ids[j] as usize, j)).collect();
            self.by_neuron(h, &segments, moe, &mut rows.data);
        } else {
            let q8 = (kernels[2].acts() == ActFormat::Q8)
                .then(|| self.quantize(n_used, n_ffn, &|j| &h[j * n_ffn..][..n_ffn]));
            let acts = SortedActs {
                n_in: n_ffn,
                f32: h,
                q8: q8.as_deref().map_or(&[], bytemuck::cast_slice),
                bf16: &[],
            };
            let n = out.len();
            let grain = chunk_rows(n, down.row_bytes, 1.max(2 * self.pool.n_threads() / n_used));
            let mut outputs = [Output::new(&mut rows.data, n)];
            self.pool.run_tiles(&mut outputs, (1, grain), &|mut tile| {
                let j = tile.first_row;
                let first = ids[j] as usize * n + tile.first_col;
                let acts = acts.of(&one(ids[j] as usize, j));
                down.read(first..first + tile.out.n_cols(), |w| {
                    kernels[2].run(w, &acts, &mut tile.out);
                });
            });
        }
        sum_rows(weights, |j| rows.row(j), out);
    }

    fn moe_batch(&mut self, x: &Tensor, routes: &Tensor, moe: &Moe<Self>, out: &mut Tensor) {
        let sorted = Sorted::new(routes, &moe.routing);
        self.count_experts(moe, sorted.segments.len(), sorted.n_rows());
        let rows = self.experts_of(x, &sorted, moe);
        let k = moe.routing.n_used;
        self.for_rows(out, &|t, out| {
            let places = &sorted.places[t * k..][..k];
            sum_rows(&routes.row(t)[k..], |j| rows.row(places[j] as usize), out);
        });
    }

    /// What the experts make of the rows of `x`, in sorted order.
    fn experts_of(&mut self, x: &Tensor, sorted: &Sorted, moe: &Moe<Self>) -> Tensor {
        let (gate, up, down) = (&moe.gate.weight, &moe.up.weight, &moe.down.weight);
        let (n_rows, n_ffn) = (sorted.n_rows(), moe.n_ffn);
        let n_experts = moe.routing.n_experts;
        let kernels = [gate, up, down].map(|weight| weight.kernels.of(self.step));
        let source = |i: usize| x.row(sorted.tokens[i] as usize);
        let formats = [kernels[0].acts(), kernels[1].acts()];
        let joined = match moe.down_by_neuron {
            true => None,
            false => gated(self.step, moe.layers(), of_matrix),
        };
        let inputs = self.sorted_acts(
            &sorted.segments,
            n_rows,
            n_experts,
            x.n_cols,
            &formats,
            &source,
        );
        let acts = inputs.acts();
        let mut rows = self.tensor(n_rows, x.n_cols);
        if let Some(kernel) = joined {
            let n_chunks = n_ffn / BF16_LEN;
            let groups = max_groups(n_rows, n_experts) * BF16_TOKENS;
            let mut h = self.scratch.take(bf16_floats(groups, n_ffn));
            let h: &mut [[Tile; 2]] = bytemuck::cast_slice_mut(&mut h);
            let mut rest = &mut *h;
            let mut outputs = Vec::with_capacity(sorted.segments.len());
            for segment in &sorted.segments {
                let (part, after) = rest.split_at_mut(segment.n_groups() * n_chunks);
                outputs.push(Output::new(part, n_chunks));
                rest = after;
            }
            let grain = (n_chunks / (4 * self.pool.n_threads())).clamp(1, 4);
            self.pool
                .run_tiles(&mut outputs, (usize::MAX, grain), &|tile| {
                    let segment = &sorted.segments[tile.which];
                    let first = segment.expert * n_ffn + tile.first_col * BF16_LEN;
                    let rows = first..first + tile.out.n_cols() * BF16_LEN;
                    gate.read(rows.clone(), |gate| {
                        up.read(rows, |up| {
                            kernel.run(&mut GatedRows {
                                gate,
                                up,
                                x: &acts.of(segment),
                                activation: moe.activation,
                                out: tile.out,
                            });
                        });
                    });
                });
            drop(outputs);
            let acts = SortedActs {
                n_in: n_ffn,
                f32: &[],
                q8: &[],
                bf16: h,
            };
            self.segment_products(&acts, &sorted.segments, [(down, kernels[2])], [&mut rows]);
            return rows;
        }
        let mut g = self.tensor(n_rows, n_ffn);
        let mut u = self.tensor(n_rows, n_ffn);
        let pair = [(gate, kernels[0]), (up, kernels[1])];
        self.segment_products(&acts, &sorted.segments, pair, [&mut g, &mut u]);
        let h = self.glu(g, &u, moe.activation);
        drop(u);
        if moe.down_by_neuron {
            self.by_neuron(&h.data, &sorted.segments, moe, &mut rows.data);
        } else {
            // As floats they are in order already.
            let formats = [kernels[2].acts()];
            let formats = &formats[..usize::from(formats[0] != ActFormat::F32)];
            let source = |i: usize| h.row(i);
            let inputs =
                self.sorted_acts(&sorted.segments, n_rows, n_experts, n_ffn, formats, &source);
            let acts = SortedActs {
                f32: &h.data,
                ..inputs.acts()
            };
            self.segment_products(&acts, &sorted.segments, [(down, kernels[2])], [&mut rows]);
        }
        rows
    }

    /// `outs[i] = acts weights[i]^T`, each segment with its expert's rows.
    fn segment_products<const N: usize>(
        &self,
        acts: &SortedActs,
        segments: &[Segment],
        weights: [(&Matrix, Ready<MatMul>); N],
        outs: [&mut Tensor; N],
    ) {
        let mut outputs = Vec::with_capacity(N * segments.len());
        let mut n_cols = 0;
        for out in outs {
            n_cols = out.n_cols;
            let mut rest = &mut out.data[..];
            for segment in segments {
                let (part, after) = rest.split_at_mut(segment.n_rows * n_cols);
                outputs.push(Output::new(part, n_cols));
                rest = after;
            }
        }
        // Whole pairs of panels of the GEMM kernels; a few tasks a thread over all experts.
        let grain = (outputs.len() * n_cols / (8 * self.pool.n_threads()))
            .clamp(32, MAX_TASK_ROWS)
            .next_multiple_of(32);
        self.pool
            .run_tiles(&mut outputs, (usize::MAX, grain), &|mut tile| {
                let segment = &segments[tile.which % segments.len()];
                let (weight, kernel) = weights[tile.which / segments.len()];
                let first = segment.expert * n_cols + tile.first_col;
                weight.read(first..first + tile.out.n_cols(), |rows| {
                    kernel.run(rows, &acts.of(segment), &mut tile.out);
                });
            });
    }

    /// `rows[t] += sum_i h[t, i] down[i]`, where a row of `down` is what a neuron adds; neurons that are 0 are skipped.
    fn by_neuron(&self, h: &[f32], segments: &[Segment], moe: &Moe<Self>, rows: &mut [f32]) {
        /// Weights that are made floats at once.
        const LEN: usize = 256;
        let (down, n_ffn) = (&moe.down.weight, moe.n_ffn);
        let (n, block) = (down.n_in, down.dtype.block_len());
        let mut rest = rows;
        let mut outputs = Vec::with_capacity(segments.len());
        for segment in segments {
            let (part, after) = rest.split_at_mut(segment.n_rows * n);
            outputs.push(Output::new(part, n));
            rest = after;
        }
        self.pool
            .run_tiles(&mut outputs, (usize::MAX, LEN), &|mut tile| {
                let segment = &segments[tile.which];
                let (n_cols, mut floats) = (tile.out.n_cols(), [0.0; LEN]);
                let bytes = tile.first_col / block * down.dtype.block_bytes();
                let bytes = bytes..bytes + n_cols / block * down.dtype.block_bytes();
                let n_rows = segment.n_rows;
                (0..n_rows).for_each(|t| tile.out.row(t).fill(0.0));
                for i in 0..n_ffn {
                    let h = |t: usize| h[(segment.first + t) * n_ffn + i];
                    if (0..n_rows).all(|t| h(t) == 0.0) {
                        continue;
                    }
                    let row = segment.expert * n_ffn + i;
                    let floats = &mut floats[..n_cols];
                    down.read(row..row + 1, |row| {
                        quant::dequantize(down.dtype, &row[bytes.clone()], floats);
                    });
                    for (t, h) in (0..n_rows).map(|t| (t, h(t))).filter(|(_, h)| *h != 0.0) {
                        let sums = tile.out.row(t).iter_mut().zip(&*floats);
                        sums.for_each(|(sum, w)| *sum = h.mul_add(*w, *sum));
                    }
                }
            });
    }

    /// Rows in sorted order, in the formats asked for.
    fn sorted_acts<'x>(
        &self,
        segments: &[Segment],
        n_rows: usize,
        n_experts: usize,
        n_in: usize,
        formats: &[ActFormat],
        source: &(dyn Fn(usize) -> &'x [f32] + Sync),
    ) -> SortedBuffers {
        let asked = |format| formats.contains(&format);
        let q8 = asked(ActFormat::Q8).then(|| self.quantize(n_rows, n_in, source));
        let f32 = asked(ActFormat::F32).then(|| {
            let mut rows = self.scratch.take(n_rows * n_in);
            self.pool
                .run_pieces(&mut rows, n_in, &|i, row| row.copy_from_slice(source(i)));
            rows
        });
        let bf16 = asked(ActFormat::Bf16).then(|| {
            let groups = max_groups(n_rows, n_experts) * BF16_TOKENS;
            let mut tiles = self.scratch.take(bf16_floats(groups, n_in));
            // Taken first what tasks will take, so that it is there whichever thread is faster.
            let len = BF16_TOKENS * n_in;
            let taken = (0..self.pool.n_threads()).map(|_| self.scratch.take(len));
            drop(taken.collect::<Vec<_>>());
            let n_groups = segments.last().map_or(0, |s| s.first_group + s.n_groups());
            let used = &mut bytemuck::cast_slice_mut(&mut tiles)[..n_groups * (n_in / BF16_LEN)];
            self.pool.run_pieces(used, n_in / BF16_LEN, &|g, group| {
                let at = segments.partition_point(|s| s.first_group <= g) - 1;
                let segment = &segments[at];
                let first = (g - segment.first_group) * BF16_TOKENS;
                let n = BF16_TOKENS.min(segment.n_rows - first);
                let mut rows = self.scratch.take(len);
                for (i, row) in rows.chunks_exact_mut(n_in).take(n).enumerate() {
                    row.copy_from_slice(source(segment.first + first + i));
                }
                self.operations
                    .pack_bf16
                    .run(&rows[..n * n_in], n_in, group);
            });
            tiles
        });
        SortedBuffers {
            n_in,
            f32,
            q8,
            bf16,
        }
    }

    fn count_experts(&mut self, moe: &Moe<Self>, n_experts: usize, n_rows: usize) {
        for weight in [&moe.gate.weight, &moe.up.weight, &moe.down.weight] {
            let expert = weight.data.len() / moe.routing.n_experts;
            self.work.weight_bytes += (expert * n_experts) as u64;
            let ops = 2 * weight.n_in * (weight.n_out / moe.routing.n_experts);
            self.work.matmul_ops += (ops * n_rows) as u64;
        }
    }
}

/// Writes where `gate` is above 0, in order; returns how often.
fn picks_of(gate: &[f32], picks: &mut [u32; MAX_CHUNK]) -> usize {
    let mut n = 0;
    for (i, gate) in (0..).zip(gate) {
        // Without a branch that half of the neurons would mispredict.
        picks[n] = i;
        n += usize::from(*gate > 0.0);
    }
    n
}

/// `gate = max(gate, 0) * up`, where `up` has the rows `picks` alone, all whose gate is above 0.
fn relu_picked(gate: &mut [f32], picks: &[u32], up: &[f32]) {
    gate.iter_mut()
        .for_each(|gate| *gate = if *gate > 0.0 { *gate } else { 0.0 });
    picks
        .iter()
        .zip(up)
        .for_each(|(i, up)| gate[*i as usize] *= up);
}

/// The buffers behind [`SortedActs`].
struct SortedBuffers {
    n_in: usize,
    f32: Option<Buffer>,
    q8: Option<Buffer>,
    bf16: Option<Buffer>,
}

impl SortedBuffers {
    fn acts(&self) -> SortedActs<'_> {
        SortedActs {
            n_in: self.n_in,
            f32: self.f32.as_deref().unwrap_or(&[]),
            q8: self.q8.as_deref().map_or(&[], bytemuck::cast_slice),
            bf16: self.bf16.as_deref().map_or(&[], bytemuck::cast_slice),
        }
    }
}

/// Row `row` alone.
fn one(expert: usize, row: usize) -> Segment {
    Segment {
        expert,
        first: row,
        n_rows: 1,
        first_group: 0,
    }
}

/// `out = sum_j weights[j] rows[j]`, in this order.
fn sum_rows<'a>(weights: &[f32], row: impl Fn(usize) -> &'a [f32], out: &mut [f32]) {
    out.fill(0.0);
    for (j, weight) in weights.iter().enumerate() {
        let sums = out.iter_mut().zip(row(j));
        sums.for_each(|(sum, x)| *sum += weight * x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(z: &[f32], bias: Option<&[f32]>, n_used: usize, gating: Gating) -> Vec<f32> {
        let routing = Routing {
            n_experts: z.len(),
            n_used,
            gating,
            sum_eps: 0.0,
        };
        let mut out = vec![f32::NAN; 2 * n_used];
        route_row(z, bias, &routing, &mut out);
        out
    }

    #[test]
    fn the_largest_are_taken_and_of_equals_the_first() {
        let z = [1.0, 30.0, -2.0, 30.0, 20.0, 30.0];
        let out = routes(&z, None, 4, Gating::Sigmoid);
        assert_eq!(out[..4], [1.0, 3.0, 5.0, 4.0]);
        // All saturated: equal weights, although sigmoids could not have ordered them.
        assert!(out[4..].iter().all(|w| (w - 0.25).abs() < 1e-6));
        let out = routes(&[0.0, f32::NAN, f32::NAN], None, 2, Gating::Softmax);
        assert_eq!(out[..2], [0.0, 1.0]);
        assert_eq!(
            routes(&[-200.0; 3], None, 2, Gating::Sigmoid)[..2],
            [0.0, 1.0]
        );
    }

    #[test]
    fn a_bias_orders_and_does_not_weigh() {
        let z = [0.0, 0.0, 2.0];
        let out = routes(&z, Some(&[0.0, 5.0, 0.0]), 2, Gating::Sigmoid);
        assert_eq!(out[..2], [1.0, 2.0]);
        let s = 1.0 / (1.0 + (-2.0f32).exp());
        assert!((out[2] - 0.5 / (0.5 + s)).abs() < 1e-6);
    }

    #[test]
    fn softmax_of_the_chosen() {
        let out = routes(&[1.0, 3.0, 2.0], None, 2, Gating::Softmax);
        assert_eq!(out[..2], [1.0, 2.0]);
        let e = 1.0f32.exp();
        assert!((out[2] - e / (e + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn chunks_cover_an_experts_neurons() {
        for (n_ffn, row_bytes, n) in [
            (768, 864, 1),
            (48, 256, 2),
            (1792, 1152, 3),
            (8, 1 << 20, 4),
        ] {
            let rows = chunk_rows(n_ffn, row_bytes, n);
            assert!(rows >= 8 && rows.is_multiple_of(8) && rows <= n_ffn.next_multiple_of(8));
        }
        assert_eq!(max_groups(64, 8), (64 + 31 * 8) / 32);
        assert_eq!(max_groups(1, 8), 1);
    }
}
