//! Training of DHSA's predictor of boundaries ([`Predictor`]), from what a model does with a text, and its file.
//!
//! Labels as published: a chunk ends at a gap if later queries attend to the [`SIDE`] keys on one side at least
//! [`LEAST_RATIO`] times as much as to those on the other, with the dense attention of all heads of a layer averaged. Of the
//! queries one in [`LABEL_EVERY`] is asked, all that come after the gap in a window of the text. Gaps whose labels these
//! are not enough for, at both ends of a window, are left out. The loss is focal binary cross entropy, the optimizer Adam.
//! Everything follows from the model, the text and a fixed seed.
//!
//! The file is GGUF with the [`PARTS`] as floats, and these keys: `dhsa.model`, the hash of the model's weights, and
//! `dhsa.heads`.

mod backward;

use std::ops::{ControlFlow, Range};
use std::path::Path;

use super::Model;
use super::record::record;
use crate::backend::predictor::{PARTS, Predictor, Run, SIDE, Shape, dot};
use crate::backend::select::{Ask, LABEL_AHEAD, LABEL_EVERY};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, Metadata, TensorSpec, Writer};
use crate::quant::DType;
use crate::sampler::Rng;

/// Tokens of a text that suffice.
pub const DEFAULT_TOKENS: usize = 16384;

/// A gap where the attention to its sides is so many times as much is a boundary.
pub const LEAST_RATIO: f64 = 2.0;

/// As published: the loss of what is already told right counts less, that of boundaries more.
const FOCUS: i32 = 2;
const POSITIVE_WEIGHT: f64 = 1.3;

/// As published: outputs of the first layer.
const N_HIDDEN: usize = 256;

/// Heads of its attention, where the width of keys is a multiple.
const N_HEADS: usize = 4;

/// Tokens that are read together.
const WINDOW: usize = 1024;

/// Gaps that are computed together.
const RUN: usize = 24;

/// Runs between two steps of the optimizer.
const BATCH: usize = 16;

/// Threads that share a batch: a number of its own, so that sums do not depend on the machine.
const SHARES: usize = 4;

const EPOCHS: usize = 2;

/// Size of the first step; it shrinks to nothing.
const RATE: f64 = 3e-4;

const SEED: u64 = 1;

const ARCHITECTURE: &str = "dhsa-predictor";

/// Reads what [`write()`] wrote.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`].
pub fn read(path: &Path) -> Result<Predictor> {
    let bad = |what: String| Error::BadFile {
        path: path.into(),
        what,
    };
    let of_file = |error: Error| match error {
        Error::BadModel(what) => bad(what),
        other => other,
    };
    let gguf = Gguf::open(path)?;
    let metadata = gguf.metadata();
    let architecture = gguf.architecture().map_err(of_file)?;
    if architecture != ARCHITECTURE {
        return Err(bad(format!(
            "general.architecture: expected {ARCHITECTURE}, found {architecture}"
        )));
    }
    let model = metadata.str("dhsa.model").map_err(of_file)?;
    let model = u128::from_str_radix(model, 16)
        .map_err(|_| bad(format!("dhsa.model: expected a hash, found {model}")))?;
    let dims = |name: &str| match gguf.tensor(name) {
        Some(tensor) => Ok(tensor.dims().to_vec()),
        None => Err(bad(format!("tensor {name}: expected one, found none"))),
    };
    let shape = Shape {
        width: dims("norm.weight")?[0],
        n_heads: metadata.usize("dhsa.heads").map_err(of_file)?,
        n_hidden: dims("ffn_down.weight")?[0],
    };
    // Both bound what is multiplied below by what is in the file.
    if shape.n_heads == 0 || !shape.width.is_multiple_of(shape.n_heads) {
        return Err(bad(format!(
            "dhsa.heads: expected a divisor of {}, the width of keys, found {}",
            shape.width, shape.n_heads
        )));
    }
    let mut params = Vec::new();
    for (name, expected) in PARTS.into_iter().zip(shape.dims()) {
        let (found, expected) = (dims(name)?, trimmed(&expected));
        if trimmed(&found) != expected {
            return Err(bad(format!(
                "tensor {name}: expected shape {expected:?}, found {found:?}"
            )));
        }
        let tensor = gguf.load(name).map_err(of_file)?;
        if tensor.dtype != DType::F32 {
            let found = tensor.dtype.name();
            return Err(bad(format!("tensor {name}: expected f32, found {found}")));
        }
        let (floats, _) = tensor.data.as_chunks::<4>();
        params.extend(floats.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    }
    match params.iter().find(|x| !x.is_finite()) {
        Some(x) => Err(bad(format!("expected finite numbers, found {x}"))),
        None => Ok(Predictor::new(model, shape, params)),
    }
}

/// Without the ones at the end.
fn trimmed(dims: &[usize]) -> &[usize] {
    let n = dims.iter().rposition(|n| *n != 1).unwrap_or(0);
    &dims[..=n]
}

/// Writes `predictor` to `path`.
///
/// # Errors
/// [`Error::Io`].
pub fn write(predictor: &Predictor, path: &Path) -> Result<()> {
    let shape = predictor.shape();
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", ARCHITECTURE);
    metadata.set("dhsa.model", format!("{:032x}", predictor.model));
    metadata.set("dhsa.heads", shape.n_heads as u32);
    let specs = PARTS.into_iter().zip(shape.dims());
    let specs = specs.map(|(name, dims)| TensorSpec::new(name, DType::F32, trimmed(&dims)));
    let mut writer = Writer::create(path, &metadata, &specs.collect::<Vec<_>>())?;
    for part in shape.split(predictor.params()) {
        let bytes: Vec<u8> = part.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.tensor(&bytes)?;
    }
    writer.finish()
}

/// What a window of text leaves of a layer.
#[derive(Default)]
struct Recorded {
    /// `(n_kv_heads, n, head_dim)`.
    keys: Vec<f32>,
    n_kv_heads: usize,
    /// Attention to all keys, from one position in [`LABEL_EVERY`]: what it sees, and of each head the scaled query.
    queries: Vec<(Range<usize>, Vec<f32>)>,
}

/// What is learnt from: the keys of a layer in a window of text, and whether chunks end before these.
struct Example {
    /// `(n, width)`.
    keys: Vec<f32>,
    labels: Vec<bool>,
}

impl Recorded {
    /// Takes the queries that are asked, and all keys with the last of them.
    fn add(&mut self, ask: &Ask, is_last: bool) {
        if ask.kv_head > 0 || !is_last && !ask.position.is_multiple_of(LABEL_EVERY) {
            return;
        }
        let q = ask.q.iter().map(|q| q * ask.attention.scale).collect();
        self.queries.push((ask.seen.clone(), q));
        if is_last {
            self.n_kv_heads = ask.attention.n_kv_heads;
            let heads = (0..self.n_kv_heads).map(|head| ask.chunks.sums(head));
            self.keys = heads.collect::<Vec<_>>().concat();
        }
    }

    fn example(mut self, n: usize) -> Example {
        // Threads ask in any order; sums must not.
        self.queries.sort_by_key(|(seen, _)| seen.end);
        let head_dim = self.keys.len() / (n * self.n_kv_heads);
        let mut sides = vec![[0.0f64; 2]; n];
        for (seen, q) in &self.queries {
            let row = self.attention(n, seen, q);
            // Those of which it sees both sides.
            let told = sides.iter_mut().enumerate();
            let told = told.take((seen.end + 1).saturating_sub(SIDE));
            for (end, [past, future]) in told.skip(seen.start + SIDE) {
                let sum = |keys: Range<usize>| row[keys].iter().sum::<f64>();
                *past += sum(end - SIDE..end);
                *future += sum(end..end + SIDE);
            }
        }
        let is_boundary = |[past, future]: &[f64; 2]| {
            (past.max(*future) + 1e-6) / (past.min(*future) + 1e-6) >= LEAST_RATIO
        };
        let width = self.n_kv_heads * head_dim;
        let mut keys = vec![0.0; n * width];
        for (head, of_head) in self.keys.chunks_exact(n * head_dim).enumerate() {
            for (row, key) in keys
                .chunks_exact_mut(width)
                .zip(of_head.chunks_exact(head_dim))
            {
                row[head * head_dim..][..head_dim].copy_from_slice(key);
            }
        }
        Example {
            keys,
            labels: sides.iter().map(is_boundary).collect(),
        }
    }

    /// The mean over heads of the attention of a query to each key.
    fn attention(&self, n: usize, seen: &Range<usize>, q: &[f32]) -> Vec<f64> {
        let head_dim = self.keys.len() / (n * self.n_kv_heads);
        let n_heads = q.len() / head_dim;
        let mut row = vec![0.0; n];
        for (head, q) in q.chunks_exact(head_dim).enumerate() {
            let keys = &self.keys[head * self.n_kv_heads / n_heads * n * head_dim..];
            let score = |j: usize| dot(q, &keys[j * head_dim..][..head_dim]);
            let scores: Vec<f32> = seen.clone().map(score).collect();
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let powers = scores.iter().map(|x| f64::from((x - max).exp()));
            let sum: f64 = powers.clone().sum::<f64>() * n_heads as f64;
            for (mean, power) in row[seen.clone()].iter_mut().zip(powers) {
                *mean += power / sum;
            }
        }
        row
    }
}

/// Adjacent gaps of an example, which end chunks before `end` and after it.
#[derive(Clone, Copy)]
struct Gaps {
    example: usize,
    end: usize,
}

impl Gaps {
    fn of<'a>(&self, examples: &'a [Example], width: usize) -> (&'a [f32], &'a [bool]) {
        let example = &examples[self.example];
        let keys = &example.keys[(self.end - SIDE) * width..];
        (
            &keys[..(RUN + 2 * SIDE - 1) * width],
            &example.labels[self.end..][..RUN],
        )
    }
}

/// The focal loss of a logit, and its gradient.
fn focal(logit: f32, label: bool) -> (f64, f64) {
    // Of a boundary; else the same turned around.
    let z = f64::from(if label { logit } else { -logit });
    let ln_p = -(-z).min(700.0).exp().ln_1p();
    let (p, weight) = (ln_p.exp(), if label { POSITIVE_WEIGHT } else { 1.0 });
    let off = (1.0 - p).powi(FOCUS);
    let slope = off * (f64::from(FOCUS) * p * ln_p - (1.0 - p));
    let sign = if label { weight } else { -weight };
    (-weight * off * ln_p, sign * slope)
}

/// A predictor, and how well it learnt.
#[derive(Debug)]
pub struct Trained {
    /// What was learnt.
    pub predictor: Predictor,
    /// Gaps that it was learnt from.
    pub n_gaps: usize,
    /// Mean loss of each epoch.
    pub losses: Vec<f64>,
    /// Gaps at the end of the text that it was not.
    pub n_held_out: usize,
    /// Their mean loss.
    pub loss: f64,
    /// The share of them that are boundaries.
    pub labels: f64,
    /// The share of them that is told right.
    pub accuracy: f64,
}

/// A predictor for `model`, from a text. `on` is told how many tokens of how many have been read, then of runs of gaps how
/// many have been learnt from, and may stop it.
///
/// # Errors
/// As [`Session::new`](super::Session::new) and [`Session::prefill`](super::Session::prefill); [`Error::Invalid`] if there
/// are too few tokens, or layers have keys of different widths or none.
pub fn train(
    model: &Model,
    tokens: &[u32],
    on: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Trained> {
    let least = 2 * SIDE + 8 * RUN + LABEL_AHEAD;
    let invalid = |what: String| Err(Error::Invalid(what));
    if tokens.len() < least {
        let n = tokens.len();
        return invalid(format!("text: expected at least {least} tokens, found {n}"));
    }
    let config = &model.info().config;
    let mut widths = config.n_kv_heads.iter().filter(|n| **n > 0);
    let Some(n_kv_heads) = widths.next() else {
        return invalid("model: expected layers with attention, found none".into());
    };
    if let Some(other) = widths.find(|n| *n != n_kv_heads) {
        return invalid(format!(
            "model: expected as many heads of keys in all layers, found {n_kv_heads} and {other}"
        ));
    }
    let width = n_kv_heads * config.head_dim;
    let shape = Shape {
        width,
        n_heads: if width.is_multiple_of(N_HEADS) {
            N_HEADS
        } else {
            1
        },
        n_hidden: N_HIDDEN,
    };
    let (examples, mut runs) = examples(model, tokens, on)?;
    // The last of the text, in all layers.
    let held_out = runs.split_off(runs.len() * 7 / 8);
    let mut rng = Rng::new(SEED);
    let mut adam = Adam::new(shape.n_params());
    let mut predictor = Predictor::new(model.hashes()?.model, shape, first(shape, &mut rng));
    let (mut losses, n_steps) = (Vec::new(), EPOCHS * runs.len().div_ceil(BATCH));
    for epoch in 0..EPOCHS {
        for i in (1..runs.len()).rev() {
            runs.swap(i, (rng.next_f64() * (i + 1) as f64) as usize);
        }
        let mut sum = Told::default();
        for batch in runs.chunks(BATCH) {
            if on(epoch * runs.len() + sum.n / RUN, EPOCHS * runs.len()).is_break() {
                return Err(Error::Cancelled);
            }
            let (told, grads) = tell(&predictor, batch, &examples, true);
            sum.add(&told);
            let rate = RATE * (1.0 - adam.n_steps as f64 / n_steps as f64);
            let mut params = predictor.params().to_vec();
            adam.step(rate, &mut params, &grads);
            predictor = Predictor::new(predictor.model, shape, params);
        }
        losses.push(sum.loss / sum.n as f64);
    }
    let (told, _) = tell(&predictor, &held_out, &examples, false);
    let share = |n: usize| n as f64 / told.n as f64;
    Ok(Trained {
        n_gaps: runs.len() * RUN,
        losses,
        n_held_out: told.n,
        loss: told.loss / told.n as f64,
        labels: share(told.n_labels),
        accuracy: share(told.n_right),
        predictor,
    })
}

/// What is learnt from, and where runs of gaps begin, in the order of the text.
fn examples(
    model: &Model,
    tokens: &[u32],
    on: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<(Vec<Example>, Vec<Gaps>)> {
    let (mut examples, mut runs) = (Vec::new(), Vec::new());
    for (window, read) in tokens.chunks(WINDOW).enumerate() {
        // Of each gap some later queries must tell.
        let last = read.len().saturating_sub(LABEL_AHEAD + RUN);
        if last < 2 * SIDE {
            break;
        }
        let on = &mut |done, _| on(window * WINDOW + done, tokens.len());
        let layers = record(model, read, Recorded::add, on)?;
        let first = examples.len();
        examples.extend(layers.into_values().map(|layer| layer.example(read.len())));
        for end in (2 * SIDE..=last).step_by(RUN) {
            runs.extend((first..examples.len()).map(|example| Gaps { example, end }));
        }
    }
    Ok((examples, runs))
}

/// Parameters to begin with.
fn first(shape: Shape, rng: &mut Rng) -> Vec<f32> {
    let mut params = vec![0.0; shape.n_params()];
    let [qkv, _, out, _, norm, _, up, up_bias, down, down_bias] = shape.ranges();
    let inverse = |n: usize| (1.0 / n as f64).sqrt();
    let (width, n_features) = (shape.width, shape.n_features());
    for (range, bound) in [
        (qkv, (6.0 / (4 * width) as f64).sqrt()),
        (out, inverse(width)),
        (up, inverse(n_features)),
        (up_bias, inverse(n_features)),
        (down, inverse(shape.n_hidden)),
        (down_bias, inverse(shape.n_hidden)),
    ] {
        let params = params[range].iter_mut();
        params.for_each(|x| *x = ((2.0 * rng.next_f64() - 1.0) * bound) as f32);
    }
    params[norm].fill(1.0);
    params
}

/// What a predictor says of some gaps.
#[derive(Default)]
struct Told {
    n: usize,
    /// The sum of their losses.
    loss: f64,
    n_labels: usize,
    n_right: usize,
}

impl Told {
    fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.loss += other.loss;
        self.n_labels += other.n_labels;
        self.n_right += other.n_right;
    }
}

/// What `predictor` says of the gaps in `runs`; the gradient of their mean loss, if that is wanted.
fn tell(
    predictor: &Predictor,
    runs: &[Gaps],
    examples: &[Example],
    learns: bool,
) -> (Told, Vec<f32>) {
    let shape = predictor.shape();
    let n = (runs.len() * RUN) as f64;
    let share = |runs: &[Gaps]| {
        let mut told = Told::default();
        let mut grads = vec![0.0; if learns { shape.n_params() } else { 0 }];
        let mut room = vec![0.0; shape.room(RUN)];
        for run in runs {
            let (keys, labels) = run.of(examples, shape.width);
            let (mut logits, mut slopes) = ([0.0; RUN], [0.0; RUN]);
            let mut run = Run::new(shape, RUN, &mut room);
            predictor.logits(keys, &mut run, &mut logits);
            for ((logit, label), slope_of) in logits.iter().zip(labels).zip(&mut slopes) {
                let (loss, slope) = focal(*logit, *label);
                *slope_of = (slope / n) as f32;
                told.add(&Told {
                    n: 1,
                    loss,
                    n_labels: usize::from(*label),
                    n_right: usize::from((*logit > 0.0) == *label),
                });
            }
            if learns {
                backward::backward(predictor, keys, &mut run, &slopes, &mut grads);
            }
        }
        (told, grads)
    };
    std::thread::scope(|scope| {
        let shares = runs.chunks(runs.len().div_ceil(SHARES).max(1));
        let shares: Vec<_> = shares.map(|runs| scope.spawn(|| share(runs))).collect();
        let shares = shares
            .into_iter()
            .map(|share| share.join().expect("no panic"));
        let sum = shares.reduce(|(mut told, mut grads), (other, more)| {
            told.add(&other);
            grads.iter_mut().zip(more).for_each(|(x, y)| *x += y);
            (told, grads)
        });
        sum.expect("some runs")
    })
}

/// Adam (arXiv:1412.6980), with its usual decays.
struct Adam {
    means: Vec<f32>,
    squares: Vec<f32>,
    n_steps: i32,
}

impl Adam {
    fn new(n: usize) -> Self {
        Self {
            means: vec![0.0; n],
            squares: vec![0.0; n],
            n_steps: 0,
        }
    }

    fn step(&mut self, rate: f64, params: &mut [f32], grads: &[f32]) {
        self.n_steps += 1;
        let left = |decay: f64| 1.0 - decay.powi(self.n_steps);
        let rate = (rate * left(0.999).sqrt() / left(0.9)) as f32;
        let state = self.means.iter_mut().zip(&mut self.squares);
        for ((x, grad), (mean, square)) in params.iter_mut().zip(grads).zip(state) {
            *mean += 0.1 * (grad - *mean);
            *square += 0.001 * (grad * grad - *square);
            *x -= rate * *mean / (square.sqrt() + 1e-8);
        }
    }
}

#[cfg(test)]
#[path = "../../../tests/common/boundaries.rs"]
mod oracle;

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads that do not fill panels, and some that do.
    const SHAPES: [Shape; 2] = [
        Shape {
            width: 12,
            n_heads: 3,
            n_hidden: 5,
        },
        Shape {
            width: 64,
            n_heads: 4,
            n_hidden: 32,
        },
    ];

    /// Keys of so many gaps, and a predictor with no number that is zero or one.
    fn random(shape: Shape, n: usize) -> (Vec<f32>, Predictor) {
        let mut rng = Rng::new(7);
        let mut params = first(shape, &mut rng);
        let mut some = |size: f64| ((2.0 * rng.next_f64() - 1.0) * size) as f32;
        params.iter_mut().for_each(|x| *x += some(0.2));
        let keys = (0..(n + 7) * shape.width).map(|_| some(2.0)).collect();
        (keys, Predictor::new(1, shape, params))
    }

    fn expected(shape: Shape, params: &[f64], keys: &[f32], gap: usize) -> f64 {
        let parts = shape.ranges().map(|range| params[range].to_vec());
        let keys = keys[gap * shape.width..].chunks(shape.width).take(8);
        let keys: Vec<Vec<f64>> = keys.map(doubles).collect();
        oracle::logit(shape.n_heads, &parts, &keys)
    }

    fn doubles(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

    #[test]
    fn logits_are_those_of_the_definition_however_many_are_computed() {
        for shape in SHAPES {
            let (keys, predictor) = random(shape, 33);
            let params = doubles(predictor.params());
            for n in [1, 8, 19, 32] {
                let mut room = vec![f32::NAN; shape.room(n)];
                let mut logits = vec![0.0; n];
                predictor.logits(
                    &keys[..(n + 7) * shape.width],
                    &mut Run::new(shape, n, &mut room),
                    &mut logits,
                );
                for (gap, logit) in logits.iter().enumerate() {
                    let expected = expected(shape, &params, &keys, gap);
                    assert!(
                        (f64::from(*logit) - expected).abs() < 1e-4,
                        "{logit}, expected {expected}"
                    );
                }
            }
            // More than are computed at once.
            let mut best = (f64::NEG_INFINITY, 0);
            for gap in 0..33 {
                let logit = expected(shape, &params, &keys, gap);
                best = if logit > best.0 {
                    (logit, gap + 4)
                } else {
                    best
                };
            }
            let mut room = vec![0.0; shape.room(33)];
            assert_eq!(predictor.best_end(&keys, 4..=36, &mut room), best.1);
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        const N: usize = 3;
        for shape in SHAPES {
            let (keys, predictor) = random(shape, N);
            let labels = [true, false, true];
            let loss = |params: &[f64]| -> f64 {
                let loss = |gap: usize| {
                    // In single precision it would be less exact than what is looked for.
                    let z = expected(shape, params, &keys, gap);
                    let p = 1.0 / (1.0 + (-z).exp());
                    match labels[gap] {
                        true => -1.3 * (1.0 - p).powi(2) * p.ln(),
                        false => -p.powi(2) * (1.0 - p).ln(),
                    }
                };
                (0..N).map(loss).sum()
            };
            let mut room = vec![0.0; shape.room(N)];
            let mut run = Run::new(shape, N, &mut room);
            let mut logits = [0.0; N];
            predictor.logits(&keys, &mut run, &mut logits);
            let mut params = doubles(predictor.params());
            let told: Vec<_> = (0..N).map(|i| focal(logits[i], labels[i])).collect();
            let total: f64 = told.iter().map(|(loss, _)| loss).sum();
            assert!((total - loss(&params)).abs() < 1e-4);
            let slopes: Vec<f32> = told.iter().map(|(_, slope)| *slope as f32).collect();
            let mut grads = vec![0.0; shape.n_params()];
            backward::backward(&predictor, &keys, &mut run, &slopes, &mut grads);
            for (range, name) in shape.ranges().into_iter().zip(PARTS) {
                // All of what is short, some of what is long.
                for i in range.clone().step_by(range.len().div_ceil(60)) {
                    let at = params[i];
                    let mut loss_at = |x: f64| {
                        params[i] = x;
                        loss(&params)
                    };
                    let expected = (loss_at(at + 1e-5) - loss_at(at - 1e-5)) / 2e-5;
                    params[i] = at;
                    assert!(
                        (f64::from(grads[i]) - expected).abs() < 1e-4 + 1e-3 * expected.abs(),
                        "{name} {i}: {}, expected {expected}",
                        grads[i]
                    );
                }
            }
        }
    }

    #[test]
    fn the_optimizer_finds_the_least_of_a_square() {
        let (mut x, mut adam) = ([3.0f32, -2.0], Adam::new(2));
        for _ in 0..2000 {
            let grads = [2.0 * (x[0] - 1.0), 20.0 * (x[1] + 1.0)];
            adam.step(0.01, &mut x, &grads);
        }
        assert!(
            (x[0] - 1.0).abs() < 1e-3 && (x[1] + 1.0).abs() < 1e-3,
            "{x:?}"
        );
    }
}
