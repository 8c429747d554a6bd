//! Gated feed-forward layer: `down(activation(gate(x)) * up(x))`.

use crate::backend::{Activation, Backend, Linear};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// The weights of one feed-forward layer.
pub(crate) struct GatedFfn<B: Backend> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
    activation: Activation,
}

impl<B: Backend> GatedFfn<B> {
    /// Reads `blk.i.ffn_*`.
    pub(crate) fn load(
        w: &Weights<B>,
        config: &Config,
        i: usize,
        activation: Activation,
    ) -> Result<Self> {
        let name = |part: &str| format!("blk.{i}.ffn_{part}");
        Ok(Self {
            gate: w.linear(&name("gate"), config.hidden, config.ffn)?,
            up: w.linear(&name("up"), config.hidden, config.ffn)?,
            down: w.linear(&name("down"), config.ffn, config.hidden)?,
            activation,
        })
    }

    /// `x`: (n_tokens, hidden), normed.
    pub(crate) fn forward(&self, b: &mut B, x: &B::Tensor) -> B::Tensor {
        let [gate, up] = b.linear(x, [&self.gate, &self.up]);
        let h = b.glu(gate, &up, self.activation);
        let [out] = b.linear(&h, [&self.down]);
        out
    }
}
