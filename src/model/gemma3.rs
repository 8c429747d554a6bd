//! Gemma 3 (arXiv:2503.19786), text: norms before and after each part, norms over heads, local layers with a sliding
//! window and a rotary base of their own between global ones. The files hold gains with the 1 already added.

use super::config::Config;
use super::layer::attention::SelfAttention;
use super::layer::embedding::Embedding;
use super::layer::ffn;
use super::state::{LayerState, State};
use super::weights::Weights;
use super::{Network, Pass};
use crate::backend::select::KvOptions;
use crate::backend::{Activation, Backend, GatedFfn, Rope, RopePairs};
use crate::error::{Error, Result};

struct Gemma3<B: Backend> {
    config: Config,
    embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
    global: Rope,
    local: Rope,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    attention: SelfAttention<B>,
    post_attention_norm: B::Vector,
    ffn_norm: B::Vector,
    ffn: GatedFfn<B>,
    post_ffn_norm: B::Vector,
}

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let config = Config::read(w.gguf)?;
    let meta = w.gguf.metadata();
    if let Some(cap) = meta
        .opt_f32("gemma3.final_logit_softcapping")?
        .filter(|cap| *cap != 0.0)
    {
        return Err(Error::Unsupported {
            kind: "gemma3 variant",
            found: format!("logit soft-capping at {cap}"),
            supported: "none".to_owned(),
        });
    }
    let window = meta
        .opt_usize("gemma3.attention.sliding_window")?
        .filter(|n| *n > 0);
    // One in six layers is global, unless the file says otherwise: by a period, or layer by layer.
    let pattern = "gemma3.attention.sliding_window_pattern";
    let by_layer = meta
        .get(pattern)
        .is_some_and(|value| value.as_array().is_some());
    let is_local = if by_layer {
        meta.opt_per_layer_bool(pattern, config.n_layers)?
            .unwrap_or_default()
    } else {
        let period = meta.opt_usize(pattern)?.unwrap_or(6);
        (1..=config.n_layers)
            .map(|i| period == 0 || i % period != 0)
            .collect()
    };
    let base = meta
        .opt_f32("gemma3.rope.freq_base_swa")?
        .filter(|base| base.is_finite() && *base > 0.0);
    let global = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    // Position scaling is for the global layers alone.
    let local = Rope::new(base.unwrap_or(10_000.0), config.n_rot, RopePairs::Halves);
    // 27B alone scales by the width of a head before it was widened.
    let per_head = if config.n_layers == 62 {
        config.hidden / config.n_heads
    } else {
        config.head_dim
    };
    let scale = 1.0 / (per_head as f32).sqrt();
    let layer = |i: usize| {
        let norm = |name: &str| w.vector(&format!("blk.{i}.{name}.weight"), config.hidden);
        Ok(Layer {
            attention_norm: norm("attn_norm")?,
            attention: SelfAttention::load(
                w,
                &config,
                i,
                RopePairs::Halves,
                scale,
                window.filter(|_| is_local[i]),
            )?,
            post_attention_norm: norm("post_attention_norm")?,
            ffn_norm: norm("ffn_norm")?,
            ffn: ffn::gated(w, &config, i, Activation::GeluTanh)?,
            post_ffn_norm: norm("post_ffw_norm")?,
        })
    };
    let layers = w
        .part(config.n_layers)
        .layers
        .map(layer)
        .collect::<Result<_>>()?;
    let embedding = Embedding::load(w, &config, "output_norm.weight")?;
    Ok(Box::new(Gemma3 {
        config,
        embedding,
        layers,
        global,
        local,
    }))
}

impl<B: Backend> Network<B> for Gemma3<B> {
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
        let global = b.rope_angles(&self.global, pass.start, pass.tokens.len());
        let local = b.rope_angles(&self.local, pass.start, pass.tokens.len());
        let mut x = self
            .embedding
            .begin(b, pass, (self.config.hidden as f32).sqrt());
        let layers = self.layers.iter().zip(&mut state.layers);
        for (i, (layer, state)) in (self.embedding.first()..).zip(layers) {
            let angles = if layer.attention.shape.window.is_some() {
                &local
            } else {
                &global
            };
            let h = b.rms_norm(&x, &layer.attention_norm, eps);
            let h = layer.attention.forward(b, state.kv(), &h, angles, pass);
            let h = b.rms_norm(&h, &layer.post_attention_norm, eps);
            b.add(&mut x, &h);
            if self.embedding.is_last(i) {
                x = pass.wanted(b, x)?;
            }
            let h = b.rms_norm(&x, &layer.ffn_norm, eps);
            let h = b.gated_ffn(&h, &layer.ffn);
            let h = b.rms_norm(&h, &layer.post_ffn_norm, eps);
            b.add(&mut x, &h);
        }
        Some(self.embedding.output(b, x, pass.output))
    }
}
