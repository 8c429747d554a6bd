//! Both ends of a decoder: tokens to rows, and the final norm and head. Of a part of one, those that it has.

use crate::backend::{Backend, Linear, LinearOf};
use crate::error::Result;
use crate::model::config::Config;
use crate::model::weights::Weights;
use crate::model::{Output, Part, Pass};

/// Embedding table, final norm, head.
pub(crate) struct Embedding<B: Backend> {
    table: Option<B::Matrix>,
    head: Option<Head<B>>,
    hidden: usize,
    /// The layers between.
    part: Part,
}

struct Head<B: Backend> {
    norm: B::Vector,
    head: Linear<B>,
    eps: f32,
}

impl<B: Backend> Embedding<B> {
    /// Reads `token_embd`, the final norm under `norm`, and `output`; without the latter the table is the head too.
    pub(crate) fn load(w: &Weights<B>, config: &Config, norm: &str) -> Result<Self> {
        let part = w.part(config.n_layers);
        let (table, hidden, n_vocab) = ("token_embd.weight", config.hidden, config.n_vocab);
        let head = || {
            let head = if w.has("output.weight") {
                w.linear("output", hidden, n_vocab)?
            } else {
                LinearOf {
                    name: "token_embd".into(),
                    weight: w.matrix(table, hidden, n_vocab)?,
                    bias: None,
                }
            };
            let (norm, eps) = (w.vector(norm, config.hidden)?, config.eps);
            Ok(Head { norm, head, eps })
        };
        let rows = || w.table(table, hidden, n_vocab);
        Ok(Self {
            table: part.is_first().then(rows).transpose()?,
            head: part.is_last().then(head).transpose()?,
            hidden,
            part,
        })
    }

    /// The number of the first layer.
    pub(crate) fn first(&self) -> usize {
        self.part.layers.start
    }

    /// Whether layer `i` is the last of the model.
    pub(crate) fn is_last(&self, i: usize) -> bool {
        i + 1 == self.part.n_layers
    }

    /// What the first layer reads, (n_tokens, hidden): embeddings, times `scale`, or what the layers before made of them.
    pub(crate) fn begin(&self, b: &mut B, pass: &Pass, scale: f32) -> B::Tensor {
        match (pass.input, &self.table) {
            (None, Some(table)) => b.embed(table, pass.tokens, scale),
            (Some(rows), None) => b.import(rows, self.hidden),
            _ => unreachable!("tokens for the first part, rows for another"),
        }
    }

    /// Logits, (n_tokens, n_vocab), of the residual stream `x`, or what they are made of; `x` itself where layers follow.
    pub(crate) fn output(&self, b: &mut B, x: B::Tensor, output: Output) -> B::Tensor {
        let Some(Head { norm, head, eps }) = &self.head else {
            return x;
        };
        let h = b.rms_norm(&x, norm, *eps);
        match output {
            Output::Logits => {
                let [logits] = b.linear(&h, [head]);
                logits
            }
            Output::Hidden => h,
        }
    }
}
