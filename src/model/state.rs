//! What the layers of one sequence remember between tokens.

use std::ops::Range;

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
    /// Becomes a copy of `from`, which belongs to another timeline on the same network.
    ///
    /// # Errors
    /// If there is no memory for it; nothing has changed then.
    pub fn copy_from(&mut self, backend: &B, from: &State<B>) -> Result<()> {
        let kvs = from.layers.iter().filter_map(|layer| match layer {
            LayerState::Kv(kv) => Some(backend.kv_copy(kv)),
            LayerState::Conv(_) => None,
        });
        let kvs: Vec<_> = kvs.collect::<Result<_>>()?;
        self.kvs().zip(kvs).for_each(|(kv, copy)| *kv = copy);
        self.set_conv_rows(backend, &from.conv_rows(backend));
        Ok(())
    }

    /// The caches, in the order of their layers.
    pub fn kvs(&mut self) -> impl Iterator<Item = &mut B::Kv> {
        self.layers.iter_mut().filter_map(|layer| match layer {
            LayerState::Kv(kv) => Some(kv),
            LayerState::Conv(_) => None,
        })
    }

    /// The memories of convolutions, in the order of their layers.
    pub fn convs(&mut self) -> impl Iterator<Item = &mut B::Conv> {
        self.layers.iter_mut().filter_map(|layer| match layer {
            LayerState::Kv(_) => None,
            LayerState::Conv(conv) => Some(conv),
        })
    }

    /// Makes room to write at `positions`.
    ///
    /// # Errors
    /// If there is no memory for them; what was there is untouched.
    pub fn reserve(&mut self, backend: &B, positions: Range<usize>) -> Result<()> {
        self.kvs()
            .try_for_each(|kv| backend.kv_reserve(kv, positions.clone()))
    }

    /// Zeroes the memory of all convolutions.
    pub fn reset_convs(&mut self, backend: &B) {
        self.convs().for_each(|conv| backend.conv_reset(conv));
    }

    /// Takes the newest `n` inputs of all convolutions back; `false` if they do not reach so far.
    pub fn rewind_convs(&mut self, backend: &B, n: usize) -> bool {
        // They have seen the same tokens: what the first can, all can.
        self.convs().all(|conv| backend.conv_rewind(conv, n))
    }

    /// What all convolutions remember, one after the other.
    pub fn conv_rows(&self, backend: &B) -> Vec<f32> {
        let mut rows = Vec::new();
        for layer in &self.layers {
            if let LayerState::Conv(conv) = layer {
                backend.conv_rows(conv, &mut rows);
            }
        }
        rows
    }

    /// Makes all convolutions remember `rows`, as [`State::conv_rows`] of the same network gave them.
    pub fn set_conv_rows(&mut self, backend: &B, rows: &[f32]) {
        let n = rows.len() / self.convs().count().max(1);
        let convs = self.convs().zip(rows.chunks_exact(n.max(1)));
        convs.for_each(|(conv, rows)| backend.conv_set(conv, rows));
    }

    /// Tells `sink` the first `n` positions of all caches, see [`Backend::kv_save`].
    ///
    /// # Errors
    /// What `sink` returns.
    pub fn save(
        &self,
        backend: &B,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        self.layers.iter().try_for_each(|layer| match layer {
            LayerState::Kv(kv) => backend.kv_save(kv, n, sink),
            LayerState::Conv(_) => Ok(()),
        })
    }

    /// Takes the first `n` positions of all caches, for which there is room, from `source`.
    ///
    /// # Errors
    /// What `source` returns.
    pub fn load(
        &mut self,
        backend: &B,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.kvs().try_for_each(|kv| backend.kv_load(kv, n, source))
    }

    /// Bytes of keys and values, and of convolution memory.
    pub fn bytes(&self, backend: &B) -> (usize, usize) {
        let layers = self.layers.iter();
        let (kv_bytes, conv_bytes) =
            layers.fold((0, 0), |(kv_bytes, conv_bytes), layer| match layer {
                LayerState::Kv(kv) => (kv_bytes + backend.kv_bytes(kv), conv_bytes),
                LayerState::Conv(conv) => (kv_bytes, conv_bytes + backend.conv_bytes(conv)),
            });
        (kv_bytes + backend.kv_spare_bytes(kv_bytes), conv_bytes)
    }
}
