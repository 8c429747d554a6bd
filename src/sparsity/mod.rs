//! Policies: which keys may be left out of attention. What is left out is lost, so each is off unless asked for, and
//! `kinglet eval` tells its price.
//!
//! - [`window`]: the first keys and the last;
//! - [`blocks`]: the blocks whose pooled keys score best (InfLLM-V2's selector, on models not trained for it);
//! - [`dhsa`]: chunks of keys by the score of their sum (DHSA).
//!
//! All of them always read the first keys, which many heads use as a place to look when there is nothing to see, and the
//! last. A query that sees no more keys than the budget sees all, so up to there attention is dense to the bit.
//!
#![doc = include_str!("measured.md")]

pub mod blocks;
pub mod dhsa;
pub mod window;

use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;

pub use self::dhsa::Heads;
use crate::backend::select::{Ask, By, Chunking, Plan, Rule, Select, budget_of};
use crate::error::{Error, Result};

/// Which keys queries attend to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sparsity {
    /// Who chooses.
    pub policy: Policy,
    /// Keys that a query reads at most,
    pub budget: usize,
    /// or so many per cent of those that it sees, where these are more.
    pub per_cent: usize,
    /// Layers that read everything.
    pub dense_layers: Layers,
    /// What is done about keys that are left out.
    pub repair: Repair,
    /// Of these the first of the sequence.
    pub sink: usize,
    /// Of these the last before the query, itself included.
    pub local: usize,
    /// From this position on queries read everything.
    pub dense_from: Option<usize>,
}

/// What is done about keys that are left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repair {
    /// They are lost.
    #[default]
    None,
    /// A chunk of which nothing is read counts as one key and one value, the means, with the weight of all of it.
    Pooled,
    /// Every so many tokens one reads everything too, and the difference which that makes is added to what it and those
    /// after it find (Delta Attention, arXiv:2505.11254).
    Delta(usize),
}

impl Repair {
    /// Tokens from one that reads everything to the next, unless the caller says otherwise.
    pub const DEFAULT_EVERY: usize = 64;
}

/// Some of the first 128 layers of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Layers(u128);

impl Layers {
    /// Whether `layer` is one of them.
    pub fn contains(self, layer: usize) -> bool {
        layer < 128 && self.0 >> layer & 1 == 1
    }
}

/// Numbers of layers from 0, with commas between.
impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let mut layers = Self::default();
        for layer in text.split(',') {
            match layer.trim().parse() {
                Ok(layer @ 0..128) => layers.0 |= 1 << layer,
                _ => return Err("expected layers from 0 to 127, such as 0,7".into()),
            }
        }
        Ok(layers)
    }
}

/// As they are read.
impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = (0..128).filter(|layer| self.contains(*layer));
        let all: Vec<String> = all.map(|layer| layer.to_string()).collect();
        f.write_str(&all.join(","))
    }
}

/// Who chooses keys between the first and the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// Everything is read.
    #[default]
    Dense,
    /// Nothing between is read, all of the budget goes to the last.
    Window,
    /// See [`blocks`].
    Blocks,
    /// See [`dhsa`].
    Dhsa {
        /// Where chunks end.
        chunking: Chunking,
        /// Whether heads of keys choose alone.
        heads: Heads,
    },
}

impl Sparsity {
    /// First keys that are always read, unless the caller says otherwise.
    pub const DEFAULT_SINK: usize = 4;

    /// Last keys likewise.
    pub const DEFAULT_LOCAL: usize = 128;

    /// A policy with a budget, and the usual first and last keys.
    pub fn new(policy: Policy, budget: usize) -> Self {
        Self {
            policy,
            budget,
            per_cent: 0,
            dense_layers: Layers::default(),
            repair: Repair::None,
            sink: Self::DEFAULT_SINK,
            local: Self::DEFAULT_LOCAL,
            dense_from: None,
        }
    }

    /// Keys that a query reads at most, of `n_seen`.
    pub fn budget_of(&self, n_seen: usize) -> usize {
        budget_of(self.budget, self.per_cent, n_seen)
    }

    /// Whether everything is read.
    pub fn is_dense(&self) -> bool {
        self.policy == Policy::Dense
    }

    /// That a network of `n_layers` has the layers that it names.
    ///
    /// # Errors
    /// [`Error::Invalid`] if not.
    pub fn check_layers(&self, n_layers: usize) -> Result<()> {
        match (n_layers..128).find(|layer| self.dense_layers.contains(*layer)) {
            None => Ok(()),
            Some(layer) => Err(Error::Invalid(format!(
                "dense layers: expected numbers below {n_layers}, found {layer}"
            ))),
        }
    }

    /// Who chooses, for a cache; `None` if everything is read.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the budget does not suffice for what is always read, or is more than everything.
    pub fn selector(&self) -> Result<Option<Arc<dyn Select>>> {
        if let Policy::Dhsa { chunking, .. } = self.policy
            && !(4..=256).contains(&chunking.nominal())
        {
            return Err(Error::Invalid(format!(
                "chunk: expected 4 to 256 keys, found {}",
                chunking.nominal()
            )));
        }
        if self.per_cent > 100 {
            return Err(Error::Invalid(format!(
                "budget: expected at most 100 per cent of the keys, found {}",
                self.per_cent
            )));
        }
        if let Repair::Delta(every) = self.repair
            && !(8..=4096).contains(&every)
        {
            return Err(Error::Invalid(format!(
                "repair: expected one of 8 to 4096 tokens to read everything, found {every}"
            )));
        }
        if self.repair == Repair::Pooled && matches!(self.policy, Policy::Window) {
            return Err(Error::Invalid(
                "means of what is left out: expected a policy with chunks, found a window".into(),
            ));
        }
        let least = match self.policy {
            Policy::Dense => return Ok(None),
            Policy::Window => self.sink + 1,
            Policy::Blocks => blocks::BLOCK + self.local + 2 * blocks::BLOCK,
            // Beside the last keys lies the chunk whose end is not known yet.
            Policy::Dhsa { chunking, .. } => {
                self.sink + self.local.max(chunking.reach()) + chunking.most()
            }
        };
        if self.budget < least {
            return Err(Error::Invalid(format!(
                "{}: expected a budget of at least {least} keys, found {}",
                self.policy, self.budget
            )));
        }
        Ok(Some(Arc::new(*self)))
    }
}

/// `dense`, or the policy with its numbers.
impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sink, local) = (self.sink, self.local);
        let budget = match self.per_cent {
            0 => format!("{} keys", self.budget),
            share => format!("{} keys or {share} %", self.budget),
        };
        match self.policy {
            Policy::Dense => return f.write_str("dense"),
            Policy::Window => write!(f, "window of {budget}, first {sink}")?,
            policy => write!(f, "{policy}, {budget}, first {sink}, last {local}")?,
        }
        match self.repair {
            Repair::None => {}
            Repair::Pooled => f.write_str(", others pooled")?,
            Repair::Delta(every) => write!(f, ", corrected every {every}")?,
        }
        if self.dense_layers != Layers::default() {
            write!(f, ", layers dense: {}", self.dense_layers)?;
        }
        match self.dense_from {
            Some(position) => write!(f, ", dense from {position}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Dense => f.write_str("dense"),
            Policy::Window => f.write_str("window"),
            Policy::Blocks => f.write_str("block top-k"),
            Policy::Dhsa { chunking, heads } => {
                let shared = match heads {
                    Heads::Each => "",
                    Heads::Shared => ", heads share",
                    Heads::Vote => ", queries vote",
                    Heads::Best => ", by the best query",
                };
                match chunking {
                    Chunking::Fixed(n) => write!(f, "DHSA of {n} keys a chunk{shared}"),
                    Chunking::Shift(n) => write!(f, "DHSA of some {n} keys a chunk{shared}"),
                    Chunking::Labels(n) => {
                        write!(f, "DHSA of some {n} keys a chunk as queries attend{shared}")
                    }
                    Chunking::Predict(n) => {
                        write!(f, "DHSA of some {n} keys a chunk as predicted{shared}")
                    }
                }
            }
        }
    }
}

impl Select for Sparsity {
    fn is_for(&self, layer: usize) -> bool {
        !self.dense_layers.contains(layer)
    }

    fn chunking(&self) -> Option<Chunking> {
        match self.policy {
            Policy::Dense | Policy::Window => None,
            Policy::Blocks => Some(Chunking::Fixed(blocks::STRIDE)),
            Policy::Dhsa { chunking, .. } => Some(chunking),
        }
    }

    fn sees_all(&self, position: usize, seen: &Range<usize>) -> bool {
        seen.len() <= self.budget_of(seen.len())
            || self.dense_from.is_some_and(|from| position >= from)
    }

    fn budget(&self, n_seen: usize) -> usize {
        self.budget_of(n_seen)
    }

    fn sums_queries(&self) -> bool {
        let heads = match self.policy {
            Policy::Dhsa { heads, .. } => heads,
            _ => return false,
        };
        // Means of chunks are weighed by each query.
        heads == Heads::Each && self.repair != Repair::Pooled
    }

    fn pools(&self) -> bool {
        self.repair == Repair::Pooled
    }

    fn corrects_every(&self) -> Option<usize> {
        match self.repair {
            Repair::Delta(every) => Some(every),
            Repair::None | Repair::Pooled => None,
        }
    }

    fn rule(&self) -> Result<Rule> {
        let unsupported = |found: String| Error::Unsupported {
            kind: "sparse attention on the GPU",
            found,
            supported: Rule::SUPPORTED.into(),
        };
        if self.repair != Repair::None {
            return Err(unsupported(format!("{self}")));
        }
        let (by, chunk) = match self.policy {
            Policy::Dense | Policy::Window => (By::Place, 0),
            Policy::Blocks => (By::Blocks, blocks::STRIDE),
            Policy::Dhsa {
                chunking: Chunking::Shift(n),
                ..
            } => {
                let found = format!("{} that end where keys shift (shift:{n})", self.policy);
                return Err(unsupported(found));
            }
            Policy::Dhsa {
                chunking: Chunking::Labels(n),
                ..
            } => {
                let found = format!("{} that end by attention (labels:{n})", self.policy);
                return Err(unsupported(found));
            }
            Policy::Dhsa {
                chunking: Chunking::Predict(n),
                ..
            } => {
                let found = format!("{} that end as predicted (predict:{n})", self.policy);
                return Err(unsupported(found));
            }
            Policy::Dhsa {
                chunking: Chunking::Fixed(n),
                heads,
            } => match heads {
                Heads::Each => (By::Sum, n),
                Heads::Shared => (By::Shared, n),
                Heads::Vote => (By::Vote, n),
                Heads::Best => (By::Best, n),
            },
        };
        Ok(Rule {
            by,
            chunk,
            sink: self.sink,
            local: self.local,
            budget: self.budget,
            per_cent: self.per_cent,
        })
    }

    fn select(&self, ask: &Ask, plan: &mut Plan) {
        match self.policy {
            Policy::Dense => plan.push(ask.seen.clone()),
            Policy::Window => window::select(self, ask, plan),
            Policy::Blocks => blocks::select(self, ask, plan),
            Policy::Dhsa { chunking, heads } => dhsa::select(self, (chunking, heads), ask, plan),
        }
    }
}

/// `a . b`, in sixteen sums.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (a16, b16) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a16.0.iter().zip(b16.0) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    let rest = a16.1.iter().zip(b16.1).map(|(a, b)| a * b);
    sums.iter().sum::<f32>() + rest.sum::<f32>()
}

/// A number for item `i` of a list: the least is of the item with the best score, of equals the first, so an answer is the
/// same everywhere.
fn place(scores: &[f32], i: usize) -> u64 {
    // The order of numbers, zeros and NaNs as `total_cmp` has it.
    let bits = scores[i].to_bits() as i32;
    let ascending = (bits ^ ((bits >> 31) as u32 >> 1) as i32) ^ i32::MIN;
    u64::from(!(ascending as u32)) << 32 | i as u64
}

/// The largest number.
fn max(x: &[f32]) -> f32 {
    let mut most = [f32::NEG_INFINITY; 8];
    let (x8, rest) = x.as_chunks::<8>();
    for x in x8 {
        for i in 0..8 {
            most[i] = if x[i] > most[i] { x[i] } else { most[i] };
        }
    }
    most.iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max)
}
