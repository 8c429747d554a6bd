//! LFM2's gated short convolution (LFM2 technical report, arXiv:2511.23404).

use crate::backend::{Backend, Linear};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// The weights of one convolution layer.
pub(crate) struct ShortConv<B: Backend> {
    input: Linear<B>,
    /// (n_taps, hidden), oldest first.
    taps: B::Vector,
    output: Linear<B>,
}

impl<B: Backend> ShortConv<B> {
    /// Reads `blk.i.shortconv.*`; the file keeps the taps of a channel together.
    pub(crate) fn load(w: &Weights<B>, config: &Config, i: usize, n_taps: usize) -> Result<Self> {
        let hidden = config.hidden;
        let name = |part: &str| format!("blk.{i}.shortconv.{part}");
        let by_channel = w.floats(&name("conv.weight"), &[n_taps, hidden])?;
        let taps = (0..n_taps * hidden)
            .map(|at| by_channel[at % hidden * n_taps + at / hidden])
            .collect();
        Ok(Self {
            input: w.linear(&name("in_proj"), hidden, 3 * hidden)?,
            taps: w.backend.vector(taps),
            output: w.linear(&name("out_proj"), hidden, hidden)?,
        })
    }

    /// `x`: (n_tokens, hidden), normed.
    pub(crate) fn forward(&self, b: &mut B, conv: &mut B::Conv, x: &B::Tensor) -> B::Tensor {
        let [bcx] = b.linear(x, [&self.input]);
        let y = b.short_conv(&bcx, &self.taps, conv);
        let [out] = b.linear(&y, [&self.output]);
        out
    }
}
