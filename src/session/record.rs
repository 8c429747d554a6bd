//! Reads a text densely and records something of what each layer does.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use super::{Model, Session, SessionOptions};
use crate::backend::select::{Ask, Chunking, KvOptions, Plan, Select};
use crate::error::{Error, Result};

/// Takes what it wants of a query that a layer asks for; the flag is set at the last of the text, when all keys are there.
type Add<R> = fn(&mut R, &Ask, bool);

/// Looks on: every query reads everything.
struct Recorder<R> {
    /// Positions of the text.
    n: usize,
    add: Add<R>,
    layers: Mutex<BTreeMap<usize, R>>,
}

impl<R> fmt::Debug for Recorder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

impl<R: Default + Send> Select for Recorder<R> {
    /// A sum of one key is a key.
    fn chunking(&self) -> Option<Chunking> {
        Some(Chunking::Fixed(1))
    }

    fn sees_all(&self, _: usize, _: &Range<usize>) -> bool {
        false
    }

    fn budget(&self, _n_seen: usize) -> usize {
        self.n
    }

    fn sums_queries(&self) -> bool {
        true
    }

    fn select(&self, ask: &Ask, plan: &mut Plan) {
        plan.push(ask.seen.clone());
        let mut layers = self.layers.lock().expect("no panic before");
        let layer = layers.entry(ask.layer).or_default();
        (self.add)(layer, ask, ask.position + 1 == self.n);
    }
}

/// What `add` has taken of each layer when `tokens` have been read. `on` is told how many of them have been, and may stop
/// it: [`Error::Cancelled`].
pub(super) fn record<R: Default + Send + 'static>(
    model: &Model,
    tokens: &[u32],
    add: Add<R>,
    on: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<BTreeMap<usize, R>> {
    let recorder = Arc::new(Recorder {
        n: tokens.len(),
        add,
        layers: Mutex::default(),
    });
    let options = SessionOptions {
        n_ctx: tokens.len(),
        ..SessionOptions::default()
    };
    let kv = KvOptions {
        select: Some(recorder.clone()),
        ..options.kv_options()?
    };
    let mut session = Session::new(model, &options)?;
    session.engine = model.0.network.engine(&kv)?;
    let mut flow = ControlFlow::Continue(());
    session.prefill(tokens, &mut |done, of| {
        flow = on(done, of);
        flow
    })?;
    if flow.is_break() {
        return Err(Error::Cancelled);
    }
    let mut layers = recorder.layers.lock().expect("no panic before");
    Ok(std::mem::take(&mut *layers))
}
