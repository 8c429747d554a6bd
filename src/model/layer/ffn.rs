//! Gated feed-forward layer: `down(activation(gate(x)) * up(x))`.

use crate::backend::{Activation, Backend, GatedFfn, GatedFfnOf};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// Reads `blk.i.ffn_*`.
pub(crate) fn gated<B: Backend>(
    w: &Weights<B>,
    config: &Config,
    i: usize,
    activation: Activation,
) -> Result<GatedFfn<B>> {
    let name = |part: &str| format!("blk.{i}.ffn_{part}");
    Ok(GatedFfnOf {
        gate: w.linear(&name("gate"), config.hidden, config.ffn)?,
        up: w.linear(&name("up"), config.hidden, config.ffn)?,
        down: w.linear(&name("down"), config.ffn, config.hidden)?,
        activation,
    })
}
