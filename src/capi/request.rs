//! Replies that are made on the thread of a runtime.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::handle::{self, Object};
use super::params::{self, Out, Place, kinglet_chunk, kinglet_generate_params, kinglet_reply};
use super::runtime::Runtime;
use super::session::{
    END, Listener, Order, Prompt, SessionCell, kinglet_on_chunk, kinglet_session, reply_of,
};
use super::values::opaque;
use super::{Failure, Outcome, Status, enter, leave};
use crate::Cancel;

opaque! {
    /// A reply that is made in the background.
    kinglet_request;
}

struct Request {
    /// A child of the caller's: either ends it.
    cancel: Cancel,
    end: Mutex<Option<Outcome<kinglet_reply>>>,
    ended: Condvar,
    runtime: Arc<Runtime>,
}

impl Object for Request {
    const NAME: &'static str = "request";
    type Opaque = kinglet_request;
}

impl Request {
    fn end(&self) -> MutexGuard<'_, Option<Outcome<kinglet_reply>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this thread is the one that runs it.
    fn is_own_thread(&self) -> bool {
        self.runtime.thread() == Some(thread::current().id())
    }

    /// What came of it, unless it takes longer than `timeout`.
    fn wait(&self, timeout: Duration) -> Option<Outcome<kinglet_reply>> {
        let running = |end: &mut Option<_>| end.is_none();
        let waited = self.ended.wait_timeout_while(self.end(), timeout, running);
        let (end, _) = waited.unwrap_or_else(PoisonError::into_inner);
        end.clone()
    }
}

/// A listener on another thread.
struct Sent(Listener);

// SAFETY: kinglet.h says on which thread a request calls back, and that what the caller gives must be fit for it.
unsafe impl Send for Sent {}

/// Starts a reply.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_request_start(
    out: *mut *mut kinglet_request,
    session: *mut kinglet_session,
    text: *const c_char,
    text_len: usize,
    params: *const kinglet_generate_params,
    on_chunk: kinglet_on_chunk,
    user: *mut c_void,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let cell = handle::get::<SessionCell>(session)?;
        // SAFETY: a text of the caller.
        let text = unsafe { params::text("text", text, text_len) }?.to_owned();
        // SAFETY: a struct of the caller.
        let mut order = unsafe { Order::of(params, &cell.model) }?;
        order.cancel = order.cancel.child();
        let runtime = Arc::clone(&cell.model.runtime);
        let taken = cell.take()?;
        let request = Arc::new(Request {
            cancel: order.cancel.clone(),
            end: Mutex::new(None),
            ended: Condvar::new(),
            runtime: Arc::clone(&runtime),
        });
        let handle = handle::give(Arc::clone(&request))?;
        let listener = Sent(Listener { on_chunk, user });
        let job = move || {
            let Sent(listener) = { listener };
            let runtime = &request.runtime;
            let done = taken.work(|state| {
                let reply = state.reply(&Prompt::Send(&text), &order, listener, runtime)?;
                Ok(reply_of(&reply))
            });
            let status = match &done {
                Ok(_) => Status::Ok,
                Err(failure) => failure.status,
            };
            leave(|| {
                let _ = listener.tell(&kinglet_chunk {
                    kind: END,
                    status: status as i32,
                    text: c"".as_ptr(),
                    text_len: 0,
                    done: 0,
                    total: 0,
                }); // there is nothing left to break
            });
            *request.end() = Some(done);
            request.ended.notify_all();
        };
        runtime.run(Box::new(job)).inspect_err(|_| {
            handle::take::<Request>(handle);
        })?;
        out.set(handle);
        Ok(())
    })
}

/// Waits for the end of a request.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_request_wait(
    request: *mut kinglet_request,
    timeout_ms: u32,
    reply: *mut kinglet_reply,
) -> Status {
    enter(|| {
        let request = handle::get::<Request>(request)?;
        // SAFETY: a struct of the caller.
        let out = unsafe { Out::of(reply) }?;
        if request.is_own_thread() {
            let what = "request: expected another thread than the one that it runs on";
            return Err(Failure::new(Status::Busy, what));
        }
        let end = request.wait(Duration::from_millis(timeout_ms.into()));
        let end = end.ok_or_else(|| {
            Failure::new(
                Status::Timeout,
                format!("request: not done after {timeout_ms} ms"),
            )
        })?;
        let reply = end?;
        if let Some(out) = out {
            out.set(reply);
        }
        Ok(())
    })
}

/// Ends a request.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_request_cancel(request: *mut kinglet_request) -> Status {
    enter(|| {
        handle::get::<Request>(request)?.cancel.cancel();
        Ok(())
    })
}

/// Ends a request and forgets it.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_request_release(request: *mut kinglet_request) {
    leave(|| {
        let Some(request) = handle::take::<Request>(request) else {
            return;
        };
        request.cancel.cancel();
        while !request.is_own_thread() && request.wait(Duration::from_secs(60)).is_none() {}
    });
}
