//! Models, and plans for them.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::{c_char, c_int};
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, PoisonError};

use super::handle::{self, Object};
use super::params::{
    self, Out, Place, flag, kinglet_model_info, kinglet_model_params, kinglet_plan,
    kinglet_session_params, reserved,
};
use super::runtime::{Runtime, kinglet_runtime};
use super::values::{cancel_of, give_buffer, kinglet_buffer, opaque};
use super::{Failure, Outcome, Status, enter, leave};
use crate::grammar::ReplyFormat;
use crate::sampler::Constraint;
use crate::session::Plan;
use crate::{KvType, KvTypes, LoadOptions, Model, OnExceed, Repack, SessionOptions};

opaque! {
    /// A file, mapped.
    kinglet_model;
}

pub(super) struct ModelCell {
    pub(super) model: Model,
    pub(super) runtime: Arc<Runtime>,
    /// The last one, with its source: an app asks for the same again and again.
    constraint: Mutex<Option<(String, Arc<dyn Constraint>)>>,
}

impl ModelCell {
    /// What replies must be.
    pub(super) fn constraint(&self, format: &ReplyFormat) -> Outcome<Arc<dyn Constraint>> {
        // Two formats may have the same text, so the kind is part of it.
        let key = format!("{format:?}");
        let last = || {
            let last = self.constraint.lock();
            last.unwrap_or_else(PoisonError::into_inner)
        };
        if let Some((_, constraint)) = last().as_ref().filter(|(of, _)| *of == key) {
            return Ok(Arc::clone(constraint));
        }
        let constraint = self.model.constraint(format)?;
        *last() = Some((key, Arc::clone(&constraint)));
        Ok(constraint)
    }
}

impl Object for ModelCell {
    const NAME: &'static str = "model";
    type Opaque = kinglet_model;
}

/// Threads at most.
const MAX_THREADS: u32 = 256;

fn threads(n: u32) -> Outcome<usize> {
    match n {
        0..=MAX_THREADS => Ok(n as usize),
        _ => Err(Failure::argument(format!(
            "threads: expected at most {MAX_THREADS}, found {n}"
        ))),
    }
}

/// # Safety
/// `params` as in [`params::read`].
pub(super) unsafe fn load_options(params: *const kinglet_model_params) -> Outcome<LoadOptions> {
    // SAFETY: as the caller owes.
    let Some(params) = (unsafe { params::read(params) })? else {
        return Ok(LoadOptions::default());
    };
    reserved(params.reserved)?;
    reserved(params.reserved_2)?;
    Ok(LoadOptions {
        repack: repack(params.repack)?,
        threads: threads(params.threads)?,
        threads_batch: threads(params.threads_batch)?,
        memory: (params.memory > 0).then_some(params.memory),
        on_exceed: match flag("degrade", params.degrade)? {
            true => OnExceed::Degrade,
            false => OnExceed::Refuse,
        },
        cancel: cancel_of(params.cancel)?,
        ..LoadOptions::default()
    })
}

fn repack(when: u32) -> Outcome<Repack> {
    match when {
        0 => Ok(Repack::Auto),
        1 => Ok(Repack::On),
        2 => Ok(Repack::Off),
        _ => Err(Failure::argument(format!(
            "repack: expected a kinglet_repack, found {when}"
        ))),
    }
}

fn kv_type(kind: u32) -> Outcome<KvType> {
    match kind {
        0 => Ok(KvType::default()),
        1 => Ok(KvType::F32),
        2 => Ok(KvType::F16),
        3 => Ok(KvType::Q8_0),
        4 => Ok(KvType::Q4_0),
        _ => Err(Failure::argument(format!(
            "keys, values: expected a kinglet_kv_type, found {kind}"
        ))),
    }
}

fn kv_number(kind: KvType) -> u32 {
    match kind {
        KvType::F32 => 1,
        KvType::F16 => 2,
        KvType::Q8_0 => 3,
        KvType::Q4_0 => 4,
    }
}

/// # Safety
/// `params` as in [`params::read`].
pub(super) unsafe fn session_options(
    params: *const kinglet_session_params,
) -> Outcome<SessionOptions> {
    // SAFETY: as the caller owes.
    let Some(params) = (unsafe { params::read(params) })? else {
        return Ok(SessionOptions::default());
    };
    reserved(params.reserved)?;
    Ok(SessionOptions {
        // More than fits is more than any session may have.
        n_ctx: usize::try_from(params.n_ctx).unwrap_or(usize::MAX),
        kv: KvTypes {
            keys: kv_type(params.keys)?,
            values: kv_type(params.values)?,
        },
        batch: params.batch as usize,
        ..SessionOptions::default()
    })
}

/// A descriptor of our own of a file that the caller has open, and the range in it that is meant.
fn open_file(fd: c_int, offset: u64, len: u64) -> Outcome<(File, Range<u64>)> {
    #[cfg(not(unix))]
    {
        let _ = (fd, offset, len);
        let what = "fd: this system's descriptors are not those of C";
        Err(Failure::new(Status::Unsupported, what))
    }
    #[cfg(unix)]
    {
        use std::io;
        use std::os::fd::FromRawFd;
        if fd < 0 {
            return Err(Failure::argument(format!(
                "fd: expected a descriptor, found {fd}"
            )));
        }
        let failed = |e: io::Error| Failure::new(Status::Io, format!("fd {fd}: {e}"));
        // SAFETY: a call about a number: it makes another descriptor, or says that this is none.
        let own = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
        if own < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: it was just made, for us alone.
        let file = unsafe { File::from_raw_fd(own) };
        let end = match len {
            0 => file.metadata().map_err(failed)?.len(),
            len => offset.checked_add(len).ok_or_else(|| {
                Failure::argument(format!(
                    "offset, len: expected bytes of a file, found {offset}, {len}"
                ))
            })?,
        };
        Ok((file, offset..end))
    }
}

/// Puts a model that was loaded where the caller wants it.
fn give_model(model: Model, runtime: Arc<Runtime>, out: Place<*mut kinglet_model>) -> Outcome {
    let cell = Arc::new(ModelCell {
        model,
        runtime,
        constraint: Mutex::default(),
    });
    let model = handle::give(Arc::clone(&cell))?;
    cell.runtime.add(&cell);
    out.set(model);
    Ok(())
}

/// Loads the model at `path`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_load(
    out: *mut *mut kinglet_model,
    runtime: *mut kinglet_runtime,
    path: *const c_char,
    path_len: usize,
    params: *const kinglet_model_params,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let runtime = handle::get::<Runtime>(runtime)?;
        // SAFETY: a text of the caller.
        let path = unsafe { params::text("path", path, path_len) }?;
        // SAFETY: a struct of the caller.
        let options = unsafe { load_options(params) }?;
        give_model(Model::load(Path::new(path), &options)?, runtime, out)
    })
}

/// Loads the model in a range of an open file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_load_fd(
    out: *mut *mut kinglet_model,
    runtime: *mut kinglet_runtime,
    fd: c_int,
    offset: u64,
    len: u64,
    params: *const kinglet_model_params,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let runtime = handle::get::<Runtime>(runtime)?;
        // SAFETY: a struct of the caller.
        let options = unsafe { load_options(params) }?;
        let (file, bytes) = open_file(fd, offset, len)?;
        give_model(Model::load_file(file, bytes, &options)?, runtime, out)
    })
}

/// Forgets a model.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_model_release(model: *mut kinglet_model) {
    leave(|| drop(handle::take::<ModelCell>(model)));
}

/// What a model is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_describe(
    model: *mut kinglet_model,
    info: *mut kinglet_model_info,
) -> Status {
    enter(|| {
        let cell = handle::get::<ModelCell>(model)?;
        // SAFETY: a struct of the caller.
        let out = unsafe { Out::needed(info) }?;
        let model = &cell.model;
        let (info, config) = (model.info(), &model.info().config);
        let template = model.tokenizer().ok().and_then(|t| t.chat_template());
        out.set(kinglet_model_info {
            struct_size: 0,
            n_params: info.n_params,
            weight_bytes: info.weight_bytes,
            n_ctx_train: config.n_ctx_train as u64,
            n_vocab: config.n_vocab as u64,
            hidden: config.hidden as u64,
            n_layers: config.n_layers as u64,
            has_chat_template: u32::from(template.is_some()),
            threads: u32::try_from(model.n_threads()).unwrap_or(u32::MAX),
        });
        Ok(())
    })
}

/// The name of a model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_name(
    model: *mut kinglet_model,
    out: *mut *mut kinglet_buffer,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let cell = handle::get::<ModelCell>(model)?;
        out.set(give_buffer(cell.model.info().name.clone().into_bytes())?);
        Ok(())
    })
}

/// Gives memory of experts back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_trim(
    model: *mut kinglet_model,
    bytes: u64,
    freed: *mut u64,
) -> Status {
    enter(|| {
        let cell = handle::get::<ModelCell>(model)?;
        let n = cell.model.trim(bytes);
        if !freed.is_null() {
            // SAFETY: not null, so a place of the caller.
            unsafe { freed.write_unaligned(n) };
        }
        Ok(())
    })
}

/// Changes the budget.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_set_memory(
    model: *mut kinglet_model,
    memory: u64,
) -> Status {
    enter(|| Ok(handle::get::<ModelCell>(model)?.model.set_memory(memory)?))
}

/// What a session on the model that `outline` gives would take.
///
/// # Safety
/// `model` and `session` as in [`params::read`].
unsafe fn plan(
    outline: impl FnOnce(&LoadOptions) -> Outcome<Model>,
    model: *const kinglet_model_params,
    session: *const kinglet_session_params,
) -> Outcome<kinglet_plan> {
    // SAFETY: as the caller owes.
    let (load, options) = unsafe { (load_options(model)?, session_options(session)?) };
    load.cancel.check()?;
    let outline = outline(&load)?;
    let plan = match load.memory {
        Some(_) => Plan::within(&outline, &options, 1, &load)?,
        None => Plan::new(&outline, &options, 1)?,
    };
    let bytes = &plan.footprint;
    Ok(kinglet_plan {
        struct_size: 0,
        total: bytes.total(),
        weights: bytes.weights,
        own_weights: bytes.own_weights,
        experts: bytes.experts,
        kv: bytes.kv,
        conv: bytes.conv,
        scratch: bytes.scratch,
        tokenizer: bytes.tokenizer,
        runtime: bytes.runtime,
        program: bytes.program,
        n_ctx: plan.options.n_ctx as u64,
        batch: u32::try_from(plan.options.batch).unwrap_or(u32::MAX),
        keys: kv_number(plan.options.kv.keys),
        values: kv_number(plan.options.kv.values),
        n_concessions: u32::try_from(plan.concessions.len()).unwrap_or(u32::MAX),
    })
}

/// What a session would take.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_plan_make(
    out: *mut kinglet_plan,
    path: *const c_char,
    path_len: usize,
    model: *const kinglet_model_params,
    session: *const kinglet_session_params,
) -> Status {
    enter(|| {
        // SAFETY: a struct of the caller.
        let out = unsafe { Out::needed(out) }?;
        // SAFETY: a text of the caller.
        let path = unsafe { params::text("path", path, path_len) }?;
        let outline = |load: &_| Ok(Model::outline(Path::new(path), load)?);
        // SAFETY: structs of the caller.
        out.set(unsafe { plan(outline, model, session) }?);
        Ok(())
    })
}

/// The same of a model in a range of an open file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_plan_make_fd(
    out: *mut kinglet_plan,
    fd: c_int,
    offset: u64,
    len: u64,
    model: *const kinglet_model_params,
    session: *const kinglet_session_params,
) -> Status {
    enter(|| {
        // SAFETY: a struct of the caller.
        let out = unsafe { Out::needed(out) }?;
        let outline = |load: &_| {
            let (file, bytes) = open_file(fd, offset, len)?;
            Ok(Model::outline_file(file, bytes, load)?)
        };
        // SAFETY: structs of the caller.
        out.set(unsafe { plan(outline, model, session) }?);
        Ok(())
    })
}
