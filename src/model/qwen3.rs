//! Qwen3 (arXiv:2505.09388), dense: a plain decoder with norms over each head of queries and keys.

use super::Network;
use super::config::Config;
use super::layer::decoder::Decoder;
use super::weights::Weights;
use crate::backend::{Backend, RopePairs};
use crate::error::Result;

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    // Required here, optional in the shared attention.
    for i in 0..config.n_layers {
        w.vector(&format!("blk.{i}.attn_q_norm.weight"), config.head_dim)?;
    }
    let rope = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    Ok(Box::new(Decoder::load(w, config, rope)?))
}
