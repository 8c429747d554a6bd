//! Qwen3 (arXiv:2505.09388): a plain decoder with norms over each head of queries and keys; `qwen3moe` has experts in
//! every layer.

use super::Network;
use super::config::Config;
use super::layer::decoder::Decoder;
use super::layer::moe::Sizes;
use super::weights::Weights;
use crate::backend::{Backend, Gating, RopePairs};
use crate::error::Result;

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    decoder(w, None)
}

pub(super) fn load_moe<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    decoder(w, Some(Sizes::read(w.gguf, Gating::Softmax, 0.0)?))
}

fn decoder<B: Backend + 'static>(
    w: &Weights<B>,
    experts: Option<Sizes>,
) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    // Required here, optional in the shared attention.
    for i in 0..config.n_layers {
        w.vector(&format!("blk.{i}.attn_q_norm.weight"), config.head_dim)?;
    }
    let rope = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    Ok(Box::new(Decoder::load(w, config, rope, experts)?))
}
