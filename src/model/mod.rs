//! Architectures: config from metadata, weights by reference, the forward pass over [`Backend`].

pub mod config;
pub mod layer;
pub mod quantize;
pub mod state;
pub mod weights;

mod gemma3;
mod lfm2;
mod llama;
mod qwen2;
mod qwen3;
mod smallthinker;

use std::ops::Range;

use self::config::Config;
use self::state::State;
use self::weights::Weights;
use crate::backend::select::KvOptions;
use crate::backend::{Backend, Step};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// What comes out of a forward pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// How likely each token of the vocabulary is to follow: `(n_vocab)` a token.
    Logits,
    /// What they are made of, after the final norm: `(hidden)` a token.
    Hidden,
}

/// What one call of a forward pass computes.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    /// Tokens at positions `start..`, all below the size of the vocabulary.
    pub tokens: &'a [u32],
    /// What the layers before made of them, `(n_tokens, hidden)`, for a network that has some of the layers.
    pub input: Option<&'a [f32]>,
    /// Position of the first token.
    pub start: usize,
    /// Index of the first token whose output is wanted; `tokens.len()` for none.
    pub output_from: usize,
    /// What is made of them.
    pub output: Output,
    /// Whose kernels run. A pass that repeats what another did takes that one's.
    pub step: Step,
    /// Whether keys and values are written to the cache. A pass that rebuilds convolution states reads what is there.
    pub write_kv: bool,
    /// Whether the next pass is probably one of the token that this one finds the most likely, and has a position.
    pub follows: bool,
}

impl Pass<'_> {
    /// The rows of `x` whose output is wanted, if any: what comes after the last mixer needs no others.
    fn wanted<B: Backend>(&self, b: &mut B, x: B::Tensor) -> Option<B::Tensor> {
        (self.output_from < self.tokens.len()).then(|| b.rows_from(x, self.output_from))
    }
}

/// A model that can run on a backend.
pub trait Network<B: Backend>: Send + Sync {
    /// Its sizes.
    fn config(&self) -> &Config;

    /// Fresh memory for one sequence.
    fn state(&self, backend: &B, kv: &KvOptions) -> State<B>;

    /// Runs `pass` and returns its output, `(n_wanted, …)`, if any is wanted; of a network that is not the last part, what
    /// its layers made of all tokens, `(n_tokens, hidden)`. `state` has room for the positions.
    fn forward(&self, backend: &mut B, state: &mut State<B>, pass: &Pass) -> Option<B::Tensor>;
}

/// The layers that a network has: all of them, or those that another leaves to it. The first has the embedding, the last
/// the head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The layers.
    pub layers: Range<usize>,
    /// All layers of the model.
    pub n_layers: usize,
}

impl Part {
    /// Whether it begins with tokens.
    pub fn is_first(&self) -> bool {
        self.layers.start == 0
    }

    /// Whether it ends with logits.
    pub fn is_last(&self) -> bool {
        self.layers.end == self.n_layers
    }
}

type Loader<B> = fn(&Weights<B>) -> Result<Box<dyn Network<B>>>;

/// Architectures by the name in `general.architecture`.
fn architectures<B: Backend + 'static>() -> [(&'static str, Loader<B>); 8] {
    [
        ("gemma3", gemma3::load),
        ("lfm2", lfm2::load),
        ("lfm2moe", lfm2::load_moe),
        ("llama", llama::load),
        ("qwen2", qwen2::load),
        ("qwen3", qwen3::load),
        ("qwen3moe", qwen3::load_moe),
        ("smallthinker", smallthinker::load),
    ]
}

/// Builds the network of a file on a backend.
///
/// # Errors
/// If the architecture or a tensor type is not supported, or metadata and tensors contradict each other;
/// [`Error::Cancelled`].
pub fn load<B: Backend + 'static>(
    gguf: &Gguf,
    backend: &B,
    cancel: &Cancel,
) -> Result<Box<dyn Network<B>>> {
    load_part(gguf, backend, cancel, None)
}

/// The number of layers that the header of a file states.
///
/// # Errors
/// If it states none.
pub fn n_layers(gguf: &Gguf) -> Result<usize> {
    let key = format!("{}.block_count", gguf.architecture()?);
    gguf.metadata().usize(&key)
}

/// Builds a part of the network of a file on a backend: some of its layers, or all.
///
/// # Errors
/// As [`load`].
pub fn load_part<B: Backend + 'static>(
    gguf: &Gguf,
    backend: &B,
    cancel: &Cancel,
    layers: Option<Range<usize>>,
) -> Result<Box<dyn Network<B>>> {
    let architecture = gguf.architecture()?;
    let table = architectures::<B>();
    let found = table.iter().find(|(name, _)| *name == architecture);
    let (_, loader) = found.ok_or_else(|| Error::Unsupported {
        kind: "architecture",
        found: architecture.to_owned(),
        supported: table.map(|(name, _)| name).join(", "),
    })?;
    loader(&Weights {
        gguf,
        backend,
        architecture,
        cancel,
        layers,
    })
}
