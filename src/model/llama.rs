//! Llama (Touvron et al., arXiv:2302.13971) and what follows its layout: SmolLM2, Llama 3. Files keep rotary pairs
//! side by side; `rope_freqs.weight`, where present, stretches the slow ones.

use super::Network;
use super::config::Config;
use super::layer::decoder::Decoder;
use super::weights::Weights;
use crate::backend::{Backend, RopePairs};
use crate::error::{Error, Result};

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    if let Some(n) = w
        .gguf
        .metadata()
        .opt_usize("llama.expert_count")?
        .filter(|n| *n > 0)
    {
        return Err(Error::Unsupported {
            kind: "llama variant",
            found: format!("{n} experts"),
            supported: "dense".to_owned(),
        });
    }
    let factors = match w.has("rope_freqs.weight") {
        true => Some(w.floats("rope_freqs.weight", &[config.n_rot / 2])?),
        false => None,
    };
    let rope = config.rope(
        w.gguf,
        config.rope_base,
        RopePairs::Neighbours,
        factors.as_deref(),
    )?;
    Ok(Box::new(Decoder::load(w, config, rope, None)?))
}
