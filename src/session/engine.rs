//! The seam between sessions and backends: a network on some backend, whose type ends here.
//!
//! One call through it is a whole pass, so it costs a token nothing.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use super::LoadOptions;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::pool::Pool;
use crate::backend::cpu::residency::Residency;
#[cfg(feature = "ggml")]
use crate::backend::ggml::Ggml;
use crate::backend::planner::{Planner, Tally};
use crate::backend::{Backend, BackendKind, KvType, NoMemory};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::config::Config;
use crate::model::state::State;
use crate::model::{self, Network, Pass};
use crate::profile::Work;

/// A network whose weights a backend has taken; makes an engine for each session.
pub(super) trait Loaded: Send + Sync {
    /// Sizes of the network.
    fn config(&self) -> &Config;

    /// A backend with fresh memory for one sequence.
    fn engine(&self, kv: KvType) -> Result<Box<dyn Engine>>;
}

/// Runs passes of one sequence and remembers what its layers do.
pub(super) trait Engine: Send {
    /// Makes room for `n` positions in all.
    fn reserve(&mut self, n: usize) -> Result<()>;

    /// Runs `pass`, for whose positions there is room. `logits` becomes `(n_wanted, n_vocab)`.
    fn forward(&mut self, pass: &Pass, logits: &mut Vec<f32>) -> Result<()>;

    /// Zeroes the memory of all convolutions.
    fn reset_convs(&mut self);

    /// Bytes of keys and values, and of convolution memory.
    fn state_bytes(&self) -> (usize, usize);

    /// Bytes of activations.
    fn scratch_bytes(&self) -> usize;

    /// What the backend has done.
    fn work(&self) -> Work;

    /// The same for each operation, where the backend tells them apart.
    fn tallies(&self) -> Vec<Tally>;
}

/// Builds the network of a file on the backend that `options` name, which runs `n_threads`.
pub(super) fn load(
    gguf: &Gguf,
    options: &LoadOptions,
    n_threads: usize,
    residency: &Arc<Residency>,
) -> Result<Box<dyn Loaded>> {
    match options.backend {
        BackendKind::Cpu => {
            let no_thread = |e| Error::Invalid(format!("{n_threads} threads: {e}"));
            let pool = Arc::new(Pool::new(n_threads).map_err(no_thread)?);
            let residency = Arc::clone(residency);
            placed(gguf, move || {
                Ok(Cpu::within(Arc::clone(&pool), Arc::clone(&residency)))
            })
        }
        #[cfg(feature = "ggml")]
        BackendKind::Ggml => placed(gguf, move || Ggml::new(n_threads)),
        #[cfg(feature = "ggml")]
        BackendKind::GgmlRepack => placed(gguf, move || Ggml::repacking(n_threads)),
    }
}

/// Builds the network of a header for sessions that count and do not compute.
pub(super) fn outline(gguf: &Gguf, n_threads: usize) -> Result<Box<dyn Loaded>> {
    placed(gguf, move || Ok(Planner::new(n_threads)))
}

fn placed<B, F>(gguf: &Gguf, backend: F) -> Result<Box<dyn Loaded>>
where
    B: Backend + Send + 'static,
    F: Fn() -> Result<B> + Send + Sync + 'static,
{
    let network = Arc::from(model::load(gguf, &backend()?)?);
    Ok(Box::new(Placed { network, backend }))
}

/// A network, and how to make another backend of the kind that holds its weights.
struct Placed<B: Backend, F> {
    network: Arc<dyn Network<B>>,
    backend: F,
}

struct Runner<B: Backend> {
    network: Arc<dyn Network<B>>,
    backend: B,
    state: State<B>,
}

impl<B, F> Loaded for Placed<B, F>
where
    B: Backend + Send + 'static,
    F: Fn() -> Result<B> + Send + Sync,
{
    fn config(&self) -> &Config {
        self.network.config()
    }

    fn engine(&self, kv: KvType) -> Result<Box<dyn Engine>> {
        let backend = (self.backend)()?;
        Ok(Box::new(Runner {
            state: self.network.state(&backend, kv),
            network: Arc::clone(&self.network),
            backend,
        }))
    }
}

impl<B: Backend + Send> Engine for Runner<B> {
    fn reserve(&mut self, n: usize) -> Result<()> {
        self.state.reserve(&self.backend, n)
    }

    fn forward(&mut self, pass: &Pass, logits: &mut Vec<f32>) -> Result<()> {
        self.backend.begin(pass.step);
        let run = || {
            self.network
                .forward(&mut self.backend, &mut self.state, pass)
        };
        // Whatever unwinds, buffers have gone back to their list, and a session forgets a pass that failed.
        let wanted = catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
            match payload.downcast::<NoMemory>() {
                Ok(no_memory) => Error::OutOfMemory {
                    what: "activations".into(),
                    bytes: no_memory.bytes,
                },
                Err(payload) => resume_unwind(payload),
            }
        });
        match wanted? {
            Some(wanted) => self.backend.read(&wanted, logits),
            None => {
                logits.clear();
                self.backend.flush()
            }
        }
    }

    fn reset_convs(&mut self) {
        self.state.reset_convs(&self.backend);
    }

    fn state_bytes(&self) -> (usize, usize) {
        self.state.bytes(&self.backend)
    }

    fn scratch_bytes(&self) -> usize {
        self.backend.scratch_bytes()
    }

    fn work(&self) -> Work {
        self.backend.work()
    }

    fn tallies(&self) -> Vec<Tally> {
        self.backend.tallies()
    }
}
