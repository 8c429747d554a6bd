//! LFM2 (arXiv:2511.23404): gated short convolutions in most layers, grouped-query attention with normed heads in the
//! others. Which is which stands in `attention.head_count_kv`: 0 is a convolution. `lfm2moe` has experts in all layers but
//! the first few.

use super::config::Config;
use super::layer::attention::SelfAttention;
use super::layer::embedding::Embedding;
use super::layer::ffn;
use super::layer::moe::{self, FeedForward, Sizes};
use super::layer::short_conv::ShortConv;
use super::state::{LayerState, State};
use super::weights::Weights;
use super::{Network, Pass};
use crate::backend::select::KvOptions;
use crate::backend::{Activation, Backend, Gating, Rope, RopePairs};
use crate::error::{Error, Result};

struct Lfm2<B: Backend> {
    config: Config,
    embedding: Embedding<B>,
    layers: Vec<Layer<B>>,
    rope: Rope,
    /// Length of the convolution kernels.
    n_taps: usize,
}

struct Layer<B: Backend> {
    mixer_norm: B::Vector,
    mixer: Mixer<B>,
    ffn_norm: B::Vector,
    ffn: FeedForward<B>,
}

enum Mixer<B: Backend> {
    Attention(SelfAttention<B>),
    ShortConv(ShortConv<B>),
}

/// What keeps the sum of the weights of experts from 0.
const SUM_EPS: f32 = 1e-6;

pub(super) fn load<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    layers(w, None)
}

pub(super) fn load_moe<B: Backend + 'static>(w: &Weights<B>) -> Result<Box<dyn Network<B>>> {
    let sizes = Sizes::read(w.gguf, Gating::Sigmoid, SUM_EPS)?;
    let n_dense = w
        .gguf
        .metadata()
        .opt_usize("lfm2moe.leading_dense_block_count")?;
    layers(w, Some((sizes, n_dense.unwrap_or(0))))
}

/// `experts`: their sizes, and the first layer that has them.
fn layers<B: Backend + 'static>(
    w: &Weights<B>,
    experts: Option<(Sizes, usize)>,
) -> Result<Box<dyn Network<B>>> {
    let mut config = Config::read(w.gguf)?;
    let meta = w.gguf.metadata();
    let key = |name: &str| format!("{}.{name}", w.architecture);
    if meta.opt_bool(&key("attention.causal"))? == Some(false) {
        return Err(Error::Unsupported {
            kind: "lfm2 variant",
            found: "bidirectional encoder (attention.causal = false)".to_owned(),
            supported: "causal".to_owned(),
        });
    }
    let n_taps = meta.usize(&key("shortconv.l_cache"))?;
    let n_convs = config.n_kv_heads.iter().filter(|n| **n == 0).count();
    if n_taps == 0 || n_taps > MAX_TAPS {
        return Err(Error::BadModel(format!(
            "{}: expected 1 to {MAX_TAPS}, found {n_taps}",
            key("shortconv.l_cache")
        )));
    }
    config.conv_reach = (n_taps - 1) * n_convs;
    let window = meta
        .opt_usize(&key("attention.sliding_window"))?
        .filter(|n| *n > 0);
    let rope = config.rope(w.gguf, config.rope_base, RopePairs::Halves, None)?;
    let layer = |i: usize| {
        let mixer = if config.n_kv_heads[i] == 0 {
            Mixer::ShortConv(ShortConv::load(w, &config, i, n_taps)?)
        } else {
            w.vector(&format!("blk.{i}.attn_q_norm.weight"), config.head_dim)?;
            let scale = 1.0 / (config.head_dim as f32).sqrt();
            Mixer::Attention(SelfAttention::load(
                w,
                &config,
                i,
                RopePairs::Halves,
                scale,
                window,
            )?)
        };
        Ok(Layer {
            mixer_norm: w.vector(&format!("blk.{i}.attn_norm.weight"), config.hidden)?,
            mixer,
            ffn_norm: w.vector(&format!("blk.{i}.ffn_norm.weight"), config.hidden)?,
            ffn: match &experts {
                Some((sizes, first)) if i >= *first => {
                    FeedForward::Moe(moe::load(w, &config, i, sizes, Activation::Silu)?)
                }
                _ => FeedForward::Dense(ffn::gated(w, &config, i, Activation::Silu)?),
            },
        })
    };
    let layers = w
        .part(config.n_layers)
        .layers
        .map(layer)
        .collect::<Result<_>>()?;
    // The final norm is stored under the embedding's name; early converters called it what others do.
    let norm = if w.has("token_embd_norm.weight") {
        "token_embd_norm.weight"
    } else {
        "output_norm.weight"
    };
    let embedding = Embedding::load(w, &config, norm)?;
    Ok(Box::new(Lfm2 {
        config,
        embedding,
        layers,
        rope,
        n_taps,
    }))
}

/// Kernels are 3 long, 7 in the next generation; a file that claims thousands is broken.
const MAX_TAPS: usize = 64;

impl<B: Backend> Network<B> for Lfm2<B> {
    fn config(&self) -> &Config {
        &self.config
    }

    fn state(&self, backend: &B, kv: &KvOptions) -> State<B> {
        let layers = (self.embedding.first()..)
            .zip(&self.layers)
            .map(|(i, layer)| match &layer.mixer {
                Mixer::Attention(attention) => {
                    LayerState::Kv(backend.kv(&attention.shape, &kv.of_layer(i)))
                }
                Mixer::ShortConv(_) => {
                    LayerState::Conv(backend.conv(self.n_taps - 1, self.config.hidden))
                }
            });
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
            let h = b.rms_norm(&x, &layer.mixer_norm, eps);
            let h = match &layer.mixer {
                Mixer::Attention(attention) => attention.forward(b, state.kv(), &h, &angles, pass),
                Mixer::ShortConv(conv) => conv.forward(b, state.conv(), &h),
            };
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
