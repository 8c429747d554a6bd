//! Profiles: where the time of a prompt and a reply goes.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::c_char;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;

use super::handle::{self, Object};
use super::model::load_options;
use super::params::{self, Place, kinglet_model_params, kinglet_profile_params};
use super::values::{give_buffer, kinglet_buffer, opaque};
use super::{Failure, Outcome, Status, enter, leave};
use crate::profile::{Limits, Profile, Recorder};
use crate::session::{load_profiled, run_profiled};
use crate::{LoadOptions, SessionOptions};

opaque! {
    /// Where the time of a run went.
    kinglet_profile;
}

impl Object for Profile {
    const NAME: &'static str = "profile";
    type Opaque = kinglet_profile;
}

/// Tokens of a prompt or a reply at most.
const MAX_TOKENS: u32 = 1 << 16;

/// Loads the model, reads a prompt, decodes a reply.
fn profile(path: &Path, load: &LoadOptions, n_prompt: usize, n_gen: usize) -> Outcome<Profile> {
    let options = SessionOptions {
        n_ctx: n_prompt + n_gen,
        ..SessionOptions::default()
    };
    let mut recorder = Recorder::default();
    let mut session = load_profiled(&mut recorder, path, load, &options)?;
    session.set_cancel(&load.cancel);
    let n_vocab = session.model().info().config.n_vocab;
    let prompt: Vec<u32> = (0..n_prompt).map(|i| (i * 7919 % n_vocab) as u32).collect();
    let about = run_profiled(&mut recorder, &mut session, &prompt, n_gen, &|| false)?;
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
