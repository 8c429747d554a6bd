//! Grouped-query attention: projections, optional norms of queries and keys per head, rotary embedding, output.

use crate::backend::{Attention, Backend, Linear, RopePairs};
use crate::error::Result;
use crate::model::Pass;
use crate::model::config::Config;
use crate::model::weights::Weights;

/// The weights of one attention layer.
pub(crate) struct SelfAttention<B: Backend> {
    q: Linear<B>,
    k: Linear<B>,
    v: Linear<B>,
    out: Linear<B>,
    /// Gains of the norms over each head of queries and keys.
    norms: Option<(B::Vector, B::Vector)>,
    pub(crate) shape: Attention,
    /// `None`: positions do not enter.
    pairs: Option<RopePairs>,
    eps: f32,
}

impl<B: Backend> SelfAttention<B> {
    /// Reads `blk.i.attn_*`; `pairs` is what the rotary embedding rotates, `scale` the factor on scores.
    pub(crate) fn load(
        w: &Weights<B>,
        config: &Config,
        i: usize,
        pairs: impl Into<Option<RopePairs>>,
        scale: f32,
        window: Option<usize>,
    ) -> Result<Self> {
        let (n_kv_heads, head_dim) = (config.n_kv_heads[i], config.head_dim);
        let (n_q, n_kv) = (config.n_heads * head_dim, n_kv_heads * head_dim);
        let name = |part: &str| format!("blk.{i}.attn_{part}");
        let q_norm = w.opt_vector(&name("q_norm.weight"), head_dim)?;
        let norms = match q_norm {
            Some(q_norm) => Some((q_norm, w.vector(&name("k_norm.weight"), head_dim)?)),
            None => None,
        };
        Ok(Self {
            q: w.linear(&name("q"), config.hidden, n_q)?,
            k: w.linear(&name("k"), config.hidden, n_kv)?,
            v: w.linear(&name("v"), config.hidden, n_kv)?,
            out: w.linear(&name("output"), n_q, config.hidden)?,
            norms,
            shape: Attention {
                n_heads: config.n_heads,
                n_kv_heads,
                head_dim,
                scale,
                window,
            },
            pairs: pairs.into(),
            eps: config.eps,
        })
    }

    /// `x`: (n_tokens, hidden), normed; `angles` those of the pass's positions.
    pub(crate) fn forward(
        &self,
        b: &mut B,
        kv: &mut B::Kv,
        x: &B::Tensor,
        angles: &B::Tensor,
        pass: &Pass,
    ) -> B::Tensor {
        let n = self.shape.head_dim;
        let [mut q, mut k, v] = b.linear(x, [&self.q, &self.k, &self.v]);
        if let Some((q_norm, k_norm)) = &self.norms {
            q = b.rms_norm(&q, q_norm, self.eps);
            k = b.rms_norm(&k, k_norm, self.eps);
        }
        if let Some(pairs) = self.pairs {
            b.rope(&mut q, n, pairs, angles);
            b.rope(&mut k, n, pairs, angles);
        }
        if pass.write_kv {
            b.kv_write(kv, &k, &v, pass.start);
            b.kv_note(kv, &q, pass.start, &self.shape);
        }
        let out = b.attention(&q, kv, pass.start, &self.shape);
        let [out] = b.linear(&out, [&self.out]);
        out
    }
}
