//! Profiles: where the time of a prompt and a reply goes.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::c_char;
use std::ops::ControlFlow;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;

use super::handle::{self, Object};
use super::model::load_options;
use super::params::{self, Place, kinglet_model_params, kinglet_profile_params};
use super::values::{give_buffer, kinglet_buffer, opaque};
use super::{Failure, Outcome, Status, enter, leave};
use crate::profile::report::About;
use crate::profile::{Limits, Operation, Profile, Recorder, machine};
use crate::sampler::Sampler;
use crate::{Cancel, LoadOptions, Model, Session, SessionOptions};

opaque! {
    /// Where the time of a run went.
    kinglet_profile;
}

impl Object for Profile {
    const NAME: &'static str = "profile";
    type Opaque = kinglet_profile;
}

/// Tokens after which the trace is emptied, before its room is used up.
const TOKENS_A_TRACE: usize = 8;

/// Tokens of a prompt or a reply at most.
const MAX_TOKENS: u32 = 1 << 16;

/// Loads the model, reads a prompt, decodes a reply.
fn profile(path: &Path, load: &LoadOptions, n_prompt: usize, n_gen: usize) -> Outcome<Profile> {
    let load = LoadOptions {
        trace: true,
        ..load.clone()
    };
    let mut recorder = Recorder::default();
    let mut session = recorder.phase("load", |recorder| -> Outcome<Session> {
        let model = Model::load(path, &load)?;
        for (part, time) in model.loading() {
            recorder.add_span(Operation::Load, part, time.start, time.end);
        }
        let options = SessionOptions {
            n_ctx: n_prompt + n_gen,
            ..SessionOptions::default()
        };
        let open = || Session::new(&model, &options);
        Ok(recorder.span(Operation::Load, "session", open)?)
    })?;
    session.set_cancel(&load.cancel);
    let model = session.model().clone();
    let mut sampler = Sampler::new(&model.recommended());
    if let Ok(tokenizer) = model.tokenizer() {
        sampler.forbid(tokenizer.ends());
    }
    let n_vocab = model.info().config.n_vocab;
    let prompt: Vec<u32> = (0..n_prompt).map(|i| (i * 7919 % n_vocab) as u32).collect();
    recorder.phase("prefill", |recorder| -> Outcome {
        session.prefill(&prompt, &mut |_, _| ControlFlow::Continue(()))?;
        recorder.add(|| session.take_trace());
        Ok(())
    })?;
    recorder.phase("decode", |recorder| -> Outcome {
        for i in 1..=n_gen {
            recorder.token(|recorder| -> Outcome {
                let sample = || -> crate::Result<u32> {
                    let token = sampler.sample(session.logits())?;
                    sampler.accept(token);
                    Ok(token)
                };
                let token = recorder.span(Operation::Sample, "sample", sample)?;
                Ok(session.decode(token)?)
            })?;
            if i == n_gen || i.is_multiple_of(TOKENS_A_TRACE) {
                recorder.add(|| session.take_trace());
            }
        }
        Ok(())
    })?;
    session.set_cancel(&Cancel::default());
    let info = model.info();
    let about = About {
        model: info.name.clone(),
        weight_bytes: info.weight_bytes,
        n_layers: info.config.n_layers,
        n_threads: model.n_threads(),
        cpu: machine::cpu_name(),
        version: env!("CARGO_PKG_VERSION").into(),
        experts: None,
    };
    Ok(recorder.finish(about, Limits::default()))
}

/// Profiles a run of the model at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_profile_make(
    out: *mut *mut kinglet_profile,
    path: *const c_char,
    path_len: usize,
    model: *const kinglet_model_params,
    params: *const kinglet_profile_params,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        // SAFETY: a text of the caller.
        let path = unsafe { params::text("path", path, path_len) }?;
        // SAFETY: a struct of the caller.
        let load = unsafe { load_options(model) }?;
        // SAFETY: a struct of the caller.
        let params = unsafe { params::read(params) }?;
        let tokens = |n: u32, default: usize| match n {
            0 => Ok(default),
            1..=MAX_TOKENS => Ok(n as usize),
            _ => Err(Failure::argument(format!(
                "tokens of a profile: expected at most {MAX_TOKENS}, found {n}"
            ))),
        };
        let n_prompt = tokens(params.map_or(0, |p| p.n_prompt), 512)?;
        let n_gen = tokens(params.map_or(0, |p| p.n_gen), 64)?;
        let profile = profile(Path::new(path), &load, n_prompt, n_gen)?;
        out.set(handle::give(Arc::new(profile))?);
        Ok(())
    })
}

/// Gives what `write` makes of a profile.
fn give(
    profile: *mut kinglet_profile,
    out: *mut *mut kinglet_buffer,
    write: impl FnOnce(&Profile, &mut Vec<u8>) -> std::io::Result<()>,
) -> Outcome {
    // SAFETY: a place of the caller.
    let out = unsafe { Place::needed(out, null_mut()) }?;
    let profile = handle::get::<Profile>(profile)?;
    let mut bytes = Vec::new();
    write(&profile, &mut bytes).expect("memory takes what is written");
    out.set(give_buffer(bytes)?);
    Ok(())
}

/// The report as JSON.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_profile_json(
    profile: *mut kinglet_profile,
    out: *mut *mut kinglet_buffer,
) -> Status {
    enter(|| {
        give(profile, out, |profile, bytes| {
            Ok(serde_json::to_writer(bytes, &profile.report)?)
        })
    })
}

/// Every operation, as trace viewers read it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_profile_trace(
    profile: *mut kinglet_profile,
    out: *mut *mut kinglet_buffer,
) -> Status {
    enter(|| {
        give(profile, out, |profile, bytes| {
            profile.write_chrome_trace(bytes)
        })
    })
}

/// Forgets a profile.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_profile_release(profile: *mut kinglet_profile) {
    leave(|| drop(handle::take::<Profile>(profile)));
}
