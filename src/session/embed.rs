//! A text as vectors: the hidden states of its tokens, pooled to one or as they are.

use std::ops::ControlFlow;

use super::Session;
use crate::error::{Error, Result};

/// What the states of tokens become.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the last token, which alone has seen all of the text.
    Last,
    /// Themselves, one after the other.
    None,
}

impl Pooling {
    /// All of them.
    pub const ALL: [Pooling; 3] = [Pooling::Mean, Pooling::Last, Pooling::None];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Last => "last",
            Pooling::None => "none",
        }
    }

    /// Vectors that `n_tokens` become.
    pub fn n_vectors(self, n_tokens: usize) -> usize {
        match self {
            Pooling::Mean | Pooling::Last => 1,
            Pooling::None => n_tokens,
        }
    }
}

/// The embedding of `tokens`, `(n_vectors, hidden)`: states after the final norm, pooled, and if `normalize` scaled to
/// length 1, so that the product of two is their cosine. `session` holds these tokens then, whatever it held.
///
/// # Errors
/// [`Error::Invalid`] if there are none; as [`Session::prefill`].
pub fn embed(
    session: &mut Session,
    tokens: &[u32],
    pooling: Pooling,
    normalize: bool,
) -> Result<Vec<f32>> {
    if tokens.is_empty() {
        return Err(Error::Invalid(
            "embedding: expected at least one token, found none".into(),
        ));
    }
    if tokens.len() > session.n_ctx() {
        return Err(Error::ContextFull {
            needed: tokens.len(),
            n_ctx: session.n_ctx(),
        });
    }
    session.truncate(0)?;
    let hidden = session.model().info().config.hidden;
    let n_tokens = tokens.len();
    let mut vectors = Vec::with_capacity(pooling.n_vectors(n_tokens) * hidden);
    let mut sums = vec![0f64; hidden];
    session.hidden_states(tokens, &mut |position, state| {
        let pairs = sums.iter_mut().zip(state);
        pairs.for_each(|(sum, x)| *sum += f64::from(*x));
        let is_whole = match pooling {
            Pooling::Mean | Pooling::Last => position == n_tokens - 1,
            Pooling::None => true,
        };
        if is_whole {
            let scale = match (normalize, pooling) {
                (true, _) => sums.iter().map(|x| x * x).sum::<f64>().sqrt(),
                (false, Pooling::Mean) => n_tokens as f64,
                (false, Pooling::Last | Pooling::None) => 1.0,
            };
            // A vector of zeros has no direction.
            let scale = if scale > 0.0 { scale } else { 1.0 };
            vectors.extend(sums.iter().map(|x| (x / scale) as f32));
        }
        if pooling != Pooling::Mean {
            sums.fill(0.0);
        }
        ControlFlow::Continue(())
    })?;
    Ok(vectors)
}
