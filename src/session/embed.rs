//! A text as one vector: the hidden states of its tokens, pooled.

use std::ops::ControlFlow;

use super::Session;
use crate::error::{Error, Result};

/// How the states of tokens become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the last token, which alone has seen all of the text.
    Last,
}

impl Pooling {
    /// All of them.
    pub const ALL: [Pooling; 2] = [Pooling::Mean, Pooling::Last];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Pooling::Mean => "mean",
            Pooling::Last => "last",
        }
    }
}

/// The embedding of `tokens`, `(hidden)`: states after the final norm, pooled, and if `normalize` scaled to length 1, so
/// that the product of two is their cosine. `session` holds these tokens then, whatever it held.
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
    let mut sums = vec![0f64; session.model().info().config.hidden];
    let last = tokens.len() - 1;
    session.hidden_states(tokens, &mut |position, state| {
        if pooling == Pooling::Mean || position == last {
            let pairs = sums.iter_mut().zip(state);
            pairs.for_each(|(sum, x)| *sum += f64::from(*x));
        }
        ControlFlow::Continue(())
    })?;
    let scale = match (normalize, pooling) {
        (true, _) => sums.iter().map(|x| x * x).sum::<f64>().sqrt(),
        (false, Pooling::Mean) => tokens.len() as f64,
        (false, Pooling::Last) => 1.0,
    };
    // A vector of zeros has no direction.
    let scale = if scale > 0.0 { scale } else { 1.0 };
    Ok(sums.iter().map(|x| (x / scale) as f32).collect())
}
