//! The plain pre-norm decoder that Llama and Qwen share: norm, attention, add; norm, gated unit or experts, add.

use super::attention::SelfAttention;
use super::embedding::Embedding;
use super::ffn;
use super::moe::{self, FeedForward, Sizes};
use crate::backend::select::KvOptions;
use crate::backend::{Activation, Backend, Rope};
use crate::error::{Error, Result};
use crate::model::config::Config;
use crate::model::state::{LayerState, State};
use crate::model::weights::Weights;
use crate::model::{Network, Pass};

/// A plain decoder.
pub(crate) struct Decoder<B: Backend> {
    config: Config,
    embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
    rope: Rope,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: SelfAttention<B>,
    ffn_norm: B::Vector,
    ffn: FeedForward<B>,
}

impl<B: Backend> Decoder<B> {
    /// Reads all layers; every one has attention, and experts if their sizes are given.
    pub(crate) fn load(
        w: &Weights<B>,
        config: Config,
        rope: Rope,
        experts: Option<Sizes>,
    ) -> Result<Self> {
        if let Some(i) = config.n_kv_heads.iter().position(|n| *n == 0) {
            let name = &config.architecture;
            return Err(Error::BadModel(format!(
                "{name}: expected attention in every layer, found none in layer {i}"
            )));
        }
        let layer = |i: usize| {
            let scale = 1.0 / (config.head_dim as f32).sqrt();
            Ok(Layer {
                attention_norm: w.vector(&format!("blk.{i}.attn_norm.weight"), config.hidden)?,
                attention: SelfAttention::load(w, &config, i, rope.pairs, scale, None)?,
                ffn_norm: w.vector(&format!("blk.{i}.ffn_norm.weight"), config.hidden)?,
                ffn: match &experts {
                    None => FeedForward::Dense(ffn::gated(w, &config, i, Activation::Silu)?),
                    Some(sizes) => {
                        FeedForward::Moe(moe::load(w, &config, i, sizes, Activation::Silu)?)
                    }
                },
            })
        };
        let layers = w
            .part(config.n_layers)
            .layers
            .map(layer)
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding: Embedding::load(w, &config, "output_norm.weight")?,
            layers,
            rope,
            config,
        })
    }
}

impl<B: Backend> Network<B> for Decoder<B> {
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
            layer.ffn.foresee(b, &x, &layer.ffn_norm, eps);
            let h = b.rms_norm(&x, &layer.attention_norm, eps);
            let h = layer.attention.forward(b, state.kv(), &h, &angles, pass);
            b.add(&mut x, &h);
            if self.embedding.is_last(i) {
                x = pass.wanted(b, x)?;
            }
            let h = b.rms_norm(&x, &layer.ffn_norm, eps);
            let h = layer.ffn.forward(b, &h);
            b.add(&mut x, &h);
        }
        Some(self.embedding.output(b, x, pass.output))
    }
}
