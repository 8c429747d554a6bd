//! A prompt and a reply of which everything is timed.

use std::ops::ControlFlow;
use std::path::Path;

use super::generate::choose;
use super::{LoadOptions, Model, Session, SessionOptions};
use crate::error::{Error, Result};
use crate::experts::ExpertStore;
use crate::profile::report::{About, Experts};
use crate::profile::{Operation, Recorder, machine};
use crate::sampler::Sampler;

/// Tokens after which the trace is emptied: there is room for twice as many passes of a model with a hundred layers.
const TOKENS_A_TRACE: usize = 8;

/// Loads the model at `path`, traced, and opens a session on it, as the phase `load` of `recorder`.
///
/// # Errors
/// As [`Model::load`] and [`Session::new`].
pub fn load_profiled(
    recorder: &mut Recorder,
    path: &Path,
    load: &LoadOptions,
    options: &SessionOptions,
) -> Result<Session> {
    let load = LoadOptions {
        trace: true,
        ..load.clone()
    };
    recorder.phase("load", |recorder| {
        let model = Model::load(path, &load)?;
        for (part, time) in model.loading() {
            recorder.add_span(Operation::Load, part, time.start, time.end);
        }
        let open = || Session::new(&model, options);
        recorder.span(Operation::Load, "session", open)
    })
}

/// Reads `prompt` and decodes `n_gen` tokens, sampled as the model's file recommends, which do not end before: the phases
/// `prefill`, `first token` and `decode` of `recorder`. What was measured. `stop` is asked between steps.
///
/// # Errors
/// As [`Session::prefill`] and [`Session::decode`]; [`Error::Cancelled`] if `stop` says so.
pub fn run_profiled(
    recorder: &mut Recorder,
    session: &mut Session,
    prompt: &[u32],
    n_gen: usize,
    stop: &dyn Fn() -> bool,
) -> Result<About> {
    let model = session.model().clone();
    let mut sampler = Sampler::new(&model.recommended());
    if let Ok(tokenizer) = model.tokenizer() {
        sampler.forbid(tokenizer.ends());
    }
    recorder.phase("prefill", |recorder| -> Result<()> {
        session.prefill(prompt, &mut |_, _| match stop() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?;
        recorder.add(|| session.take_trace());
        Ok(())
    })?;
    let mut reply = |recorder: &mut Recorder, n: usize| -> Result<()> {
        for i in 1..=n {
            if stop() {
                return Err(Error::Cancelled);
            }
            recorder.token(|recorder| -> Result<()> {
                let sample = || -> Result<u32> {
                    let token = choose(session, &mut sampler, None)?;
                    sampler.accept(token);
                    Ok(token)
                };
                let token = recorder.span(Operation::Sample, "sample", sample)?;
                session.decode_top(token, sampler.reach().unwrap_or(0))
            })?;
            if i == n || i.is_multiple_of(TOKENS_A_TRACE) {
                recorder.add(|| session.take_trace());
            }
        }
        Ok(())
    };
    if n_gen > 0 {
        recorder.phase("first token", |recorder| reply(recorder, 1))?;
    }
    if n_gen > 1 {
        recorder.phase("decode", |recorder| reply(recorder, n_gen - 1))?;
    }
    let info = model.info();
    Ok(About {
        model: info.name.clone(),
        weight_bytes: info.weight_bytes,
        n_layers: info.config.n_layers,
        n_threads: model.n_threads(),
        cpu: machine::cpu_name(),
        version: env!("CARGO_PKG_VERSION").into(),
        experts: model.experts().map(experts),
    })
}

/// What there is to tell of a store.
fn experts(store: &ExpertStore) -> Experts {
    let stats = store.stats();
    let layers = stats.layers.iter();
    Experts {
        slots: stats.n_slots,
        all: store.layout().n_experts(),
        slot_bytes: store.layout().slot_bytes(),
        policy: stats.policy.into(),
        disk: stats.disk.into(),
        io_threads: stats.io_threads,
        layers: layers.map(|layer| (layer.used, layer.hits)).collect(),
    }
}
