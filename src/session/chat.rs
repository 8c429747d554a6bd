//! A conversation on a session: messages, rendered by the model's template, and the replies to them.
//!
//! The messages are the truth; before each reply the session is made to hold their tokens, and keeps what it can.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::generate::{Event, Finish, GenerateOptions, Reply, generate};
use super::replace::{Os, replace};
use super::{Extra, Model, Session, StateFile};
use crate::error::{Error, Result};
use crate::sampler::Sampler;
use crate::tokenizer::{ChatTemplate, Message, RenderOptions};

/// The largest file that [`Chat::load`] reads.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// The roles of a conversation of two.
const SYSTEM: &str = "system";
const USER: &str = "user";
const ASSISTANT: &str = "assistant";

/// A conversation as a file holds it.
#[derive(Serialize, Deserialize)]
struct Saved {
    /// The model's name; not checked, a conversation can go on with another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    messages: Vec<Message>,
}

/// What came with the messages that [`Chat::load`] found.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Resumed {
    /// The name of the model that the conversation was held with, if the file has it.
    pub model: Option<String>,
    /// Tokens that need not be read again.
    pub n_tokens: usize,
    /// Why the tokens of a state file are of no use here, if they are not.
    pub reread: Option<String>,
    /// The generator of the sampler, if the file has one.
    pub generator: Option<[u64; 2]>,
}

/// A conversation.
pub struct Chat {
    session: Session,
    template: ChatTemplate,
    messages: Vec<Message>,
    /// What the template is told of tools: a list.
    tools: Option<Value>,
}

impl Chat {
    /// A conversation without messages, by the template in the model's file.
    ///
    /// # Errors
    /// [`Error::Template`] if the model has none, or one that cannot be read.
    pub fn new(session: Session) -> Result<Self> {
        let template = ChatTemplate::from_tokenizer(session.model().tokenizer()?)?;
        let template = template.ok_or_else(|| Error::Template("the model file has none".into()))?;
        Ok(Self {
            session,
            template,
            messages: Vec::new(),
            tools: None,
        })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The session. Whatever is done to it, the next reply is one to the messages.
    pub fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The same conversation once more; keys and values are shared until either goes on.
    ///
    /// # Errors
    /// As [`Session::fork`].
    pub fn fork(&self) -> Result<Self> {
        let template = ChatTemplate::from_tokenizer(self.model().tokenizer()?)?;
        Ok(Self {
            session: self.session.fork()?,
            template: template.expect("this conversation has it from the same file"),
            messages: self.messages.clone(),
            tools: self.tools.clone(),
        })
    }

    /// The session alone.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.session.model()
    }

    /// What has been said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Replaces what has been said: a message edited, thoughts taken out. The next reply reads what is different, from
    /// the first token that is.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
    }

    /// The text of the system message.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|m| m.role == SYSTEM);
        first.map(|m| &*m.content)
    }

    /// Sets the system message, or takes it away.
    pub fn set_system(&mut self, text: Option<&str>) {
        self.messages.retain(|m| m.role != SYSTEM);
        if let Some(text) = text {
            self.messages.insert(0, Message::new(SYSTEM, text));
        }
    }

    /// The tools that the model may call, a list of descriptions as templates expect them: `{"type": "function",
    /// "function": {"name", "description", "parameters"}}`. Calls are then told apart from the text of replies.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is no list.
    pub fn set_tools(&mut self, tools: Option<Value>) -> Result<()> {
        if tools.as_ref().is_some_and(|tools| !tools.is_array()) {
            return Err(Error::Invalid(
                "tools: expected a list of descriptions, found another value".into(),
            ));
        }
        self.tools = tools.filter(|tools| tools.as_array().is_some_and(|all| !all.is_empty()));
        Ok(())
    }

    /// Those tools.
    pub fn tools(&self) -> Option<&Value> {
        self.tools.as_ref()
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        self.messages.retain(|m| m.role == SYSTEM);
    }

    /// Takes the last exchange back: the last message of the user and what follows. Returns its text.
    pub fn undo(&mut self) -> Option<String> {
        let at = self.messages.iter().rposition(|m| m.role == USER)?;
        let said = self.messages.drain(at..).next();
        said.map(|m| m.content)
    }

    /// Replies to `text`. A reply that is cut short, by `on` or by a full context, becomes part of the conversation as
    /// far as it came; if nothing came, `text` is taken back.
    ///
    /// # Errors
    /// As [`generate`], and [`Error::Template`]; the conversation stays as it was.
    pub fn send(
        &mut self,
        text: &str,
        sampler: &mut Sampler,
        options: &GenerateOptions,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        self.answer(vec![Message::new(USER, text)], sampler, options, on)
    }

    /// Replies to any messages, such as what tools have answered: as [`Chat::send`].
    ///
    /// # Errors
    /// As [`Chat::send`].
    pub fn answer(
        &mut self,
        messages: Vec<Message>,
        sampler: &mut Sampler,
        options: &GenerateOptions,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let said = self.messages.len();
        self.messages.extend(messages);
        let reply = self.reply(sampler, options, on);
        if !matches!(&reply, Ok(reply) if is_said(reply)) {
            self.messages.truncate(said);
        }
        reply
    }

    /// Replaces the last reply by another one. `None` if there is nothing to reply to. If nothing comes, the old reply
    /// stays.
    ///
    /// # Errors
    /// As [`Chat::send`].
    pub fn regenerate(
        &mut self,
        sampler: &mut Sampler,
        options: &GenerateOptions,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<Reply>> {
        let Some(at) = self.messages.iter().rposition(|m| m.role == USER) else {
            return Ok(None);
        };
        let old = self.messages.split_off(at + 1);
        let reply = self.reply(sampler, options, on);
        if !matches!(&reply, Ok(reply) if is_said(reply)) {
            self.messages.extend(old);
        }
        reply.map(Some)
    }

    fn reply(
        &mut self,
        sampler: &mut Sampler,
        options: &GenerateOptions,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply> {
        let prompt = self.prompt()?;
        let with_tools;
        let options = match &self.tools {
            Some(_) => {
                with_tools = GenerateOptions {
                    tools: true,
                    ..options.clone()
                };
                &with_tools
            }
            None => options,
        };
        let reply = generate(&mut self.session, &prompt, sampler, options, on)?;
        if is_said(&reply) {
            let message = self.message_of(&reply);
            self.messages.push(message);
        }
        Ok(reply)
    }

    /// A reply as a message. A template that knows no calls is given them in the text, as the model wrote them.
    fn message_of(&self, reply: &Reply) -> Message {
        let Some(written) = &reply.written else {
            return Message::new(ASSISTANT, &*reply.text);
        };
        let source = self
            .model()
            .tokenizer()
            .ok()
            .and_then(|t| t.chat_template());
        if !source.is_some_and(|source| source.contains("tool_calls")) {
            return Message::new(ASSISTANT, &**written);
        }
        let before: usize = self.messages.iter().map(n_calls).sum();
        let calls = reply.calls.iter().zip(before..).map(
            |(call, i)| json!({"id": format!("call_{i}"), "type": "function", "function": call}),
        );
        Message {
            tool_calls: Some(calls.collect()),
            ..Message::new(ASSISTANT, reply.text.trim())
        }
    }

    /// The tokens of the conversation, up to where the model is to speak.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the messages.
    pub fn prompt(&self) -> Result<Vec<u32>> {
        let options = RenderOptions {
            add_generation_prompt: true,
            tools: self.tools.as_ref(),
            ..RenderOptions::default()
        };
        let tokenizer = self.model().tokenizer()?;
        self.template.tokens(tokenizer, &self.messages, &options)
    }

    /// Writes the conversation to `path` as JSON. A file of that name is replaced when the new one is complete.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let json = self.json();
        replace(&Os, path, &mut |out| out.write_all(&json))
    }

    /// Writes the conversation to `path` as a [`StateFile`], with what the session holds and the generator of
    /// `sampler`: to go on from it nothing has to be read again.
    ///
    /// # Errors
    /// As [`Session::save`].
    pub fn save_state(&self, path: &Path, sampler: &Sampler) -> Result<()> {
        let extra = Extra {
            generator: Some(sampler.generator()),
            note: self.json(),
        };
        self.session.save(path, &extra)
    }

    fn json(&self) -> Vec<u8> {
        let saved = Saved {
            model: Some(self.model().info().name.clone()),
            messages: self.messages.clone(),
        };
        let mut json = serde_json::to_vec_pretty(&saved).expect("strings become JSON");
        json.push(b'\n');
        json
    }

    /// Replaces the conversation by the one in the file at `path`: one of [`Chat::save_state`], one of [`Chat::save`],
    /// or a JSON array of messages. The state of another model or cache type is of no use; the messages are.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`] if it holds no conversation or is damaged, [`Error::ContextFull`] if its state
    /// does not fit; the conversation there is stays.
    pub fn load(&mut self, path: &Path) -> Result<Resumed> {
        let bad = |what: String| Error::BadFile {
            path: path.into(),
            what,
        };
        let parse = |json: &[u8]| {
            let begins = json.iter().find(|b| !b.is_ascii_whitespace());
            let saved = if begins == Some(&b'[') {
                serde_json::from_slice(json).map(|messages| Saved {
                    model: None,
                    messages,
                })
            } else {
                serde_json::from_slice(json)
            };
            saved.map_err(|e| bad(format!("expected a conversation, found {e}")))
        };
        if !StateFile::recognizes(path)? {
            let bytes = fs::metadata(path).map_err(|e| Error::io(path, e))?;
            if !bytes.is_file() || bytes.len() > MAX_FILE_BYTES {
                return Err(bad("expected a file of a conversation, up to 64 MiB".into()));
            }
            let saved = parse(&fs::read(path).map_err(|e| Error::io(path, e))?)?;
            self.messages = saved.messages;
            return Ok(Resumed {
                model: saved.model,
                ..Resumed::default()
            });
        }
        let file = StateFile::open(path)?;
        let (session, extra, reread) = match file.fits(self.model(), &self.session.options()) {
            Ok(()) => {
                let (session, extra) = file.load(self.model(), &self.session.options())?;
                (Some(session), extra, None)
            }
            Err(Error::Mismatch { what, .. }) => (None, file.extra()?, Some(what)),
            Err(error) => return Err(error),
        };
        let saved = parse(&extra.note)?;
        self.messages = saved.messages;
        let n_tokens = session.as_ref().map_or(0, |session| session.tokens().len());
        if let Some(session) = session {
            self.session = session;
        }
        Ok(Resumed {
            model: saved.model,
            n_tokens,
            reread,
            generator: extra.generator,
        })
    }
}

/// Whether a reply is worth a turn: it is complete, if empty, or has some text.
fn is_said(reply: &Reply) -> bool {
    reply.finish == Finish::Stop || !reply.text.is_empty() || !reply.calls.is_empty()
}

/// Calls that a message has.
fn n_calls(message: &Message) -> usize {
    let calls = message.tool_calls.as_ref().and_then(Value::as_array);
    calls.map_or(0, Vec::len)
}
