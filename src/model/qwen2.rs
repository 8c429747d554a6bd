//! Qwen2 and Qwen2.5 (arXiv:2407.10671): a plain decoder with biases on queries, keys and values.

use super::Network;
use super::config::Config;
use super::layer::decoder::Decoder;
use super::weights::Weights;
use crate::backend::{Backend, RopePairs};
use crate::error::Result;

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    let rope = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    Ok(Box::new(Decoder::load(w, config, rope, None)?))
}
