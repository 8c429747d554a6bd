//! SmallThinker (arXiv:2507.20984): experts in every layer, whose router reads the residual stream before the attention
//! does, so that they are known while it runs. The large model has a sliding window in all layers but every fourth, which
//! sees everything and has no positions; the small one has neither. The key of the window tells them apart.

use super::config::Config;
use super::layer::attention::SelfAttention;
use super::layer::embedding::Embedding;
use super::layer::moe::{self, Sizes};
use super::state::{LayerState, State};
use super::weights::Weights;
use super::{Network, Pass};
use crate::backend::select::KvOptions;
use crate::backend::{Activation, Backend, Gating, Moe, Rope, RopePairs};
use crate::error::{Error, Result};

struct SmallThinker<B: Backend> {
    config: Config,
    embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
    rope: Rope,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: SelfAttention<B>,
    ffn_norm: B::Vector,
    moe: Moe<B>,
}

/// In a model with a window, layer `i` sees everything if this divides `i`.
const GLOBAL_EVERY: usize = 4;

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    let meta = w.gguf.metadata();
    if let Some(i) = config.n_kv_heads.iter().position(|n| *n == 0) {
        return Err(Error::BadModel(format!(
            "smallthinker: expected attention in every layer, found none in layer {i}"
        )));
    }
    let pattern = "smallthinker.attention.sliding_window_pattern";
    if let Some(value) = meta.get(pattern)
        && meta.opt_usize(pattern).ok().flatten() != Some(GLOBAL_EVERY)
    {
        return Err(Error::Unsupported {
            kind: "smallthinker.attention.sliding_window_pattern",
            found: format!("{value:?}"),
            supported: GLOBAL_EVERY.to_string(),
        });
    }
    let window = meta
        .opt_usize("smallthinker.attention.sliding_window")?
        .filter(|n| *n > 0);
    let sizes = Sizes::read(w.gguf, Gating::Sigmoid, 0.0)?;
    let rope = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    let layer = |i: usize| {
        let is_global = window.is_some() && i.is_multiple_of(GLOBAL_EVERY);
        let attention = SelfAttention::load(
            w,
            &config,
            i,
            (!is_global).then_some(rope.pairs),
            1.0 / (config.head_dim as f32).sqrt(),
            window.filter(|_| !is_global),
        )?;
        Ok(Layer {
            attention_norm: w.vector(&format!("blk.{i}.attn_norm.weight"), config.hidden)?,
            attention,
            ffn_norm: w.vector(&format!("blk.{i}.ffn_norm.weight"), config.hidden)?,
            moe: moe::load(w, &config, i, &sizes, Activation::Relu)?,
        })
    };
    let layers = w
        .part(config.n_layers)
        .layers
        .map(layer)
        .collect::<Result<_>>()?;
    Ok(Box::new(SmallThinker {
        embedding: Embedding::load(w, &config, "output_norm.weight")?,
        layers,
        rope,
        config,
    }))
}

impl<B: Backend> Network<B> for SmallThinker<B> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn state(&self, backend: &B, kv: &KvOptions) -> State<B> {
        let layers = (self.embedding.first()..)
            .zip(&self.layers)
            .map(|(i, l)| LayerState::Kv(backend.kv(&l.attention.shape, &kv.of_layer(i))));
        State {
            layers: layers.collect(),
        }
    }

    fn forward(&self, b: &mut B, state: &mut State<B>, pass: &Pass) -> Option<B::Tensor> {
        let eps = self.config.eps;
        let angles = b.rope_angles(&self.rope, pass.start, pass.tokens.len());
        let mut x = self.embedding.begin(b, pass, 1.0);
        let layers = self.layers.iter().zip(&mut state.layers);
        for (i, (layer, state)) in (self.embedding.first()..).zip(layers) {
            // After the last mixer only rows whose logits are wanted go on: the others need no experts.
            let is_last = self.embedding.is_last(i);
            let from = if is_last { pass.output_from } else { 0 };
            let is_wanted = from < pass.tokens.len();
            // The norm first: a backend may make it together with the sum that the router reads.
            let h = b.rms_norm(&x, &layer.attention_norm, eps);
            let routes = is_wanted.then(|| b.route(&x, from, &layer.moe));
            let h = layer.attention.forward(b, state.kv(), &h, &angles, pass);
            b.add(&mut x, &h);
            if is_last {
                x = pass.wanted(b, x)?;
            }
            let h = b.rms_norm(&x, &layer.ffn_norm, eps);
            let h = b.moe(&h, routes?, &layer.moe);
            b.add(&mut x, &h);
        }
        Some(self.embedding.output(b, x, pass.output))
    }
}
