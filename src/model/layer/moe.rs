//! Mixture of experts: a router, and gated feed-forward layers of which each token takes a few.

use crate::backend::{Activation, Backend, GatedFfn, Gating, MAX_USED, Moe, MoeOf, Routing};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// The sizes of a mixture, the same in every layer that has one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    routing: Routing,
    n_ffn: usize,
}

impl Sizes {
    /// Reads `A.expert_*`; `gating` is that of a file that does not say.
    ///
    /// # Errors
    /// If a key is missing, or sizes contradict each other.
    pub(crate) fn read(gguf: &Gguf, gating: Gating, sum_eps: f32) -> Result<Self> {
        let (meta, architecture) = (gguf.metadata(), gguf.architecture()?);
        let key = |name: &str| format!("{architecture}.{name}");
        let n_experts = meta.usize(&key("expert_count"))?;
        let n_used = meta.usize(&key("expert_used_count"))?;
        if n_used == 0 || n_used > n_experts.min(MAX_USED) {
            return Err(Error::BadModel(format!(
                "{}: expected 1 to {MAX_USED} of {n_experts} experts, found {n_used}",
                key("expert_used_count")
            )));
        }
        let gating = match meta.opt_usize(&key("expert_gating_func"))? {
            None => gating,
            Some(1) => Gating::Softmax,
            Some(2) => Gating::Sigmoid,
            Some(other) => {
                return Err(Error::Unsupported {
                    kind: "expert gating function",
                    found: other.to_string(),
                    supported: "1 (softmax), 2 (sigmoid)".to_owned(),
                });
            }
        };
        let n_ffn = match meta.opt_usize(&key("expert_feed_forward_length"))? {
            Some(n_ffn) => n_ffn,
            None => meta.usize(&key("feed_forward_length"))?,
        };
        Ok(Self {
            routing: Routing {
                n_experts,
                n_used,
                gating,
                sum_eps,
            },
            n_ffn,
        })
    }
}

/// Reads `blk.i.ffn_gate_inp`, `blk.i.ffn_*_exps`, and `blk.i.exp_probs_b.bias` if there is one.
///
/// # Errors
/// If a tensor is missing or of another shape.
pub(crate) fn load<B: Backend>(
    w: &Weights<B>,
    config: &Config,
    i: usize,
    sizes: &Sizes,
    activation: Activation,
) -> Result<Moe<B>> {
    let (hidden, n_ffn, n_experts) = (config.hidden, sizes.n_ffn, sizes.routing.n_experts);
    let name = |part: &str| format!("blk.{i}.ffn_{part}_exps");
    let down = format!("{}.weight", name("down"));
    let Some([first, second, ..]) = w.gguf.tensor(&down).map(|down| down.shape) else {
        return Err(Error::BadModel(format!(
            "{}: tensor {down} is missing: a file without its experts?",
            w.gguf.path().display()
        )));
    };
    if hidden == n_ffn && w.architecture == "smallthinker" {
        return Err(Error::BadModel(format!(
            "tensor {down}: {hidden} inputs and as many outputs, in an architecture whose files have either first"
        )));
    }
    let down_by_neuron = hidden != n_ffn && [first, second] == [hidden, n_ffn];
    let (n_in, n_out) = match down_by_neuron {
        true => (hidden, n_ffn),
        false => (n_ffn, hidden),
    };
    Ok(MoeOf {
        router: w.float_linear(&format!("blk.{i}.ffn_gate_inp"), hidden, n_experts)?,
        selection_bias: w.opt_vector(&format!("blk.{i}.exp_probs_b.bias"), n_experts)?,
        routing: sizes.routing,
        gate: w.stacked(&name("gate"), [hidden, n_ffn, n_experts])?,
        up: w.stacked(&name("up"), [hidden, n_ffn, n_experts])?,
        down: w.stacked(&name("down"), [n_in, n_out, n_experts])?,
        down_by_neuron,
        n_ffn,
        activation,
    })
}

/// What follows the mixer of a layer.
pub(crate) enum FeedForward<B: Backend> {
    /// One gated layer.
    Dense(GatedFfn<B>),
    /// Routed by what it reads.
    Moe(Moe<B>),
}

impl<B: Backend> FeedForward<B> {
    /// `x`: (n_tokens, hidden), before the mixer; `gain` that of the norm after it.
    pub(crate) fn foresee(&self, b: &mut B, x: &B::Tensor, gain: &B::Vector, eps: f32) {
        if let FeedForward::Moe(moe) = self {
            b.foresee(x, gain, eps, moe);
        }
    }

    /// `x`: (n_tokens, hidden), normed.
    pub(crate) fn forward(&self, b: &mut B, x: &B::Tensor) -> B::Tensor {
        match self {
            FeedForward::Dense(ffn) => b.gated_ffn(x, ffn),
            FeedForward::Moe(moe) => {
                let routes = b.route(x, 0, moe);
                b.moe(x, routes, moe)
            }
        }
    }
}
