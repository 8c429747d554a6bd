//! A conversation on a session: messages, rendered by the model's template, and the replies to them.
//!
//! The messages are the truth; before each reply the session is made to hold their tokens, and keeps what it can.

use std::fs;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::generate::{Event, Finish, GenerateOptions, Reply, generate};
use super::{Model, Session};
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

/// A conversation.
pub struct Chat {
    session: Session,
    template: ChatTemplate,
    messages: Vec<Message>,
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
        })
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.session.model()
    }

    /// What has been said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
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
        self.messages.push(Message::new(USER, text));
        let said = self.messages.len() - 1;
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
        let reply = generate(&mut self.session, &prompt, sampler, options, on)?;
        if is_said(&reply) {
            self.messages.push(Message::new(ASSISTANT, &*reply.text));
        }
        Ok(reply)
    }

    /// The tokens of the conversation, up to where the model is to speak.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the messages.
    pub fn prompt(&self) -> Result<Vec<u32>> {
        let options = RenderOptions {
            add_generation_prompt: true,
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
        let saved = Saved {
            model: Some(self.model().info().name.clone()),
            messages: self.messages.clone(),
        };
        let mut json = serde_json::to_vec_pretty(&saved).expect("strings become JSON");
        json.push(b'\n');
        write_whole(path, &json).map_err(|e| Error::io(path, e))
    }

    /// Replaces the conversation by the one in the file at `path`. Returns the name of the model that it was held with,
    /// if the file has it. The messages may also be the whole file, as an array.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`] if it holds no conversation; the one there is stays.
    pub fn load(&mut self, path: &Path) -> Result<Option<String>> {
        let bad = |what: String| Error::BadFile {
            path: path.into(),
            what,
        };
        let bytes = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !bytes.is_file() || bytes.len() > MAX_FILE_BYTES {
            return Err(bad("expected a file of a conversation, up to 64 MiB".into()));
        }
        let json = fs::read(path).map_err(|e| Error::io(path, e))?;
        let begins = json.iter().find(|b| !b.is_ascii_whitespace());
        let saved = if begins == Some(&b'[') {
            serde_json::from_slice(&json).map(|messages| Saved {
                model: None,
                messages,
            })
        } else {
            serde_json::from_slice(&json)
        };
        let saved = saved.map_err(|e| bad(format!("expected a conversation, found {e}")))?;
        self.messages = saved.messages;
        Ok(saved.model)
    }
}

/// Whether a reply is worth a turn: it is complete, if empty, or has some text.
fn is_said(reply: &Reply) -> bool {
    reply.finish == Finish::Stop || !reply.text.is_empty()
}

/// Writes a temporary file beside `path`, syncs it, and gives it its name.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary: PathBuf = path.with_file_name(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600); // what somebody said to a model is theirs
    }
    let written = options.open(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&temporary); // the first error is the one to tell
    }
    written
}
