//! Conversations, and the replies that are made on the caller's thread.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::{c_char, c_int, c_void};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::handle::{self, Object};
use super::model::{ModelCell, kinglet_model, session_options};
use super::params::{
    self, Out, Place, flag, kinglet_chunk, kinglet_generate_params, kinglet_reply,
    kinglet_session_info, kinglet_session_params, reserved,
};
use super::runtime::Runtime;
use super::values::{cancel_of, give_buffer, kinglet_buffer, opaque};
use super::{Failure, Outcome, Status, enter, leave};
use crate::grammar::ReplyFormat;
use crate::sampler::{Sampler, Source};
use crate::session::{Chat, Event, Finish, GenerateOptions, Reply, generate};
use crate::tokenizer::{Message, Special};
use crate::{Cancel, Error, Session};

opaque! {
    /// One conversation.
    kinglet_session;
}

/// `kinglet_on_chunk`. A panic of a caller written in Rust may pass through it, and is caught.
pub type kinglet_on_chunk =
    Option<unsafe extern "C-unwind" fn(chunk: *const kinglet_chunk, user: *mut c_void) -> c_int>;

/// A session, and whether somebody works with it.
pub(super) struct SessionCell {
    slot: Mutex<Slot>,
    pub(super) model: Arc<ModelCell>,
}

enum Slot {
    Idle(Box<State>),
    Busy,
    Poisoned,
}

impl Object for SessionCell {
    const NAME: &'static str = "session";
    type Opaque = kinglet_session;
}

/// What a session is.
pub(super) struct State {
    line: Line,
    sampler: Sampler,
}

#[allow(clippy::large_enum_variant, reason = "it lies in a box in any case")]
enum Line {
    Chat(Chat),
    /// Of a model without a chat template.
    Plain(Session),
}

impl Line {
    fn session(&self) -> &Session {
        match self {
            Line::Chat(chat) => chat.session(),
            Line::Plain(session) => session,
        }
    }

    fn session_mut(&mut self) -> &mut Session {
        match self {
            Line::Chat(chat) => chat.session_mut(),
            Line::Plain(session) => session,
        }
    }

    fn chat(&mut self) -> Outcome<&mut Chat> {
        match self {
            Line::Chat(chat) => Ok(chat),
            Line::Plain(_) => Err(Error::Template("the model file has none".into()).into()),
        }
    }
}

/// A state that somebody works with. It comes back with [`Taken::work`]; if it is dropped before, unused.
pub(super) struct Taken {
    cell: Arc<SessionCell>,
    state: Option<Box<State>>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            *self.cell.slot() = Slot::Idle(state);
        }
    }
}

impl Taken {
    /// Works with the state and gives it back. A panic poisons the session.
    pub(super) fn work<T>(mut self, work: impl FnOnce(&mut State) -> Outcome<T>) -> Outcome<T> {
        let mut state = self.state.take().expect("it is given back below");
        let done = catch_unwind(AssertUnwindSafe(|| work(&mut state)));
        match done {
            Ok(done) => {
                *self.cell.slot() = Slot::Idle(state);
                done
            }
            Err(payload) => {
                *self.cell.slot() = Slot::Poisoned;
                leave(|| drop(state)); // in whatever order it is
                Err(Failure::panic(payload))
            }
        }
    }
}

impl SessionCell {
    fn new(model: Arc<ModelCell>, state: State) -> Arc<Self> {
        Arc::new(Self {
            slot: Mutex::new(Slot::Idle(Box::new(state))),
            model,
        })
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, which nobody else has until it comes back.
    pub(super) fn take(self: Arc<Self>) -> Outcome<Taken> {
        let mut slot = self.slot();
        match std::mem::replace(&mut *slot, Slot::Busy) {
            Slot::Idle(state) => {
                drop(slot);
                Ok(Taken {
                    cell: self,
                    state: Some(state),
                })
            }
            Slot::Busy => Err(Failure::new(
                Status::Busy,
                "session: expected it idle, found it at work",
            )),
            Slot::Poisoned => {
                *slot = Slot::Poisoned;
                let what = "session: a panic has ended it; it can only be released";
                Err(Failure::new(Status::Poisoned, what))
            }
        }
    }
}

fn with<T>(
    session: *mut kinglet_session,
    work: impl FnOnce(&mut State) -> Outcome<T>,
) -> Outcome<T> {
    handle::get::<SessionCell>(session)?.take()?.work(work)
}

/// What a reply is asked to be.
pub(super) struct Order {
    options: GenerateOptions,
    pub(super) cancel: Cancel,
}

impl Order {
    /// # Safety
    /// `params` as in [`params::read`], its stops as in [`params::stops`], its texts as in [`params::text`].
    pub(super) unsafe fn of(
        params: *const kinglet_generate_params,
        model: &ModelCell,
    ) -> Outcome<Self> {
        // SAFETY: as the caller owes.
        let Some(params) = (unsafe { params::read(params) })? else {
            return Ok(Self {
                options: GenerateOptions::default(),
                cancel: Cancel::default(),
            });
        };
        reserved(params.reserved)?;
        // SAFETY: as the caller owes.
        let (schema, grammar) = unsafe {
            (
                params::text("json_schema", params.json_schema, params.json_schema_len)?,
                params::text("grammar", params.grammar, params.grammar_len)?,
            )
        };
        let format = match (schema, grammar) {
            ("", "") => None,
            (schema, "") => Some(ReplyFormat::JsonSchema(schema)),
            ("", grammar) => Some(ReplyFormat::Lark(grammar)),
            _ => {
                return Err(Failure::argument(
                    "json_schema, grammar: expected one of them, found both",
                ));
            }
        };
        Ok(Self {
            options: GenerateOptions {
                max_tokens: match params.max_tokens {
                    0 => None,
                    n => Some(usize::try_from(n).unwrap_or(usize::MAX)),
                },
                // SAFETY: as the caller owes.
                stop: unsafe { params::stops(params.stops, params.n_stops) }?,
                ignore_end: flag("ignore_end", params.ignore_end)?,
                continued: false,
                tools: false,
                constraint: format.map(|format| model.constraint(&format)).transpose()?,
            },
            cancel: cancel_of(params.cancel)?,
        })
    }
}

/// Who is told about a reply.
#[derive(Clone, Copy)]
pub(super) struct Listener {
    pub(super) on_chunk: kinglet_on_chunk,
    pub(super) user: *mut c_void,
}

impl Listener {
    /// Tells a chunk; whether the reply shall go on.
    pub(super) fn tell(&self, chunk: &kinglet_chunk) -> ControlFlow<()> {
        let Some(on_chunk) = self.on_chunk else {
            return ControlFlow::Continue(());
        };
        // SAFETY: a function of the caller, with what it asked to be given, and a chunk that lives until it returns.
        match unsafe { on_chunk(chunk, self.user) } {
            0 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    }
}

/// What replies are made to.
pub(super) enum Prompt<'a> {
    /// A message of the user.
    Send(&'a str),
    /// The last one, again.
    Regenerate,
    /// Messages, such as the answers of tools.
    Answer(Vec<Message>),
    /// A text that goes on.
    Complete(&'a str),
}

/// `kinglet_chunk_kind`.
const PREFILL: u32 = 1;
const TEXT: u32 = 2;
pub(super) const END: u32 = 3;
const CALL: u32 = 4;

impl State {
    pub(super) fn session_mut(&mut self) -> &mut Session {
        self.line.session_mut()
    }

    /// Makes a reply.
    pub(super) fn reply(
        &mut self,
        prompt: &Prompt,
        order: &Order,
        listener: Listener,
        runtime: &Runtime,
    ) -> Outcome<Reply> {
        self.line.session_mut().set_cancel(&order.cancel);
        let reply = self.answer(prompt, order, listener, runtime);
        // What comes next is wanted.
        self.line.session_mut().set_cancel(&Cancel::default());
        reply
    }

    fn answer(
        &mut self,
        prompt: &Prompt,
        order: &Order,
        listener: Listener,
        runtime: &Runtime,
    ) -> Outcome<Reply> {
        let Self { line, sampler } = self;
        let mut began = Instant::now();
        let mut on = |event: Event| {
            let json;
            let mut chunk = kinglet_chunk {
                kind: TEXT,
                status: 0,
                text: c"".as_ptr(),
                text_len: 0,
                done: 0,
                total: 0,
            };
            match event {
                Event::Prefill { done, total } => {
                    (chunk.kind, chunk.done, chunk.total) = (PREFILL, done as u64, total as u64);
                }
                Event::Text(text) => {
                    (chunk.text, chunk.text_len) = (text.as_ptr().cast(), text.len());
                }
                Event::Call(call) => {
                    json = serde_json::to_string(call).expect("strings and values become JSON");
                    chunk.kind = CALL;
                    (chunk.text, chunk.text_len) = (json.as_ptr().cast(), json.len());
                }
            }
            runtime.rest(began, &order.cancel);
            let flow = listener.tell(&chunk);
            began = Instant::now();
            match order.cancel.is_cancelled() {
                true => ControlFlow::Break(()),
                false => flow,
            }
        };
        match prompt {
            Prompt::Send(text) => Ok(line.chat()?.send(text, sampler, &order.options, &mut on)?),
            Prompt::Answer(messages) => {
                let (messages, chat) = (messages.clone(), line.chat()?);
                Ok(chat.answer(messages, sampler, &order.options, &mut on)?)
            }
            Prompt::Regenerate => {
                let reply = line.chat()?.regenerate(sampler, &order.options, &mut on)?;
                reply.ok_or_else(|| {
                    Failure::argument("messages: expected one of the user, found none")
                })
            }
            Prompt::Complete(text) => {
                let session = line.session_mut();
                let model = session.model().clone();
                let tokenizer = model.tokenizer()?;
                let mut tokens = tokenizer.encode_with_bos(text, Special::Text);
                if tokenizer.add_eos() && tokens.last() == tokenizer.eos().as_ref() {
                    tokens.pop(); // what is to be continued has not ended
                }
                if tokens.is_empty() {
                    // Something must come before the first token of a text.
                    tokens.extend(tokenizer.bos().or(tokenizer.eos()));
                }
                let options = GenerateOptions {
                    continued: true,
                    ..order.options.clone()
                };
                Ok(generate(session, &tokens, sampler, &options, &mut on)?)
            }
        }
    }
}

/// A reply as C sees it.
pub(super) fn reply_of(reply: &Reply) -> kinglet_reply {
    let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let stats = &reply.stats;
    kinglet_reply {
        struct_size: 0,
        finish: match reply.finish {
            Finish::Stop => 1,
            Finish::Length => 2,
            Finish::Cancelled => 3,
            Finish::ContextFull => 4,
        },
        reserved: 0,
        prompt_tokens: stats.prompt_tokens as u64,
        reused_tokens: stats.reused_tokens as u64,
        reply_tokens: reply.tokens.len() as u64,
        prefill_ns: ns(stats.prefill),
        first_token_ns: ns(stats.first_token),
        decode_ns: ns(stats.decode),
    }
}

/// A reply on the caller's thread.
///
/// # Safety
/// `params` as in [`Order::of`], `reply` as in [`Out::of`], the listener is the caller's.
unsafe fn reply_here(
    session: *mut kinglet_session,
    prompt: impl FnOnce() -> Outcome<Prompt<'static>>,
    params: *const kinglet_generate_params,
    reply: *mut kinglet_reply,
    listener: Listener,
) -> Status {
    enter(|| {
        let cell = handle::get::<SessionCell>(session)?;
        let prompt = prompt()?;
        // SAFETY: as the caller owes.
        let order = unsafe { Order::of(params, &cell.model) }?;
        // SAFETY: as the caller owes.
        let out = unsafe { Out::of(reply) }?;
        let model = Arc::clone(&cell.model);
        let taken = cell.take()?;
        let reply = taken.work(|state| state.reply(&prompt, &order, listener, &model.runtime))?;
        if let Some(out) = out {
            out.set(reply_of(&reply));
        }
        Ok(())
    })
}

/// An empty conversation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_create(
    out: *mut *mut kinglet_session,
    model: *mut kinglet_model,
    params: *const kinglet_session_params,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let cell = handle::get::<ModelCell>(model)?;
        // SAFETY: a struct of the caller.
        let options = unsafe { session_options(params) }?;
        let session = Session::new(&cell.model, &options)?;
        let template = cell.model.tokenizer().ok().and_then(|t| t.chat_template());
        let line = match template {
            Some(_) => Line::Chat(Chat::new(session)?),
            None => Line::Plain(session),
        };
        let sampler = Sampler::new(&cell.model.recommended());
        out.set(handle::give(SessionCell::new(
            cell,
            State { line, sampler },
        ))?);
        Ok(())
    })
}

/// Forgets a session.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_session_release(session: *mut kinglet_session) {
    leave(|| drop(handle::take::<SessionCell>(session)));
}

/// What a session holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_describe(
    session: *mut kinglet_session,
    info: *mut kinglet_session_info,
) -> Status {
    enter(|| {
        let cell = handle::get::<SessionCell>(session)?;
        // SAFETY: a struct of the caller.
        let out = unsafe { Out::needed(info) }?;
        let info = cell.take()?.work(|state| {
            let n_messages = state.line.chat().map_or(0, |chat| chat.messages().len());
            let session = state.line.session();
            let memory = session.memory();
            Ok(kinglet_session_info {
                struct_size: 0,
                n_ctx: session.n_ctx() as u64,
                n_tokens: session.tokens().len() as u64,
                n_messages: n_messages as u64,
                kv: memory.kv as u64,
                conv: memory.conv as u64,
                scratch: memory.scratch as u64,
            })
        })?;
        out.set(info);
        Ok(())
    })
}

/// Sets a value of the sampler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_set(
    session: *mut kinglet_session,
    name: *const c_char,
    name_len: usize,
    value: *const c_char,
    value_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: texts of the caller.
        let (name, value) = unsafe {
            (
                params::text("name", name, name_len),
                params::text("value", value, value_len),
            )
        };
        with(session, |state| {
            let mut settings = state.sampler.settings().clone();
            settings.set(name?, value?, Source::Flag)?;
            state.sampler.set_settings(&settings);
            Ok(())
        })
    })
}

/// Sets the system message.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_set_system(
    session: *mut kinglet_session,
    text: *const c_char,
    text_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: a text of the caller.
        let text = unsafe { params::text("text", text, text_len) };
        with(session, |state| {
            let text = text?;
            state
                .line
                .chat()?
                .set_system((!text.is_empty()).then_some(text));
            Ok(())
        })
    })
}

/// The conversation as JSON.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_messages(
    session: *mut kinglet_session,
    out: *mut *mut kinglet_buffer,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let json = with(session, |state| {
            let messages = state.line.chat()?.messages();
            Ok(serde_json::to_vec(messages).expect("strings become JSON"))
        })?;
        out.set(give_buffer(json)?);
        Ok(())
    })
}

fn messages(json: &str) -> Outcome<Vec<Message>> {
    serde_json::from_str(json)
        .map_err(|e| Failure::argument(format!("json: expected a list of messages, found {e}")))
}

/// Says which tools there are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_set_tools(
    session: *mut kinglet_session,
    json: *const c_char,
    json_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: a text of the caller.
        let json = unsafe { params::text("json", json, json_len) };
        with(session, |state| {
            let json = json?;
            let tools = match json {
                "" => None,
                json => Some(serde_json::from_str(json).map_err(|e| {
                    Failure::argument(format!("json: expected a list of tools, found {e}"))
                })?),
            };
            Ok(state.line.chat()?.set_tools(tools)?)
        })
    })
}

/// Replaces the conversation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_set_messages(
    session: *mut kinglet_session,
    json: *const c_char,
    json_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: a text of the caller.
        let json = unsafe { params::text("json", json, json_len) };
        with(session, |state| {
            let messages = messages(json?)?;
            state.line.chat()?.set_messages(messages);
            Ok(())
        })
    })
}

/// Keeps the first messages.
#[unsafe(no_mangle)]
pub extern "C" fn kinglet_session_rewind(session: *mut kinglet_session, n_messages: u64) -> Status {
    enter(|| {
        with(session, |state| {
            let chat = state.line.chat()?;
            let found = chat.messages().len();
            let kept = usize::try_from(n_messages).ok();
            let kept = kept.and_then(|n| chat.messages().get(..n));
            let kept = kept.ok_or_else(|| {
                Failure::argument(format!(
                    "n_messages: expected at most {found}, found {n_messages}"
                ))
            })?;
            chat.set_messages(kept.to_vec());
            Ok(())
        })
    })
}

/// Replies to a message.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_send(
    session: *mut kinglet_session,
    text: *const c_char,
    text_len: usize,
    params: *const kinglet_generate_params,
    reply: *mut kinglet_reply,
    on_chunk: kinglet_on_chunk,
    user: *mut c_void,
) -> Status {
    let prompt = || {
        // SAFETY: a text of the caller, which outlives this call and is not kept.
        let text = unsafe { params::text("text", text, text_len) };
        text.map(Prompt::Send)
    };
    // SAFETY: structs of the caller.
    unsafe { reply_here(session, prompt, params, reply, Listener { on_chunk, user }) }
}

/// Replies to messages.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_answer(
    session: *mut kinglet_session,
    json: *const c_char,
    json_len: usize,
    params: *const kinglet_generate_params,
    reply: *mut kinglet_reply,
    on_chunk: kinglet_on_chunk,
    user: *mut c_void,
) -> Status {
    let prompt = || {
        // SAFETY: a text of the caller.
        let json = unsafe { params::text("json", json, json_len) };
        let messages = messages(json?)?;
        match messages.is_empty() {
            true => Err(Failure::argument("json: expected messages, found none")),
            false => Ok(Prompt::Answer(messages)),
        }
    };
    // SAFETY: structs of the caller.
    unsafe { reply_here(session, prompt, params, reply, Listener { on_chunk, user }) }
}

/// Replaces the last reply.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_regenerate(
    session: *mut kinglet_session,
    params: *const kinglet_generate_params,
    reply: *mut kinglet_reply,
    on_chunk: kinglet_on_chunk,
    user: *mut c_void,
) -> Status {
    let prompt = || Ok(Prompt::Regenerate);
    // SAFETY: structs of the caller.
    unsafe { reply_here(session, prompt, params, reply, Listener { on_chunk, user }) }
}

/// Continues a text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_complete(
    session: *mut kinglet_session,
    text: *const c_char,
    text_len: usize,
    params: *const kinglet_generate_params,
    reply: *mut kinglet_reply,
    on_chunk: kinglet_on_chunk,
    user: *mut c_void,
) -> Status {
    let prompt = || {
        // SAFETY: a text of the caller, which outlives this call and is not kept.
        let text = unsafe { params::text("text", text, text_len) };
        text.map(Prompt::Complete)
    };
    // SAFETY: structs of the caller.
    unsafe { reply_here(session, prompt, params, reply, Listener { on_chunk, user }) }
}

/// Another session that holds the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_fork(
    out: *mut *mut kinglet_session,
    session: *mut kinglet_session,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let cell = handle::get::<SessionCell>(session)?;
        let model = Arc::clone(&cell.model);
        let state = cell.take()?.work(|state| {
            let line = match &state.line {
                Line::Chat(chat) => Line::Chat(chat.fork()?),
                Line::Plain(session) => Line::Plain(session.fork()?),
            };
            let sampler = state.sampler.clone();
            Ok(State { line, sampler })
        })?;
        out.set(handle::give(SessionCell::new(model, state))?);
        Ok(())
    })
}

/// Writes a session to a file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_save(
    session: *mut kinglet_session,
    path: *const c_char,
    path_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: a text of the caller.
        let path = unsafe { params::text("path", path, path_len) };
        with(session, |state| {
            let State { line, sampler } = state;
            Ok(line.chat()?.save_state(Path::new(path?), sampler)?)
        })
    })
}

/// Goes on from a file.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_load(
    session: *mut kinglet_session,
    path: *const c_char,
    path_len: usize,
) -> Status {
    enter(|| {
        // SAFETY: a text of the caller.
        let path = unsafe { params::text("path", path, path_len) };
        with(session, |state| {
            let resumed = state.line.chat()?.load(Path::new(path?))?;
            if let Some(generator) = resumed.generator {
                state.sampler.set_generator(generator);
            }
            Ok(())
        })
    })
}
