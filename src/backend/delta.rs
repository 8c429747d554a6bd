//! DeltaLLM (arXiv:2507.19608): scores with keys far back from the differences of adjacent keys.
//!
//! Channel by channel a key is taken as its predecessor was, unless it is off by more than a threshold:
//!
//! ```text
//! e = k_j[c] - held[c];   |e| > threshold[c]: change[j][c] = e, held[c] = k_j[c];   else: change[j][c] = 0
//! q . held_j = q . held_(j-1) + sum of q[c] * change[j][c] over the changes
//! ```
//!
//! The reference is what is held, not the key before, so no score is ever off by more than `sum of |q[c]| threshold[c]`.
//! The first key of every frame changes whole: frames stand alone, and a frame is scored so once all of it lies before
//! the keys that a query scores exactly, or exactly if it changes so much that sums of changes do not pay.
//!
//! Changes follow from the keys of a frame alone, so they are made from the cache when a prompt is read, once for all
//! queries of a task, and nothing of them is kept: going back, going apart, saving and loading stay exact to the bit, and
//! a cache takes no more than it did. What the paper saves by keeping changes instead of keys is given up for that;
//! beside 8-bit keys it is nothing.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result};

/// How scores are computed.
#[derive(Clone, PartialEq, Debug)]
pub struct Delta {
    /// Threshold of a channel, before its factor.
    pub rate: f32,
    /// Factors on it; `None`: all are 1, as published.
    pub factors: Option<Arc<Factors>>,
    /// Which keys a query scores exactly.
    pub exact: Exact,
    /// Beside these all frames with one of the first keys.
    pub sink: usize,
    /// Keys of a frame: 32, 64, 128 or 256.
    pub frame: usize,
    /// Sum changes also where that does not pay: many of them, or decoding. To measure what a threshold costs.
    pub always: bool,
}

/// Factors on thresholds, made for a model: for each layer those of its channels, `(n_kv_heads, head_dim)`; none for a
/// layer without attention.
#[derive(Clone, PartialEq, Debug)]
pub struct Factors {
    /// Tells the model.
    pub model: u128,
    /// For each layer.
    pub layers: Vec<Vec<f32>>,
    /// Tells them from others.
    pub hash: u64,
}

/// Which keys a query scores exactly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exact {
    /// So many up to itself.
    Last(usize),
    /// Those of its own block of so many: as published, where a block is a twentieth of the prompt.
    Block(usize),
}

impl Exact {
    /// The first position from which on everything before `end` is far back.
    pub(in crate::backend) fn is_past(self, end: usize) -> usize {
        match self {
            Exact::Last(n) => end.saturating_add(n - 1),
            Exact::Block(n) => end.checked_next_multiple_of(n).unwrap_or(usize::MAX),
        }
    }
}

impl Delta {
    /// Keys of a frame, unless the caller says otherwise.
    pub const DEFAULT_FRAME: usize = 64;

    /// Keys that a query scores exactly, likewise.
    pub const DEFAULT_LAST: usize = 64;

    /// With a threshold that all channels share.
    pub fn new(rate: f32) -> Self {
        Self {
            rate,
            factors: None,
            exact: Exact::Last(Self::DEFAULT_LAST),
            sink: 0,
            frame: Self::DEFAULT_FRAME,
            always: false,
        }
    }

    /// That all is in range.
    ///
    /// # Errors
    /// [`Error::Invalid`] tells what is not.
    pub fn check(&self) -> Result<()> {
        let (Exact::Last(n) | Exact::Block(n)) = self.exact;
        if n == 0 {
            return Err(Error::Invalid(
                "exact keys: expected at least 1, found 0".into(),
            ));
        }
        if !matches!(self.frame, 32 | 64 | 128 | 256) {
            return Err(Error::Invalid(format!(
                "keys of a frame: expected 32, 64, 128 or 256, found {}",
                self.frame
            )));
        }
        if !(self.rate >= 0.0 && self.rate.is_finite()) {
            return Err(Error::Invalid(format!(
                "threshold: expected a number from 0, found {}",
                self.rate
            )));
        }
        Ok(())
    }

    /// Thresholds of a layer's `n` channels.
    pub(in crate::backend) fn thresholds(&self, layer: usize, n: usize) -> Vec<f32> {
        match &self.factors {
            None => vec![self.rate; n],
            Some(factors) => {
                let of_layer = factors.layers.get(layer).filter(|of| of.len() == n);
                let of_layer = of_layer.expect("compared with the model by who made the cache");
                of_layer.iter().map(|factor| factor * self.rate).collect()
            }
        }
    }
}

impl fmt::Display for Delta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "differences above {}", self.rate)?;
        if let Some(factors) = &self.factors {
            write!(f, " (calibrated, {:08x})", factors.hash as u32)?;
        }
        match self.exact {
            Exact::Last(n) => write!(f, ", last {n} exact")?,
            Exact::Block(n) => write!(f, ", own block of {n} exact")?,
        }
        if self.sink > 0 {
            write!(f, ", first {}", self.sink)?;
        }
        write!(f, ", frames of {}", self.frame)?;
        if self.always {
            f.write_str(", always")?;
        }
        Ok(())
    }
}
