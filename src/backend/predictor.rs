//! DHSA's predictor of boundaries (arXiv:2510.24606, first version): how likely a chunk of keys ends at a gap, from the
//! [`SIDE`] keys on each side of it, `x` (2 [`SIDE`], width), those of all heads of a layer side by side.
//!
//! ```text
//! q, k, v = Wqkv x + bqkv                                           (2 SIDE, width) each, in heads
//! E = LayerNorm(sum over heads of Wo softmax(q k^T / sqrt(n)) v + bo)    n = width / heads
//! a, b = means of the first and of the last SIDE rows of E
//! logit = W2 relu(W1 [a, b, |a - b|, a b, cos(a, b)] + c1) + c2
//! ```
//!
//! As published it sees keys as the cache has them: rotated, in the cache's type. `Wo` is applied to the values of each
//! head before these are weighed, once for all gaps that see them. One network serves all layers of a model.

use std::fmt;
use std::ops::{Range, RangeInclusive};

use xxhash_rust::xxh3::xxh3_64;

use super::cpu::table::{MULTIPLY_PANELS, MultiplyPanels, PANEL_ROWS, PanelProducts, Ready};

/// Keys on each side of a gap.
pub const SIDE: usize = 4;

/// Keys that tell of a gap.
const SEEN: usize = 2 * SIDE;

/// Gaps whose logits are computed together at most.
const GAPS: usize = 32;

/// As the published code has it.
const NORM_EPS: f32 = 1e-5;

/// The sizes of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Floats of the keys of a position.
    pub width: usize,
    /// Heads of its attention.
    pub n_heads: usize,
    /// Outputs of its first layer.
    pub n_hidden: usize,
}

/// Names of the parameters, in their order.
pub const PARTS: [&str; 10] = [
    "attn_qkv.weight",
    "attn_qkv.bias",
    "attn_output.weight",
    "attn_output.bias",
    "norm.weight",
    "norm.bias",
    "ffn_up.weight",
    "ffn_up.bias",
    "ffn_down.weight",
    "ffn_down.bias",
];

impl Shape {
    /// Inputs of the first layer.
    pub fn n_features(self) -> usize {
        4 * self.width + 1
    }

    /// Channels of a head.
    pub fn head_dim(self) -> usize {
        self.width / self.n_heads
    }

    /// Sizes of the [`PARTS`], the contiguous one first. `Wo` has the columns of each head apart.
    pub fn dims(self) -> [[usize; 3]; PARTS.len()] {
        let (width, hidden) = (self.width, self.n_hidden);
        [
            [width, 3 * width, 1],
            [3 * width, 1, 1],
            [self.head_dim(), width, self.n_heads],
            [width, 1, 1],
            [width, 1, 1],
            [width, 1, 1],
            [self.n_features(), hidden, 1],
            [hidden, 1, 1],
            [hidden, 1, 1],
            [1, 1, 1],
        ]
    }

    /// Where the [`PARTS`] are among all parameters.
    pub fn ranges(self) -> [Range<usize>; PARTS.len()] {
        let mut at = 0;
        self.dims().map(|dims| {
            let start = at;
            at += dims.iter().product::<usize>();
            start..at
        })
    }

    /// All parameters.
    pub fn n_params(self) -> usize {
        self.ranges()[PARTS.len() - 1].end
    }

    /// The [`PARTS`] of all parameters.
    pub fn split(self, params: &[f32]) -> [&[f32]; PARTS.len()] {
        self.ranges().map(|range| &params[range])
    }

    /// Lengths of the fields of a [`Run`] over `n` gaps.
    fn run(self, n: usize) -> [usize; 8] {
        let (n_rows, width) = (n + SEEN - 1, padded(self.width));
        [
            n_rows * padded(3 * self.width),
            n_rows * self.head_dim(),
            n_rows * width,
            n_rows * width * self.n_heads,
            SEEN * SEEN * self.n_heads,
            SEEN * self.width,
            n * self.n_features(),
            n * padded(self.n_hidden),
        ]
    }

    /// Floats of the room that [`Predictor::best_end`] needs for `n` gaps.
    pub fn room(self, n: usize) -> usize {
        self.run(n.min(GAPS)).iter().sum()
    }
}

fn padded(n: usize) -> usize {
    n.next_multiple_of(PANEL_ROWS)
}

/// What lies between the keys around some adjacent gaps and their logits. Rows of matrices are padded to whole panels.
pub struct Run<'a> {
    /// How many gaps.
    pub n: usize,
    /// `(n_rows, 3 width)`, for the `n + 7` keys.
    pub qkv: &'a mut [f32],
    values: &'a mut [f32],
    of_head: &'a mut [f32],
    /// `Wo v` of each head, `(n_panels, n_rows, n_heads, PANEL_ROWS)`.
    pub mixed: &'a mut [f32],
    /// Attention at the last gap, `(8, 8, n_heads)`.
    pub weights: &'a mut [f32],
    /// What is normed there, before its gain, `(8, width)`.
    pub rows: &'a mut [f32],
    /// `(n, n_features)`.
    pub features: &'a mut [f32],
    /// After the relu, `(n, n_hidden)`.
    pub hidden: &'a mut [f32],
}

impl<'a> Run<'a> {
    /// In `room`, which is as long as [`Shape::room`] of `n` says.
    pub fn new(shape: Shape, n: usize, mut room: &'a mut [f32]) -> Self {
        let [qkv, values, of_head, mixed, weights, rows, features, hidden] = shape
            .run(n)
            .map(|len| room.split_off_mut(..len).expect("as long as was asked for"));
        Self {
            n,
            qkv,
            values,
            of_head,
            mixed,
            weights,
            rows,
            features,
            hidden,
        }
    }

    /// What is mixed, `(n_rows, n_heads, width)`.
    pub fn mixed_rows(&self, shape: Shape) -> Vec<f32> {
        let per_panel = self.mixed.len() / (padded(shape.width) / PANEL_ROWS);
        let mut rows = Vec::with_capacity(self.mixed.len());
        for at in (0..per_panel).step_by(PANEL_ROWS) {
            for c in 0..shape.width {
                rows.push(self.mixed[c / PANEL_ROWS * per_panel + at + c % PANEL_ROWS]);
            }
        }
        rows
    }
}

/// A network with its parameters.
#[derive(Clone)]
pub struct Predictor {
    /// Tells the model whose keys it knows.
    pub model: u128,
    /// Tells it from others.
    pub hash: u64,
    shape: Shape,
    params: Vec<f32>,
    /// Matrices as they are multiplied: `Wqkv`, `Wo` of each head one after the other, `W1`.
    panels: [Vec<f32>; 3],
    kernel: Ready<MultiplyPanels>,
}

impl fmt::Debug for Predictor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Predictor {:016x} {:?}", self.hash, self.shape)
    }
}

impl PartialEq for Predictor {
    fn eq(&self, other: &Self) -> bool {
        (self.model, self.hash) == (other.model, other.hash)
    }
}

/// Rows of `n_in` in panels of sixteen side by side, the last filled with zeros.
fn turned(rows: &[f32], n_in: usize) -> Vec<f32> {
    let mut panels = vec![0.0; padded(rows.len() / n_in) * n_in];
    for (i, row) in rows.chunks_exact(n_in).enumerate() {
        let panel = &mut panels[i / PANEL_ROWS * PANEL_ROWS * n_in..];
        let column = panel[i % PANEL_ROWS..].iter_mut().step_by(PANEL_ROWS);
        column.zip(row).for_each(|(out, x)| *out = *x);
    }
    panels
}

/// `a . b`, in eight sums.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (a8, b8) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a8.0.iter().zip(b8.0) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest = a8.1.iter().zip(b8.1).map(|(a, b)| a * b);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// The sum of `x`, in eight sums.
fn sum(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (x8, rest) = x.as_chunks::<8>();
    for x in x8 {
        for i in 0..8 {
            sums[i] += x[i];
        }
    }
    sums.iter().chain(rest).sum()
}

impl Predictor {
    /// Of the model that `model` tells; `params` are as [`Shape::ranges`] says.
    pub fn new(model: u128, shape: Shape, params: Vec<f32>) -> Self {
        assert_eq!(params.len(), shape.n_params(), "parameters of {shape:?}");
        let [qkv, _, out, .., up, _, _, _] = shape.split(&params);
        let n = shape.head_dim();
        let heads = out.chunks_exact(shape.width * n);
        let panels = [
            turned(qkv, shape.width),
            heads.flat_map(|head| turned(head, n)).collect(),
            turned(up, shape.n_features()),
        ];
        Self {
            model,
            hash: xxh3_64(bytemuck::cast_slice(&params)) ^ shape.n_heads as u64,
            shape,
            panels,
            params,
            kernel: Ready::best(MULTIPLY_PANELS.iter()).expect("the table ends with a scalar row"),
        }
    }

    /// Its sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// All parameters.
    pub fn params(&self) -> &[f32] {
        &self.params
    }

    fn multiply(&self, queries: &[f32], n_in: usize, panels: &[f32], out: &mut [f32]) {
        self.kernel.run(&mut PanelProducts {
            queries,
            n_in,
            panels,
            out,
        });
    }

    /// The logits of the gaps after the fourth of `keys`, `(n + 7, width)`, and of those after it.
    pub fn logits(&self, keys: &[f32], run: &mut Run, logits: &mut [f32]) {
        let shape = self.shape;
        let (width, n, n_heads) = (shape.width, shape.head_dim(), shape.n_heads);
        let [
            _,
            qkv_bias,
            ..,
            norm,
            norm_bias,
            _,
            up_bias,
            down,
            down_bias,
        ] = shape.split(&self.params);
        self.multiply(keys, width, &self.panels[0], run.qkv);
        let qkv_cols = padded(3 * width);
        for row in run.qkv.chunks_exact_mut(qkv_cols) {
            row.iter_mut().zip(qkv_bias).for_each(|(x, b)| *x += b);
        }
        let n_rows = run.n + SEEN - 1;
        for head in 0..n_heads {
            let values = run.values.chunks_exact_mut(n);
            for (value, row) in values.zip(run.qkv.chunks_exact(qkv_cols)) {
                value.copy_from_slice(&row[2 * width + head * n..][..n]);
            }
            let panels = padded(width) * n;
            let panels = &self.panels[1][head * panels..][..panels];
            self.multiply(run.values, n, panels, run.of_head);
            for (i, x) in run.of_head.as_chunks::<PANEL_ROWS>().0.iter().enumerate() {
                let (row, panel) = (
                    i / (padded(width) / PANEL_ROWS),
                    i % (padded(width) / PANEL_ROWS),
                );
                let at = (panel * n_rows + row) * n_heads + head;
                run.mixed[at * PANEL_ROWS..][..PANEL_ROWS].copy_from_slice(x);
            }
        }
        for gap in 0..run.n {
            self.attend(run, gap);
            let features = &mut run.features[gap * shape.n_features()..][..shape.n_features()];
            let (a, rest) = features.split_at_mut(width);
            let (b, rest) = rest.split_at_mut(width);
            let sides = run.rows.chunks_exact(SIDE * width);
            for (mean, rows) in [&mut *a, &mut *b].into_iter().zip(sides) {
                mean.copy_from_slice(&rows[..width]);
                for row in rows.chunks_exact(width).skip(1) {
                    mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
                let gained = mean.iter_mut().zip(norm).zip(norm_bias);
                gained.for_each(|((x, gain), b)| *x = *x / SIDE as f32 * gain + b);
            }
            for c in 0..width {
                rest[c] = (a[c] - b[c]).abs();
                rest[width + c] = a[c] * b[c];
            }
            rest[2 * width] = dot(a, b) / norms(a, b);
        }
        self.multiply(
            run.features,
            shape.n_features(),
            &self.panels[2],
            run.hidden,
        );
        let hidden = run.hidden.chunks_exact_mut(padded(shape.n_hidden));
        for (hidden, logit) in hidden.zip(logits) {
            let hidden = &mut hidden[..shape.n_hidden];
            let biased = hidden.iter_mut().zip(up_bias);
            biased.for_each(|(x, b)| *x = (*x + b).max(0.0));
            *logit = dot(hidden, down) + down_bias[0];
        }
    }

    /// Fills `run.weights` and `run.rows` for a gap; of each row what it was divided by when it was normed, inverted.
    pub fn attend(&self, run: &mut Run, gap: usize) -> [f32; SEEN] {
        let (width, n_heads) = (self.shape.width, self.shape.n_heads);
        let n = self.shape.head_dim();
        let qkv = &run.qkv[gap * padded(3 * width)..];
        let row = |i: usize, part: usize, head: usize| {
            &qkv[i * padded(3 * width) + part * width + head * n..][..n]
        };
        let scale = 1.0 / (n as f32).sqrt();
        for i in 0..SEEN {
            for head in 0..n_heads {
                let q = row(i, 0, head);
                let scores: [f32; SEEN] = std::array::from_fn(|j| dot(q, row(j, 1, head)) * scale);
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers = scores.map(|score| (score - max).exp());
                let inverse = 1.0 / powers.iter().sum::<f32>();
                for (j, power) in powers.into_iter().enumerate() {
                    run.weights[(i * SEEN + j) * n_heads + head] = power * inverse;
                }
            }
        }
        let (n_rows, bias) = (run.n + SEEN - 1, self.shape.split(&self.params)[3]);
        for (i, bias) in bias.chunks(PANEL_ROWS).enumerate() {
            let first = (i * n_rows + gap) * n_heads * PANEL_ROWS;
            let mixed = &run.mixed[first..][..SEEN * n_heads * PANEL_ROWS];
            let mut out = [0.0; SEEN * PANEL_ROWS];
            self.multiply(run.weights, SEEN * n_heads, mixed, &mut out);
            let rows = run.rows.chunks_exact_mut(width);
            for (row, out) in rows.zip(out.chunks_exact(PANEL_ROWS)) {
                let row = row[i * PANEL_ROWS..].iter_mut().zip(out).zip(bias);
                row.for_each(|((x, out), b)| *x = out + b);
            }
        }
        std::array::from_fn(|i| {
            let row = &mut run.rows[i * width..][..width];
            let mean = sum(row) / width as f32;
            row.iter_mut().for_each(|x| *x -= mean);
            let inverse = 1.0 / (dot(row, row) / width as f32 + NORM_EPS).sqrt();
            row.iter_mut().for_each(|x| *x *= inverse);
            inverse
        })
    }

    /// The length among `ends`, the first of equals, of a chunk of `keys`, `(n, width)`, that ends there most likely.
    /// `room` is as [`Shape::room`] says.
    pub fn best_end(&self, keys: &[f32], ends: RangeInclusive<usize>, room: &mut [f32]) -> usize {
        let (mut best, mut at) = ((f32::NEG_INFINITY, *ends.start()), *ends.start());
        while at <= *ends.end() {
            let n = (ends.end() + 1 - at).min(GAPS);
            let seen = (at - SIDE) * self.shape.width..(at + n + SIDE - 1) * self.shape.width;
            let mut logits = [0.0; GAPS];
            self.logits(
                &keys[seen],
                &mut Run::new(self.shape, n, room),
                &mut logits[..n],
            );
            for (i, logit) in logits[..n].iter().enumerate() {
                if *logit > best.0 {
                    best = (*logit, at + i);
                }
            }
            at += n;
        }
        best.1
    }
}

/// The product of two lengths.
pub fn norms(a: &[f32], b: &[f32]) -> f32 {
    (dot(a, a) * dot(b, b)).sqrt().max(1e-8)
}
