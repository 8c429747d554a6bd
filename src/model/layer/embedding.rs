//! Both ends of a decoder: tokens to rows, and the final norm and head.

use crate::backend::{Backend, Linear, LinearOf};
use crate::error::Result;
use crate::model::Output;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// Embedding table, final norm, head.
pub(crate) struct Embedding<B: Backend> {
    table: B::Matrix,
    norm: B::Vector,
    head: Linear<B>,
    eps: f32,
}

impl<B: Backend> Embedding<B> {
    /// Reads `token_embd`, the final norm under `norm`, and `output`; without the latter the table is the head too.
    pub(crate) fn load(w: &Weights<B>, config: &Config, norm: &str) -> Result<Self> {
        let table = || w.matrix("token_embd.weight", config.hidden, config.n_vocab);
        let head = if w.has("output.weight") {
            w.linear("output", config.hidden, config.n_vocab)?
        } else {
            LinearOf {
                name: "token_embd".into(),
                weight: table()?,
                bias: None,
            }
        };
        Ok(Self {
            table: table()?,
            norm: w.vector(norm, config.hidden)?,
            head,
            eps: config.eps,
        })
    }

    /// (n_tokens, hidden), times `scale`.
    pub(crate) fn embed(&self, b: &mut B, tokens: &[u32], scale: f32) -> B::Tensor {
        b.embed(&self.table, tokens, scale)
    }

    /// Logits, (n_tokens, n_vocab), of the residual stream `x`, or what they are made of.
    pub(crate) fn output(&self, b: &mut B, x: &B::Tensor, output: Output) -> B::Tensor {
        let h = b.rms_norm(x, &self.norm, self.eps);
        match output {
            Output::Logits => {
                let [logits] = b.linear(&h, [&self.head]);
                logits
            }
            Output::Hidden => h,
        }
    }
}
