//! What the layers of one sequence remember between tokens.

use crate::backend::Backend;
use crate::error::Result;

/// The memory of one layer.
pub enum LayerState<B: Backend> {
    /// Keys and values.
    Kv(B::Kv),
    /// The newest inputs of a short convolution.
    Conv(B::Conv),
}

/// The memory of one sequence, a layer each.
pub struct State<B: Backend> {
    /// In the order of the layers.
    pub layers: Vec<LayerState<B>>,
}

impl<B: Backend> LayerState<B> {
    /// The cache of an attention layer.
    pub(crate) fn kv(&mut self) -> &mut B::Kv {
        match self {
            LayerState::Kv(kv) => kv,
            LayerState::Conv(_) => unreachable!("made by the same network, from the same layer"),
        }
    }

    /// The memory of a convolution layer.
    pub(crate) fn conv(&mut self) -> &mut B::Conv {
        match self {
            LayerState::Conv(conv) => conv,
            LayerState::Kv(_) => unreachable!("made by the same network, from the same layer"),
        }
    }
}

impl<B: Backend> State<B> {
    /// Makes room for `n` positions in all.
    ///
    /// # Errors
    /// If there is no memory for them; what was there is untouched.
    pub fn reserve(&mut self, backend: &B, n: usize) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| match layer {
            LayerState::Kv(kv) => backend.kv_reserve(kv, n),
            LayerState::Conv(_) => Ok(()),
        })
    }

    /// Zeroes the memory of all convolutions.
    pub fn reset_convs(&mut self, backend: &B) {
        for layer in &mut self.layers {
            if let LayerState::Conv(conv) = layer {
                backend.conv_reset(conv);
            }
        }
    }

    /// Bytes of keys and values, and of convolution memory.
    pub fn bytes(&self, backend: &B) -> (usize, usize) {
        self.layers
            .iter()
            .fold((0, 0), |(kv_bytes, conv_bytes), layer| match layer {
                LayerState::Kv(kv) => (kv_bytes + backend.kv_bytes(kv), conv_bytes),
                LayerState::Conv(conv) => (kv_bytes, conv_bytes + backend.conv_bytes(conv)),
            })
    }
}
