//! Experts that are read into the slots of a store when a router has named them: where a pass and the store meet.
//!
//! A router's choice is asked for at once, so that reading goes on beside what is computed before the experts are.

use std::collections::BTreeMap;
use std::panic::resume_unwind;

use crate::backend::{Lost, MAX_USED};
use crate::error::Result;
use crate::experts::{Class, ExpertStore, Prefetch, Request, Waves};
use crate::profile::ExpertWork;

/// Matrices of experts whose bytes are a store's.
pub struct StoredExperts {
    store: ExpertStore,
    /// Layers of the store by the names of their tensors.
    layers: BTreeMap<String, usize>,
}

impl StoredExperts {
    /// Those of `store`, whose parts are gate, up and down; each layer is `blk.i.ffn_*_exps` of the one in `blocks`.
    ///
    /// # Panics
    /// If these are not as many as the layers of the store.
    pub fn new(store: ExpertStore, blocks: &[usize]) -> Self {
        assert_eq!(
            blocks.len(),
            store.layout().layers().len(),
            "layers with experts"
        );
        let parts = ["gate", "up", "down"];
        let layers = blocks.iter().enumerate().flat_map(|(layer, block)| {
            parts.map(|part| (format!("blk.{block}.ffn_{part}_exps.weight"), layer))
        });
        Self {
            layers: layers.collect(),
            store,
        }
    }

    /// The store.
    pub fn store(&self) -> &ExpertStore {
        &self.store
    }

    /// What it has done, for all who use it.
    pub(super) fn work(&self) -> ExpertWork {
        let totals = self.store.totals();
        ExpertWork {
            used: totals.used,
            hits: totals.hits,
            bytes: totals.all_bytes(),
            reading: totals.reading.as_nanos() as u64,
            waited: totals.waited.as_nanos() as u64,
            guesses: totals.guesses,
            guesses_used: totals.guesses_used,
            guesses_wasted: totals.guesses_wasted,
        }
    }

    /// The layer of the store that has the tensor `name`.
    pub(super) fn layer(&self, name: &str) -> Option<usize> {
        self.layers.get(name).copied()
    }

    /// Whether experts are read on guesses.
    pub(super) fn guesses(&self) -> bool {
        self.store.prefetch() == Prefetch::Speculative
    }

    /// A guess at the experts of one row of routes.
    pub(super) fn hint(&self, layer: usize, ids: &[f32]) {
        self.store.hint(layer, whole(ids, &mut [0; MAX_USED]));
    }

    /// Holds the experts of one row of routes.
    pub(super) fn token(&self, layer: usize, (ids, weights): (&[f32], &[f32])) -> Request {
        let mut list = [0; MAX_USED];
        let ids = whole(ids, &mut list);
        read(self.store.begin_in_turn(layer, ids, weights, Class::Exact))
    }

    /// Holds the experts of many rows of routes, `n_used` experts each, group by group.
    pub(super) fn batch<'r>(
        &self,
        layer: usize,
        n_used: usize,
        routes: impl Iterator<Item = &'r [f32]>,
    ) -> Batch {
        let n_experts = self.store.layout().layers()[layer].n_experts;
        let mut sums = vec![None::<f32>; n_experts];
        for row in routes {
            let (ids, weights) = row.split_at(n_used);
            for (id, weight) in ids.iter().zip(weights) {
                *sums[*id as usize].get_or_insert(0.0) += weight;
            }
        }
        let named = (0..).zip(&sums).filter_map(|(id, sum)| Some((id, (*sum)?)));
        let (ids, weights): (Vec<u32>, Vec<f32>) = named.unzip();
        let mut waves = read(self.store.waves(layer, &ids, &weights));
        Batch {
            first: waves.next(),
            waves,
        }
    }
}

/// Indices, which routes hold as floats.
fn whole<'l>(ids: &[f32], list: &'l mut [u32; MAX_USED]) -> &'l [u32] {
    let list = &mut list[..ids.len()];
    list.iter_mut()
        .zip(ids)
        .for_each(|(to, id)| *to = *id as u32);
    list
}

/// What a router has named and nobody has computed yet.
pub(super) enum Named {
    /// By one token.
    Token(Request),
    /// By many.
    Batch(Batch),
}

/// The experts of many tokens.
pub(super) struct Batch {
    waves: Waves,
    first: Option<Result<Request>>,
}

impl Batch {
    /// All experts, in the order in which they come.
    pub(super) fn order(&self) -> impl Iterator<Item = usize> {
        self.waves.ids().iter().map(|id| *id as usize)
    }

    /// The next group; the one before must have ended.
    pub(super) fn next(&mut self) -> Option<Request> {
        let wave = self.first.take().or_else(|| self.waves.next())?;
        Some(read(wave))
    }
}

/// Unwinds with the error of a reader: operations return tensors.
pub(super) fn read<T>(read: Result<T>) -> T {
    read.unwrap_or_else(|error| resume_unwind(Box::new(Lost(error))))
}
