//! Mixture of experts: the choice of each token, and the experts' products.
//!
//! A decoded token runs its experts side by side: one region for all gates and ups, one for all downs, each cut into tasks
//! of adjacent rows whichever expert they belong to. A prompt is sorted by expert: each expert's tokens make one product.
//! Either way an expert's row is computed as if it were alone, and a token's rows are summed in the order of its routes.

use std::ops::Range;

use super::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8Row, Tile, bf16_floats};
use super::pool::{OutCols, Output};
use super::scratch::Buffer;
use super::stored::{self, Batch, Named};
use super::table::{ActFormat, GatedRows, MatMul, Picked, Ready};
use super::{Cpu, MAX_TASK_ROWS, Matrix, TASK_BYTES, Tensor, gated, of_matrix, prefetch_after};
use crate::backend::{Activation, Backend, Gating, MAX_USED, Moe, Routing, Step};
use crate::experts::Request;
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
    /// Of tokens with `routes`; experts in the order of `order`, which names all that are there.
    fn new(routes: &Tensor, routing: &Routing, order: impl Iterator<Item = usize>) -> Self {
        let k = routing.n_used;
        let ids = |t: usize| routes.row(t)[..k].iter().map(|id| *id as usize);
        let mut places = vec![0; routing.n_experts];
        (0..routes.n_tokens)
            .flat_map(ids)
            .for_each(|id| places[id] += 1);
        let (mut segments, mut first, mut first_group) = (Vec::new(), 0, 0);
        for expert in order {
            let n_rows = std::mem::replace(&mut places[expert], first);
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
                sorted.tokens[places[id]] = t as u32;
                sorted.places.push(places[id] as u32);
                places[id] += 1;
            }
        }
        sorted
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

/// Gate, up and down, as the store counts the parts of an expert.
const GATE: usize = 0;
const UP: usize = 1;
const DOWN: usize = 2;

/// Where the experts of a layer are.
#[derive(Clone, Copy)]
enum Source<'a> {
    /// All of them in the file, as other weights.
    Mapped,
    /// Some in slots, until their request ends.
    Held(&'a Request),
}

impl Source<'_> {
    /// Calls `with` with the bytes of some rows of an expert, of which `matrix` has `n_rows`.
    fn read(
        self,
        (matrix, part): (&Matrix, usize),
        (expert, n_rows): (usize, usize),
        rows: Range<usize>,
        with: impl FnOnce(&[u8]),
    ) {
        match self {
            Source::Mapped => {
                let first = expert * n_rows;
                matrix.read(first + rows.start..first + rows.end, with);
            }
            Source::Held(request) => {
                let held = (0..request.len()).find(|j| request.expert(*j) as usize == expert);
                let bytes = held.and_then(|j| request.get(j, part));
                let bytes = bytes.expect("experts are waited for before a region uses them");
                with(&bytes[rows.start * matrix.row_bytes..rows.end * matrix.row_bytes]);
            }
        }
    }

    /// Whether [`Source::wait`] returns, or unwinds, at once.
    fn is_ready(self, expert: usize, parts: &[usize]) -> bool {
        match self {
            Source::Mapped => true,
            Source::Held(request) => (0..request.len())
                .filter(|j| request.expert(*j) as usize == expert)
                .all(|j| parts.iter().all(|part| request.ready(j, *part))),
        }
    }

    /// Waits for some parts of an expert; unwinds with the error of a reader.
    fn wait(self, expert: usize, parts: &[usize]) {
        let Source::Held(request) = self else {
            return;
        };
        for j in (0..request.len()).filter(|j| request.expert(*j) as usize == expert) {
            for part in parts {
                stored::read(request.wait(j, *part));
            }
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
    /// Only for a decoded token, and where guesses are read: a prompt uses nearly all experts of a layer anyway.
    pub(super) fn run_foresee(&mut self, x: &Tensor, gain: &Vec<f32>, eps: f32, moe: &Moe<Self>) {
        let guessing = self.experts.as_ref().filter(|experts| experts.guesses());
        let (Some(layer), Some(experts)) = (moe.gate.weight.stored, guessing.cloned()) else {
            return;
        };
        if self.step == Step::Prefill || x.n_tokens != 1 {
            return;
        }
        let k = moe.routing.n_used;
        let h = self.rms_norm(x, gain, eps);
        let [logits] = self.linear(&h, [&moe.router]);
        let mut route = [0.0; 2 * MAX_USED];
        let route = &mut route[..2 * k];
        let bias = moe.selection_bias.as_deref();
        route_row(logits.row(0), bias, &moe.routing, route);
        experts.hint(layer, &route[..k]);
    }

    pub(super) fn run_route(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        let k = moe.routing.n_used;
        let mut out = self.tensor(x.n_tokens - from, 2 * k);
        let kept = (from > 0).then(|| {
            let mut kept = self.tensor(x.n_tokens - from, x.n_cols);
            kept.data.copy_from_slice(&x.data[from * x.n_cols..]);
            kept
        });
        let [logits] = self.linear(kept.as_ref().unwrap_or(x), [&moe.router]);
        let bias = moe.selection_bias.as_deref();
        self.for_rows(&mut out, &|i, out| {
            route_row(logits.row(i), bias, &moe.routing, out);
        });
        if let (Some(layer), Some(experts)) = (moe.gate.weight.stored, &self.experts) {
            self.named = None;
            self.named = match (self.step, out.n_tokens) {
                (Step::Prefill, n) => {
                    let rows = (0..n).map(|t| out.row(t));
                    Some((layer, Named::Batch(experts.batch(layer, k, rows))))
                }
                (Step::Decode, 1) => {
                    let route = out.row(0).split_at(k);
                    Some((layer, Named::Token(experts.token(layer, route))))
                }
                // A replay asks for one token's after the other's.
                (Step::Decode, _) => None,
            };
        }
        out
    }

    pub(super) fn run_moe(&mut self, x: &Tensor, routes: &Tensor, moe: &Moe<Self>) -> Tensor {
        let k = moe.routing.n_used;
        let mut out = self.tensor(x.n_tokens, x.n_cols);
        let stored = moe.gate.weight.stored.zip(self.experts.clone());
        let named = self.named.take();
        let named = named.filter(|(layer, _)| Some(*layer) == moe.gate.weight.stored);
        let mut named = named.map(|(_, named)| named);
        if stored.is_none() {
            prefetch_after(&moe.layers().map(|layer| &layer.weight));
        }
        if self.step == Step::Prefill {
            let batch = stored.map(|(layer, experts)| match named {
                Some(Named::Batch(batch)) => batch,
                _ => experts.batch(layer, k, (0..x.n_tokens).map(|t| routes.row(t))),
            });
            self.moe_batch(x, routes, moe, batch, &mut out);
            return out;
        }
        // One, or a replay of some that came one by one.
        let rows = out.data.chunks_exact_mut(x.n_cols).enumerate();
        for (t, out) in rows {
            let request = stored.as_ref().map(|(layer, experts)| match named.take() {
                Some(Named::Token(request)) => request,
                _ => experts.token(*layer, routes.row(t).split_at(k)),
            });
            let source = request.as_ref().map_or(Source::Mapped, Source::Held);
            self.moe_token(source, x.row(t), routes.row(t), moe, out);
        }
        out
    }

    fn moe_token(
        &mut self,
        source: Source,
        x: &[f32],
        routes: &[f32],
        moe: &Moe<Self>,
        out: &mut [f32],
    ) {
        let (ids, weights) = routes.split_at(moe.routing.n_used);
        self.count_experts(moe, ids.len(), ids.len());
        let mut token = Token::new(self, source, x, ids, moe);
        // An expert is computed as soon as it is there: all at once, where they are in memory.
        let mut stages = [Stage::Named; MAX_USED];
        let stages = &mut stages[..ids.len()];
        while stages.iter().any(|stage| *stage != Stage::Done) {
            let ready = |from: Stage, parts: &[usize], stages: &[Stage]| {
                let mut which = [false; MAX_USED];
                for (j, stage) in stages.iter().enumerate() {
                    which[j] = *stage == from && source.is_ready(ids[j] as usize, parts);
                    if which[j] {
                        source.wait(ids[j] as usize, parts);
                    }
                }
                which
            };
            let first = ready(Stage::Named, &[GATE, UP], stages);
            let go = |which: &[bool; MAX_USED]| which.contains(&true);
            if go(&first) {
                token.gate_up(&first);
                let stages = stages.iter_mut().zip(first).filter(|(_, first)| *first);
                stages.for_each(|(stage, _)| *stage = Stage::Gated);
            }
            let second = ready(Stage::Gated, &[DOWN], stages);
            if go(&second) {
                token.down(&second);
                let stages = stages.iter_mut().zip(second).filter(|(_, second)| *second);
                stages.for_each(|(stage, _)| *stage = Stage::Done);
            }
            if !go(&first) && !go(&second) {
                let next = stages.iter().position(|stage| *stage != Stage::Done);
                let next = next.expect("the loop has not ended");
                match stages[next] {
                    Stage::Named => source.wait(ids[next] as usize, &[GATE, UP]),
                    _ => source.wait(ids[next] as usize, &[DOWN]),
                }
            }
        }
        let skipped = token.n_skipped();
        let Token { rows, .. } = token;
        sum_rows(weights, |j| rows.row(j), out);
        self.work.neurons += (ids.len() * moe.n_ffn) as u64;
        self.work.skipped_neurons += skipped as u64;
    }

    fn moe_batch(
        &mut self,
        x: &Tensor,
        routes: &Tensor,
        moe: &Moe<Self>,
        stored: Option<Batch>,
        out: &mut Tensor,
    ) {
        let k = moe.routing.n_used;
        let sorted = match &stored {
            None => Sorted::new(routes, &moe.routing, 0..moe.routing.n_experts),
            Some(batch) => Sorted::new(routes, &moe.routing, batch.order()),
        };
        let (segments, n_rows) = (&sorted.segments[..], sorted.tokens.len());
        self.count_experts(moe, segments.len(), n_rows);
        let mut rows = self.tensor(n_rows, x.n_cols);
        match stored {
            None => self.experts_of(Source::Mapped, x, &sorted, segments, moe, &mut rows),
            Some(mut batch) => {
                let mut first = 0;
                while let Some(request) = batch.next() {
                    let source = Source::Held(&request);
                    let end = first + request.len();
                    while first < end {
                        let is_ready = |s: &&Segment| source.is_ready(s.expert, &[GATE, UP, DOWN]);
                        let ready = segments[first..end].iter().take_while(is_ready).count();
                        let some = &segments[first..first + ready.max(1)];
                        some.iter()
                            .for_each(|s| source.wait(s.expert, &[GATE, UP, DOWN]));
                        self.experts_of(source, x, &sorted, some, moe, &mut rows);
                        first += some.len();
                    }
                }
            }
        }
        self.for_rows(out, &|t, out| {
            let places = &sorted.places[t * k..][..k];
            sum_rows(&routes.row(t)[k..], |j| rows.row(places[j] as usize), out);
        });
    }

    /// What the experts of `segments`, which are adjacent, make of the rows of `x`: theirs of `rows`, in sorted order.
    fn experts_of(
        &self,
        source: Source,
        x: &Tensor,
        sorted: &Sorted,
        segments: &[Segment],
        moe: &Moe<Self>,
        rows: &mut Tensor,
    ) {
        let (Some(start), Some(end)) = (segments.first(), segments.last()) else {
            return;
        };
        let (first, end) = (start.first, end.first + end.n_rows);
        let within = |segment: &Segment| Segment {
            first: segment.first - first,
            first_group: segment.first_group - start.first_group,
            ..*segment
        };
        let segments: &[Segment] = &segments.iter().map(within).collect::<Vec<_>>();
        let (n_rows, n_ffn, n_experts) = (end - first, moe.n_ffn, moe.routing.n_experts);
        let rows = &mut rows.data[first * x.n_cols..end * x.n_cols];
        let [gate, up, down] = moe.layers().map(|layer| &layer.weight);
        let kernels = [gate, up, down].map(|weight| weight.kernels.of(self.step));
        let token = |i: usize| x.row(sorted.tokens[first + i] as usize);
        let formats = [kernels[GATE].acts(), kernels[UP].acts()];
        let joined = match moe.down_by_neuron {
            true => None,
            false => gated(self.step, moe.layers(), of_matrix),
        };
        let group = Group {
            cpu: self,
            source,
            segments,
            max_groups: max_groups(n_rows, n_experts),
            n_rows,
        };
        let inputs = group.acts(x.n_cols, &formats, &token);
        let acts = inputs.acts();
        let down = (down, DOWN, kernels[DOWN]);
        if let Some(kernel) = joined {
            let n_chunks = n_ffn / BF16_LEN;
            let mut h = self
                .scratch
                .take(bf16_floats(group.max_groups * BF16_TOKENS, n_ffn));
            let h: &mut [[Tile; 2]] = bytemuck::cast_slice_mut(&mut h);
            let mut outputs = outputs(h, n_chunks, segments, Segment::n_groups);
            let grain = (n_chunks / (4 * self.pool.n_threads())).clamp(1, 4);
            self.pool
                .run_tiles(&mut outputs, (usize::MAX, grain), &|tile| {
                    let segment = &segments[tile.which];
                    let at = (segment.expert, n_ffn);
                    let first = tile.first_col * BF16_LEN;
                    let rows = first..first + tile.out.n_cols() * BF16_LEN;
                    source.read((gate, GATE), at, rows.clone(), |gate| {
                        source.read((up, UP), at, rows, |up| {
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
            group.products(&acts, [down], [(rows, x.n_cols)]);
            return;
        }
        let mut g = self.tensor(n_rows, n_ffn);
        let mut u = self.tensor(n_rows, n_ffn);
        let pair = [(gate, GATE, kernels[GATE]), (up, UP, kernels[UP])];
        group.products(&acts, pair, [(&mut g.data, n_ffn), (&mut u.data, n_ffn)]);
        let glu = self.operations.glu;
        self.for_rows(&mut g, &|i, gate| glu.run(moe.activation, gate, u.row(i)));
        drop(u);
        if moe.down_by_neuron {
            self.by_neuron(source, &g.data, segments, moe, rows);
            return;
        }
        // As floats they are in order already.
        let formats = [down.2.acts()];
        let formats = &formats[..usize::from(formats[0] != ActFormat::F32)];
        let inputs = group.acts(n_ffn, formats, &|i| g.row(i));
        let acts = SortedActs {
            f32: &g.data,
            ..inputs.acts()
        };
        group.products(&acts, [down], [(rows, x.n_cols)]);
    }

    /// `rows[t] += sum_i h[t, i] down[i]`, where a row of `down` is what a neuron adds; neurons that are 0 are skipped.
    fn by_neuron(
        &self,
        source: Source,
        h: &[f32],
        segments: &[Segment],
        moe: &Moe<Self>,
        rows: &mut [f32],
    ) {
        /// Weights that are made floats at once.
        const LEN: usize = 256;
        let (down, n_ffn) = (&moe.down.weight, moe.n_ffn);
        let (n, block) = (down.n_in, down.dtype.block_len());
        let mut outputs = outputs(rows, n, segments, |segment| segment.n_rows);
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
                    let floats = &mut floats[..n_cols];
                    source.read((down, DOWN), (segment.expert, n_ffn), i..i + 1, |row| {
                        quant::dequantize(down.dtype, &row[bytes.clone()], floats);
                    });
                    for (t, h) in (0..n_rows).map(|t| (t, h(t))).filter(|(_, h)| *h != 0.0) {
                        let sums = tile.out.row(t).iter_mut().zip(&*floats);
                        sums.for_each(|(sum, w)| *sum = h.mul_add(*w, *sum));
                    }
                }
            });
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

/// Some adjacent segments of a sorted batch, their rows counted from the first.
struct Group<'a> {
    cpu: &'a Cpu,
    source: Source<'a>,
    segments: &'a [Segment],
    n_rows: usize,
    max_groups: usize,
}

/// The parts of `data`, `(_, n_cols)`, that belong to `segments`, each of as many rows as `n_rows` says.
fn outputs<'a, T>(
    data: &'a mut [T],
    n_cols: usize,
    segments: &[Segment],
    n_rows: impl Fn(&Segment) -> usize,
) -> Vec<Output<'a, T>> {
    let mut rest = data;
    let mut outputs = Vec::with_capacity(segments.len());
    for segment in segments {
        let (part, after) = rest.split_at_mut(n_rows(segment) * n_cols);
        outputs.push(Output::new(part, n_cols));
        rest = after;
    }
    outputs
}

impl Group<'_> {
    /// `outs[i] = acts weights[i]^T`, each segment with its expert's rows.
    fn products<const N: usize>(
        &self,
        acts: &SortedActs,
        weights: [(&Matrix, usize, Ready<MatMul>); N],
        outs: [(&mut [f32], usize); N],
    ) {
        let n_segments = self.segments.len();
        let n_cols = outs.first().map_or(0, |(_, n_cols)| *n_cols);
        let parts = |(out, n_cols)| outputs(out, n_cols, self.segments, |s| s.n_rows);
        let mut outputs: Vec<_> = outs.into_iter().flat_map(parts).collect();
        let pool = &self.cpu.pool;
        // Whole pairs of panels of the GEMM kernels; a few tasks a thread over all experts.
        let grain = (outputs.len() * n_cols / (8 * pool.n_threads()))
            .clamp(32, MAX_TASK_ROWS)
            .next_multiple_of(32);
        pool.run_tiles(&mut outputs, (usize::MAX, grain), &|mut tile| {
            let segment = &self.segments[tile.which % n_segments];
            let (weight, part, kernel) = weights[tile.which / n_segments];
            let rows = tile.first_col..tile.first_col + tile.out.n_cols();
            self.source
                .read((weight, part), (segment.expert, n_cols), rows, |rows| {
                    kernel.run(rows, &acts.of(segment), &mut tile.out);
                });
        });
    }

    /// The rows `row(i)`, in the formats asked for.
    fn acts<'x>(
        &self,
        n_in: usize,
        formats: &[ActFormat],
        row: &(dyn Fn(usize) -> &'x [f32] + Sync),
    ) -> SortedBuffers {
        let cpu = self.cpu;
        let asked = |format| formats.contains(&format);
        let q8 = asked(ActFormat::Q8).then(|| cpu.quantize(self.n_rows, n_in, row));
        let f32 = asked(ActFormat::F32).then(|| {
            let mut rows = cpu.scratch.take(self.n_rows * n_in);
            cpu.pool
                .run_pieces(&mut rows, n_in, &|i, out| out.copy_from_slice(row(i)));
            rows
        });
        let bf16 = asked(ActFormat::Bf16).then(|| {
            let floats = bf16_floats(self.max_groups * BF16_TOKENS, n_in);
            let mut tiles = cpu.scratch.take(floats);
            // Taken first what tasks will take, so that it is there whichever thread is faster.
            let len = BF16_TOKENS * n_in;
            let taken = (0..cpu.pool.n_threads()).map(|_| cpu.scratch.take(len));
            drop(taken.collect::<Vec<_>>());
            let n_groups = self
                .segments
                .last()
                .map_or(0, |s| s.first_group + s.n_groups());
            let used = &mut bytemuck::cast_slice_mut(&mut tiles)[..n_groups * (n_in / BF16_LEN)];
            cpu.pool.run_pieces(used, n_in / BF16_LEN, &|g, group| {
                let at = self.segments.partition_point(|s| s.first_group <= g) - 1;
                let segment = &self.segments[at];
                let first = (g - segment.first_group) * BF16_TOKENS;
                let n = BF16_TOKENS.min(segment.n_rows - first);
                let mut rows = cpu.scratch.take(len);
                for (i, out) in rows.chunks_exact_mut(n_in).take(n).enumerate() {
                    out.copy_from_slice(row(segment.first + first + i));
                }
                cpu.operations.pack_bf16.run(&rows[..n * n_in], n_in, group);
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
}

/// How far an expert of a token is.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Named,
    Gated,
    Done,
}

/// The experts of one token.
struct Token<'a> {
    cpu: &'a Cpu,
    source: Source<'a>,
    x: &'a [f32],
    /// The same in 8 bits, if a kernel asks for them.
    x_q8: Option<Buffer>,
    ids: &'a [f32],
    moe: &'a Moe<Cpu>,
    kernels: [Ready<MatMul>; 3],
    /// A neuron whose gate is 0 needs no other product.
    picked: Option<Ready<Picked>>,
    /// Neurons of a task.
    chunk: usize,
    /// For each expert, chunk by chunk: the products of the gate, then those of up. What comes of them lies where the
    /// former were.
    h: Buffer,
    /// `(n_used, hidden)`.
    rows: Tensor,
}

/// The neurons of a token's experts, each expert's together.
#[derive(Clone, Copy)]
struct Neurons<'h> {
    h: &'h [f32],
    stride: usize,
    n_ffn: usize,
}

/// Those in a [`Token::h`].
fn neurons(h: &[f32], n_ffn: usize, chunk: usize) -> Neurons<'_> {
    Neurons {
        h,
        stride: n_ffn.div_ceil(chunk) * 2 * chunk,
        n_ffn,
    }
}

impl<'h> Neurons<'h> {
    fn expert(self, j: usize) -> &'h [f32] {
        &self.h[j * self.stride..][..self.n_ffn]
    }
}

impl<'a> Token<'a> {
    fn new(
        cpu: &'a Cpu,
        source: Source<'a>,
        x: &'a [f32],
        ids: &'a [f32],
        moe: &'a Moe<Cpu>,
    ) -> Self {
        let weights = moe.layers().map(|layer| &layer.weight);
        let kernels = weights.map(|weight| weight.kernels.of(Step::Decode));
        let asked = kernels[..2].iter().any(|k| k.acts() == ActFormat::Q8);
        let row_bytes = weights[GATE].row_bytes.max(weights[UP].row_bytes);
        let n_tasks = n_chunks(ids.len(), cpu.pool.n_threads());
        let chunk = chunk_rows(moe.n_ffn, row_bytes, n_tasks);
        let is_relu = moe.activation == Activation::Relu;
        Self {
            x_q8: asked.then(|| cpu.quantize(1, x.len(), &|_| x)),
            picked: weights[UP].kernels.picked.filter(|_| is_relu),
            h: cpu
                .scratch
                .take(ids.len() * moe.n_ffn.div_ceil(chunk) * 2 * chunk),
            rows: cpu.tensor(ids.len(), x.len()),
            cpu,
            source,
            x,
            ids,
            moe,
            kernels,
            chunk,
        }
    }

    /// Computes the neurons of some experts.
    fn gate_up(&mut self, which: &[bool; MAX_USED]) {
        let (n_ffn, chunk, ids, source) = (self.moe.n_ffn, self.chunk, self.ids, self.source);
        let [gate, up, _] = self.moe.layers().map(|layer| &layer.weight);
        let (kernels, picked, activation) = (self.kernels, self.picked, self.moe.activation);
        let acts = Acts {
            n_tokens: 1,
            n_in: self.x.len(),
            f32: self.x,
            q8: self.x_q8.as_deref().map_or(&[], bytemuck::cast_slice),
            bf16: &[],
        };
        let n_chunks = n_ffn.div_ceil(chunk);
        let glu = self.cpu.operations.glu;
        self.cpu
            .pool
            .run_pieces(&mut self.h, 2 * chunk, &|i, piece| {
                let (j, first) = (i / n_chunks, i % n_chunks * chunk);
                if !which[j] {
                    return;
                }
                let n = chunk.min(n_ffn - first);
                let (at, rows) = ((ids[j] as usize, n_ffn), first..first + n);
                let (g, u) = piece.split_at_mut(chunk);
                let (g, u) = (&mut g[..n], &mut u[..n]);
                source.read((gate, GATE), at, rows.clone(), |w| {
                    kernels[GATE].run(w, &acts, &mut OutCols::whole(g, n));
                });
                if let Some(picked) = picked {
                    let mut picks = [0; MAX_CHUNK];
                    let n = picks_of(g, &mut picks);
                    source.read((up, UP), at, rows, |w| {
                        picked.run(w, &picks[..n], &acts, &mut u[..n]);
                    });
                    relu_picked(g, &picks[..n], u);
                    return;
                }
                source.read((up, UP), at, rows, |w| {
                    kernels[UP].run(w, &acts, &mut OutCols::whole(u, n));
                });
                glu.run(activation, g, u);
            });
        // Each expert's neurons together.
        for j in (0..ids.len()).filter(|j| which[*j]) {
            let expert = &mut self.h[j * n_chunks * 2 * chunk..][..n_chunks * 2 * chunk];
            for c in 1..n_chunks {
                let from = c * 2 * chunk;
                expert.copy_within(from..from + chunk.min(n_ffn - c * chunk), c * chunk);
            }
        }
    }

    /// Computes the rows of some experts, whose neurons are there.
    fn down(&mut self, which: &[bool; MAX_USED]) {
        let (ids, source, cpu) = (self.ids, self.source, self.cpu);
        let (down, n_ffn) = (&self.moe.down.weight, self.moe.n_ffn);
        let (kernel, n) = (self.kernels[DOWN], self.x.len());
        let h = neurons(&self.h, self.moe.n_ffn, self.chunk);
        let rows = &mut self.rows.data;
        if self.moe.down_by_neuron {
            for (j, row) in rows
                .chunks_exact_mut(n)
                .enumerate()
                .filter(|(j, _)| which[*j])
            {
                let segment = [one(ids[j] as usize)];
                cpu.by_neuron(source, h.expert(j), &segment, self.moe, row);
            }
            return;
        }
        let asked = kernel.acts() == ActFormat::Q8;
        let q8 = asked.then(|| cpu.quantize(ids.len(), n_ffn, &|j| h.expert(j)));
        let q8: &[u8] = q8.as_deref().map_or(&[], bytemuck::cast_slice);
        let row_bytes = Q8Row::bytes(n_ffn);
        let n_tasks = n_chunks(ids.len(), cpu.pool.n_threads());
        let grain = chunk_rows(n, down.row_bytes, n_tasks);
        let mut outputs = [Output::new(rows, n)];
        cpu.pool.run_tiles(&mut outputs, (1, grain), &|mut tile| {
            let (j, first) = (tile.first_row, tile.first_col);
            if !which[j] {
                return;
            }
            let acts = Acts {
                n_tokens: 1,
                n_in: n_ffn,
                f32: h.expert(j),
                q8: if asked {
                    &q8[j * row_bytes..][..row_bytes]
                } else {
                    &[]
                },
                bf16: &[],
            };
            let rows = first..first + tile.out.n_cols();
            source.read((down, DOWN), (ids[j] as usize, n), rows, |w| {
                kernel.run(w, &acts, &mut tile.out);
            });
        });
    }

    /// Neurons for which a product was saved.
    fn n_skipped(&self) -> usize {
        if self.picked.is_none() && !self.moe.down_by_neuron {
            return 0;
        }
        let h = neurons(&self.h, self.moe.n_ffn, self.chunk);
        let zeros = |j: usize| h.expert(j).iter().filter(|h| **h == 0.0).count();
        (0..self.ids.len()).map(zeros).sum()
    }
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

/// One row alone.
fn one(expert: usize) -> Segment {
    Segment {
        expert,
        first: 0,
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
