//! What the models of a process share: the thread of requests, and what the system told the app.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use super::handle::{self, Object};
use super::model::ModelCell;
use super::params::Place;
use super::values::opaque;
use super::{Failure, Outcome, Status, enter, leave};
use crate::Cancel;
use crate::gguf::Advice;

opaque! {
    /// What the models of a process share.
    kinglet_runtime;
}

pub(super) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub(super) struct Runtime {
    models: Mutex<Vec<Weak<ModelCell>>>,
    /// Started with the first request.
    worker: Mutex<Option<Worker>>,
    /// How many times as long as it worked a reply rests.
    rest: AtomicU32,
}

struct Worker {
    jobs: Sender<Job>,
    thread: JoinHandle<()>,
}

impl Object for Runtime {
    const NAME: &'static str = "runtime";
    type Opaque = kinglet_runtime;
}

impl Runtime {
    pub(super) fn add(&self, model: &Arc<ModelCell>) {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.retain(|model| model.strong_count() > 0);
        models.push(Arc::downgrade(model));
    }

    /// Those that are still in use.
    fn models(&self) -> Vec<Arc<ModelCell>> {
        let models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        models.iter().filter_map(Weak::upgrade).collect()
    }

    /// Runs `job` after those that were given before.
    pub(super) fn run(&self, job: Job) -> Outcome {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.is_none() {
            let (jobs, queue) = channel::<Job>();
            let work = move || queue.into_iter().for_each(leave);
            let thread = thread::Builder::new().name("kinglet-request".into());
            let thread = thread.spawn(work).map_err(|e| {
                Failure::new(Status::Memory, format!("the thread of requests: {e}"))
            })?;
            *worker = Some(Worker { jobs, thread });
        }
        let worker = worker.as_ref().expect("it was just made");
        worker
            .jobs
            .send(job)
            .expect("it takes jobs until the sender is dropped, whatever they do");
        Ok(())
    }

    /// The thread of requests, once there is one.
    pub(super) fn thread(&self) -> Option<ThreadId> {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.as_ref().map(|worker| worker.thread.thread().id())
    }

    /// Rests after work that began at `since`, unless it is cancelled.
    pub(super) fn rest(&self, since: Instant, cancel: &Cancel) {
        let times = self.rest.load(Ordering::Relaxed);
        let mut left = (since.elapsed() * times).min(MAX_REST);
        while !left.is_zero() && !cancel.is_cancelled() {
            let nap = left.min(NAP);
            thread::sleep(nap);
            left -= nap;
        }
    }
}

/// The longest rest after a step: a prompt that takes long is read in long steps.
const MAX_REST: Duration = Duration::from_secs(2);

/// How often a reply that rests looks whether it is cancelled.
const NAP: Duration = Duration::from_millis(5);

impl Drop for Runtime {
    fn drop(&mut self) {
        let worker = self
            .worker
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(Worker { jobs, thread }) = worker.take() {
            drop(jobs);
            // The last to hold a runtime may be its own thread, which ends after this job.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join(); // its jobs catch panics
            }
        }
    }
}

/// A runtime.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_runtime_create(out: *mut *mut kinglet_runtime) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        out.set(handle::give(Arc::new(Runtime::default()))?);
        Ok(())
    })
}

/// Forgets a runtime.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_runtime_release(runtime: *mut kinglet_runtime) {
    leave(|| drop(handle::take::<Runtime>(runtime)));
}

/// Tells what the system told the app.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_runtime_notify(runtime: *mut kinglet_runtime, event: u32) -> Status {
    enter(|| {
        let runtime = handle::get::<Runtime>(runtime)?;
        let each = |tell: &dyn Fn(&crate::Model) -> crate::Result<()>| -> Outcome {
            for cell in runtime.models() {
                tell(&cell.model)?;
            }
            Ok(())
        };
        let rest = |times| {
            runtime.rest.store(times, Ordering::Relaxed);
            Ok(())
        };
        match event {
            1 => each(&|model| {
                model.trim(u64::MAX);
                Ok(())
            }),
            2 => each(&|model| {
                model.trim(u64::MAX);
                model.gguf().advise_all(Advice::DontNeed)
            }),
            3 => each(&|model| model.gguf().advise_all(Advice::WillNeed)),
            4 => rest(0),
            5 => rest(1),
            6 => rest(3),
            _ => Err(Failure::argument(format!(
                "event: expected 1 to 6, found {event}"
            ))),
        }
    })
}
