//! The sizes that all decoders have, read from metadata and checked.

use crate::backend::{Rope, RopePairs};
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// Sizes of a decoder.
#[derive(Clone, Debug)]
pub struct Config {
    /// `general.architecture`.
    pub architecture: String,
    /// Decoder layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads of an attention layer.
    pub n_heads: usize,
    /// Key and value heads by layer; 0: the layer has no attention.
    pub n_kv_heads: Vec<usize>,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements of a head that rotate.
    pub n_rot: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Tokens.
    pub n_vocab: usize,
    /// Positions that the model was made for.
    pub n_ctx_train: usize,
    /// Epsilon of the RMS norms.
    pub eps: f32,
    /// Base of the rotary angles.
    pub rope_base: f32,
    /// Tokens of the past that all convolution states together depend on; 0 without convolutions.
    pub conv_reach: usize,
}

impl Config {
    /// Reads the keys `A.block_count` and so on, `A` the architecture.
    ///
    /// # Errors
    /// If a key is missing or of the wrong type, or sizes contradict each other.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let architecture = gguf.architecture()?.to_owned();
        let meta = gguf.metadata();
        let key = |name: &str| format!("{architecture}.{name}");
        let bad = |what: String| Error::BadModel(format!("{}: {what}", gguf.path().display()));

        let n_layers = meta.usize(&key("block_count"))?;
        let n_tensors = gguf.tensors().count();
        if n_layers == 0 || n_layers > n_tensors {
            return Err(bad(format!(
                "{}: expected 1 to {n_tensors} (the tensors), found {n_layers}",
                key("block_count")
            )));
        }
        let hidden = meta.usize(&key("embedding_length"))?;
        let n_heads = meta.per_layer_usize(&key("attention.head_count"), n_layers)?;
        let n_heads = match n_heads.iter().max() {
            Some(max) if *max > 0 && n_heads.iter().all(|n| n == max || *n == 0) => *max,
            _ => {
                return Err(bad(format!(
                    "{}: expected one number of heads, found {n_heads:?}",
                    key("attention.head_count")
                )));
            }
        };
        let head_count_kv = key("attention.head_count_kv");
        let n_kv_heads = match meta.get(&head_count_kv) {
            Some(_) => meta.per_layer_usize(&head_count_kv, n_layers)?,
            None => vec![n_heads; n_layers],
        };
        if let Some(n) = n_kv_heads.iter().find(|n| **n > 0 && n_heads % **n > 0) {
            return Err(bad(format!(
                "{head_count_kv}: expected a divisor of {n_heads}, found {n}"
            )));
        }
        let head_dim = match meta.opt_usize(&key("attention.key_length"))? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(n_heads) => hidden / n_heads,
            None => {
                return Err(bad(format!(
                    "embedding length {hidden} is no multiple of {n_heads} heads"
                )));
            }
        };
        let value_dim = meta
            .opt_usize(&key("attention.value_length"))?
            .unwrap_or(head_dim);
        if value_dim != head_dim {
            return Err(bad(format!(
                "{}: expected {head_dim} like the keys, found {value_dim}",
                key("attention.value_length")
            )));
        }
        let n_rot = meta
            .opt_usize(&key("rope.dimension_count"))?
            .unwrap_or(head_dim);
        if n_rot == 0 || n_rot > head_dim || !n_rot.is_multiple_of(2) {
            return Err(bad(format!(
                "{}: expected an even number up to {head_dim}, found {n_rot}",
                key("rope.dimension_count")
            )));
        }
        let eps = meta.f32(&key("attention.layer_norm_rms_epsilon"))?;
        let rope_base = meta.opt_f32(&key("rope.freq_base"))?.unwrap_or(10_000.0);
        if !(eps.is_finite() && eps >= 0.0 && rope_base.is_finite() && rope_base > 0.0) {
            return Err(bad(format!(
                "expected a norm epsilon and a rope base that are positive, found {eps} and {rope_base}"
            )));
        }
        let embedding = gguf
            .tensor("token_embd.weight")
            .ok_or_else(|| bad("tensor token_embd.weight is missing".into()))?;
        Ok(Self {
            n_layers,
            hidden,
            n_heads,
            n_kv_heads,
            head_dim,
            n_rot,
            ffn: meta.per_layer_usize(&key("feed_forward_length"), n_layers)?[0],
            n_vocab: embedding.shape[1],
            n_ctx_train: meta.usize(&key("context_length"))?.max(1),
            eps,
            rope_base,
            conv_reach: 0,
            architecture,
        })
    }

    /// The rotary embedding with `base`, linear position scaling where the file asks for it, and per-pair `factors`
    /// (Llama 3) where it has them.
    ///
    /// # Errors
    /// If the file asks for another scaling, or `factors` has the wrong length.
    pub fn rope(
        &self,
        gguf: &Gguf,
        base: f32,
        pairs: RopePairs,
        factors: Option<&[f32]>,
    ) -> Result<Rope> {
        let meta = gguf.metadata();
        let key = |name: &str| format!("{}.rope.scaling.{name}", self.architecture);
        let factor = meta.opt_f32(&key("factor"))?;
        let scale = match meta.opt_str(&key("type"))? {
            None | Some("linear") => factor.filter(|f| f.is_finite() && *f > 0.0).unwrap_or(1.0),
            Some("none") => 1.0,
            Some(other) => {
                return Err(Error::Unsupported {
                    kind: "rope scaling",
                    found: other.to_owned(),
                    supported: "none, linear, rope_freqs.weight".to_owned(),
                });
            }
        };
        let mut rope = Rope::new(base, self.n_rot, pairs);
        let factors = factors
            .unwrap_or(&[])
            .iter()
            .copied()
            .chain(std::iter::repeat(1.0));
        rope.inv_freq
            .iter_mut()
            .zip(factors)
            .for_each(|(freq, factor)| *freq /= scale * factor);
        Ok(rope)
    }
}
