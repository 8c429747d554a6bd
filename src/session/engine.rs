//! The seam between sessions and backends: a network on some backend, whose type ends here.
//!
//! One call through it is a whole pass, so it costs a token nothing.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

#[cfg(feature = "gpu")]
use super::split;
use super::{LoadOptions, Threads, repack};
use crate::backend::cpu::Cpu;
use crate::backend::cpu::panels::Copies;
use crate::backend::cpu::pool::Pool;
use crate::backend::cpu::residency::Residency;
use crate::backend::cpu::stored::StoredExperts;
#[cfg(feature = "ggml")]
use crate::backend::ggml::Ggml;
#[cfg(feature = "gpu")]
use crate::backend::gpu::{self, Gpu};
use crate::backend::planner::{Planner, Tally};
use crate::backend::select::KvOptions;
use crate::backend::tracer::Tracer;
use crate::backend::{Backend, BackendKind, Lost, NoMemory};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::config::Config;
use crate::model::state::State;
use crate::model::{self, Network, Pass};
use crate::profile::{Trace, Work};

/// A network whose weights a backend has taken; makes an engine for each session.
pub(super) trait Loaded: Send + Sync {
    /// Sizes of the network.
    fn config(&self) -> &Config;

    /// A backend with fresh memory for one sequence.
    fn engine(&self, kv: &KvOptions) -> Result<Box<dyn Engine>>;
}

/// Runs passes of one sequence and remembers what its layers do.
pub(super) trait Engine: Send {
    /// Makes room to write at `positions`.
    fn reserve(&mut self, positions: Range<usize>) -> Result<()>;

    /// Runs `pass`, for whose positions there is room. `logits` becomes `(n_wanted, n_vocab)`.
    fn forward(&mut self, pass: &Pass, logits: &mut Vec<f32>) -> Result<()> {
        self.forward_top(pass, 0, &mut Vec::new(), logits)
    }

    /// The same of a pass with one output, of which the `k` largest are all that is wanted: they come to `top` where the
    /// backend can tell them apart, and `logits` become empty.
    fn forward_top(
        &mut self,
        pass: &Pass,
        k: usize,
        top: &mut Vec<(u32, f32)>,
        logits: &mut Vec<f32>,
    ) -> Result<()>;

    /// Passes end where `cancel` says so, see [`Backend::set_cancel`].
    fn set_cancel(&mut self, cancel: &Cancel);

    /// Zeroes the memory of all convolutions.
    fn reset_convs(&mut self);

    /// Takes the newest `n` inputs of all convolutions back; `false` if they do not reach so far.
    fn rewind_convs(&mut self, n: usize) -> bool;

    /// What all convolutions remember.
    fn conv_rows(&self) -> Result<Vec<f32>>;

    /// Makes all convolutions remember `rows`, which are as many as [`Engine::conv_rows`] gives.
    fn set_conv_rows(&mut self, rows: &[f32]);

    /// A copy of what the layers remember; keys and values are shared where the backend can.
    fn memory(&self) -> Result<Memory>;

    /// Remembers what `memory`, of an engine of the same model and cache types, holds; `false` if it is of another backend.
    fn set_memory(&mut self, memory: &Memory) -> Result<bool>;

    /// Tells `sink` the first `n` positions of all caches, see [`Backend::kv_save`].
    fn save(&self, n: usize, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()>;

    /// Takes the first `n` positions of all caches from `source`.
    fn load(&mut self, n: usize, source: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()>;

    /// Bytes of keys and values, and of convolution memory.
    fn state_bytes(&self) -> (usize, usize);

    /// Bytes of activations.
    fn scratch_bytes(&self) -> usize;

    /// What the backend has done.
    fn work(&self) -> Work;

    /// What was traced since the last call, if the model was loaded for that.
    fn take_trace(&mut self) -> Option<Trace>;

    /// The same for each operation, where the backend tells them apart.
    fn tallies(&self) -> Vec<Tally>;
}

/// What the layers of a timeline remember, apart from an engine.
pub(super) struct Memory(pub(super) Box<dyn Any + Send>);

/// Builds the network of a file on the backend that `options` name, which runs `threads`.
pub(super) fn load(
    gguf: &Gguf,
    options: &LoadOptions,
    threads: Threads,
    residency: &Arc<Residency>,
    experts: Option<Arc<StoredExperts>>,
) -> Result<Box<dyn Loaded>> {
    let cpu = |layers| load_cpu(gguf, options, threads, residency, experts.clone(), layers);
    match options.backend {
        BackendKind::Cpu => cpu(None),
        #[cfg(feature = "ggml")]
        BackendKind::Ggml => placed(gguf, options, None, move || Ggml::new(threads.decode)),
        #[cfg(feature = "ggml")]
        BackendKind::GgmlRepack => {
            placed(gguf, options, None, move || Ggml::repacking(threads.decode))
        }
        #[cfg(feature = "gpu")]
        BackendKind::Gpu => {
            let n_layers = model::n_layers(gguf)?;
            let first = match options.gpu_layers {
                Some(0) => return cpu(None),
                Some(n) => n_layers.saturating_sub(n),
                None => 0,
            };
            let host = match options.cpu_moe {
                true => Some(cpu_backend(threads, residency, experts.clone())?),
                false => None,
            };
            let device = gpu::shared(options.device)?;
            if let Some(bytes) = options.gpu_memory {
                device.set_budget(bytes);
            }
            if let Some(folder) = &options.gpu_cache {
                device.keep_pipelines(folder);
            }
            let timed = options.trace;
            let backend = move || {
                // It times its own work: by the host it would be seen recording.
                let gpu = match timed {
                    true => Gpu::timing(Arc::clone(&device))?,
                    false => Gpu::new(Arc::clone(&device))?,
                };
                Ok(match &host {
                    Some(host) => gpu.with_host(host()?),
                    None => gpu,
                })
            };
            if first == 0 {
                return on_backend(gguf, &options.cancel, None, backend);
            }
            let last = on_backend(gguf, &options.cancel, Some(first..n_layers), backend)?;
            Ok(Box::new(split::Loaded {
                first: cpu(Some(0..first))?,
                last,
            }))
        }
    }
}

/// Makes backends on the CPU that share their pools.
fn cpu_backend(
    Threads { decode, prefill }: Threads,
    residency: &Arc<Residency>,
    experts: Option<Arc<StoredExperts>>,
) -> Result<impl Fn() -> Result<Cpu> + Send + Sync + 'static> {
    let pool = |n| match Pool::new(n) {
        Ok(pool) => Ok(Arc::new(pool)),
        Err(e) => Err(Error::Invalid(format!("{n} threads: {e}"))),
    };
    let for_decode = pool(decode)?;
    // Of two pools one sleeps; a pool that let some of its workers out would wake them for nothing.
    let for_prefill = match prefill == decode {
        true => Arc::clone(&for_decode),
        false => pool(prefill)?,
    };
    let pools = [for_decode, for_prefill];
    let residency = Arc::clone(residency);
    Ok(move || {
        Ok(Cpu::within(
            pools.clone(),
            Arc::clone(&residency),
            experts.clone(),
        ))
    })
}

fn load_cpu(
    gguf: &Gguf,
    options: &LoadOptions,
    threads: Threads,
    residency: &Arc<Residency>,
    experts: Option<Arc<StoredExperts>>,
    layers: Option<Range<usize>>,
) -> Result<Box<dyn Loaded>> {
    // Nothing of a model of which the GPU has a part.
    let copies = (repack::copied_bytes(gguf, options) > 0).then(Arc::<Copies>::default);
    let (backend, asked) = (cpu_backend(threads, residency, experts)?, copies.clone());
    let backend = move || Ok(backend()?.repacking(asked.clone()));
    let loaded = placed(gguf, options, layers, backend)?;
    copies.map_or(Ok(()), |copies| copies.make(&options.cancel))?;
    Ok(loaded)
}

/// Builds the network of a header for sessions that count and do not compute.
pub(super) fn outline(gguf: &Gguf, threads: Threads) -> Result<Box<dyn Loaded>> {
    let n_threads = threads.decode.max(threads.prefill);
    on_backend(gguf, &Cancel::default(), None, move || {
        Ok(Planner::new(n_threads))
    })
}

fn placed<B, F>(
    gguf: &Gguf,
    options: &LoadOptions,
    layers: Option<Range<usize>>,
    backend: F,
) -> Result<Box<dyn Loaded>>
where
    B: Backend + Send + 'static,
    F: Fn() -> Result<B> + Send + Sync + 'static,
{
    if options.trace {
        on_backend(gguf, &options.cancel, layers, move || {
            Ok(Tracer::new(backend()?))
        })
    } else {
        on_backend(gguf, &options.cancel, layers, backend)
    }
}

fn on_backend<B, F>(
    gguf: &Gguf,
    cancel: &Cancel,
    layers: Option<Range<usize>>,
    backend: F,
) -> Result<Box<dyn Loaded>>
where
    B: Backend + Send + 'static,
    F: Fn() -> Result<B> + Send + Sync + 'static,
{
    let network = caught(|| model::load_part(gguf, &backend()?, cancel, layers.clone()))?;
    let network = Arc::from(network);
    Ok(Box::new(Placed { network, backend }))
}

/// What unwinds out of a backend because it could not do something, as an error. Whatever unwinds, buffers have gone back
/// to their list, and a session forgets a pass that failed.
fn caught<T>(run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| {
        Err(match payload.downcast::<NoMemory>() {
            Ok(no_memory) => Error::OutOfMemory {
                what: "activations".into(),
                bytes: no_memory.bytes,
            },
            Err(payload) => match payload.downcast::<Lost>() {
                Ok(lost) => lost.0,
                Err(payload) => resume_unwind(payload),
            },
        })
    })
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
    kv: KvOptions,
    /// The token after the last pass and where it comes, if its caller takes the most likely,
    largest: Option<(usize, u32)>,
    /// and whether the pass of it is on its way.
    is_ahead: bool,
}

impl<B: Backend> Runner<B> {
    /// Runs the pass of the token that `pass`, which was asked for its largest logit, will find.
    fn run_ahead(&mut self, pass: &Pass) -> Result<bool> {
        let start = pass.start + 1;
        self.state.reserve(&self.backend, start..start + 1)?;
        if !self.backend.begin_ahead() {
            return Ok(false);
        }
        let pass = Pass {
            tokens: &[0], // it is another
            start,
            ..*pass
        };
        let wanted = self
            .network
            .forward(&mut self.backend, &mut self.state, &pass);
        wanted.map_or(Ok(false), |wanted| self.backend.ask_largest(&wanted))
    }

    /// What is on its way is of no use: another token comes, or none.
    fn turn_back(&mut self) {
        (self.largest, self.is_ahead) = (None, false);
    }
}

impl<B, F> Loaded for Placed<B, F>
where
    B: Backend + Send + 'static,
    F: Fn() -> Result<B> + Send + Sync,
{
    fn config(&self) -> &Config {
        self.network.config()
    }

    fn engine(&self, kv: &KvOptions) -> Result<Box<dyn Engine>> {
        let backend = (self.backend)()?;
        let state = caught(|| Ok(self.network.state(&backend, kv)))?;
        Ok(Box::new(Runner {
            state,
            network: Arc::clone(&self.network),
            backend,
            kv: kv.clone(),
            largest: None,
            is_ahead: false,
        }))
    }
}

impl<B: Backend + Send + 'static> Engine for Runner<B> {
    fn reserve(&mut self, positions: Range<usize>) -> Result<()> {
        self.state.reserve(&self.backend, positions)
    }

    fn forward_top(
        &mut self,
        pass: &Pass,
        k: usize,
        top: &mut Vec<(u32, f32)>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        top.clear();
        // A caller who took the most likely token will do so again.
        let is_chain = pass.follows && self.largest == Some((pass.start, pass.tokens[0]));
        let runs = is_chain && self.is_ahead;
        self.turn_back();
        let done = caught(|| {
            let mut asked = runs;
            let mut wanted = None;
            if runs {
                self.backend.adopt(self.state.convs());
            } else {
                self.backend.begin(pass.step);
                let network = &self.network;
                wanted = network.forward(&mut self.backend, &mut self.state, pass);
            }
            if let Some(wanted) = wanted.as_ref().filter(|_| is_chain) {
                asked = self.backend.ask_largest(wanted)?;
            }
            if asked {
                self.is_ahead = self.run_ahead(pass)?;
                logits.clear();
                top.push(self.backend.answer()?);
                return Ok(());
            }
            match wanted {
                Some(wanted) if k > 0 && self.backend.read_top(&wanted, k, top)? => {
                    logits.clear();
                    Ok(())
                }
                Some(wanted) => self.backend.read(&wanted, logits),
                None => {
                    logits.clear();
                    self.backend.flush()
                }
            }
        });
        match (&done, &top[..]) {
            (Ok(()), [(token, _)]) => self.largest = Some((pass.start + 1, *token)),
            _ => self.turn_back(),
        }
        if done.is_err() {
            self.backend.stopped();
        }
        done
    }

    fn set_cancel(&mut self, cancel: &Cancel) {
        self.backend.set_cancel(cancel);
    }

    fn reset_convs(&mut self) {
        self.turn_back();
        self.state.reset_convs(&self.backend);
    }

    fn rewind_convs(&mut self, n: usize) -> bool {
        self.turn_back();
        self.state.rewind_convs(&self.backend, n)
    }

    fn conv_rows(&self) -> Result<Vec<f32>> {
        caught(|| Ok(self.state.conv_rows(&self.backend)))
    }

    fn set_conv_rows(&mut self, rows: &[f32]) {
        self.turn_back();
        self.state.set_conv_rows(&self.backend, rows);
    }

    fn memory(&self) -> Result<Memory> {
        caught(|| {
            let mut copy = self.network.state(&self.backend, &self.kv);
            copy.copy_from(&self.backend, &self.state)?;
            Ok(Memory(Box::new(copy)))
        })
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<bool> {
        let Some(state) = memory.0.downcast_ref::<State<B>>() else {
            return Ok(false);
        };
        self.turn_back();
        caught(|| self.state.copy_from(&self.backend, state))?;
        Ok(true)
    }

    fn save(&self, n: usize, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.state.save(&self.backend, n, sink)
    }

    fn load(&mut self, n: usize, source: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        self.turn_back();
        self.reserve(0..n)?;
        self.state.load(&self.backend, n, source)
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

    fn take_trace(&mut self) -> Option<Trace> {
        self.backend.take_trace()
    }

    fn tallies(&self) -> Vec<Tally> {
        self.backend.tallies()
    }
}
