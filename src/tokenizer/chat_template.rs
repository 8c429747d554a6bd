//! Messages to a prompt, by the Jinja template in the model file.
//!
//! Only what the template itself spells out becomes a control token. Before a template is compiled, each control token in
//! its literals is replaced by one private character that occurs in no message (`template_source.rs`); what a user, a tool
//! or a document says goes in as it is, so trimming, splitting and comparing work as in Python. In the rendered text the
//! private characters are the control tokens, and everything else is text, also where it spells one.

use super::python;
use super::special::Specials;
use super::template_source::{Place, TemplateSource};
use super::{Special, Tokenizer};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::HashSet;
use std::time::SystemTime;

/// Longer templates are refused; published ones have up to 30 KB.
const MAX_SOURCE: usize = 1 << 20;
/// What rendering may cost besides the messages: one instruction of the template, or 64 bytes that it makes. This bounds
/// time and memory of a template that means harm.
const FUEL: u64 = 1 << 18;
/// What it may cost with the longest messages.
const MAX_FUEL: u64 = 1 << 22;
/// Stack for each unit of fuel. A template can nest lists in lists; a level costs it at least 3 units, and freeing or
/// printing one takes up to 600 bytes of stack (measured). Only what is used is ever committed.
const STACK_PER_FUEL: usize = 256;
/// Nesting at run time; far more than templates need, and safe on the small stacks of mobile threads.
const MAX_NESTING: usize = 150;

/// One message of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// What is said.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub content: String,
    /// The name of the speaker or of the tool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Calls that the assistant made, in the form of the OpenAI interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<serde_json::Value>,
    /// The call that a tool answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// What else the template of a model reads, such as `thinking`.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A message with a role and a content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message {
            role: role.into(),
            content: content.into(),
            ..Message::default()
        }
    }
}

/// What a template is given besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// End with the words that begin a reply.
    pub add_generation_prompt: bool,
    /// Descriptions of the tools that the assistant may call: a list.
    pub tools: Option<&'a serde_json::Value>,
    /// Other variables, such as `enable_thinking`. They cannot replace those above.
    pub extra: Option<&'a serde_json::Map<String, serde_json::Value>>,
    /// The time that the template is told; now if there is none.
    pub now: Option<SystemTime>,
}

/// A part of a rendered prompt. Text never follows text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Text, to be tokenized with [`Special::Text`].
    Text(String),
    /// The spelling of a control token that the template stated.
    Control(String),
}

/// A compiled chat template.
pub struct ChatTemplate {
    source: TemplateSource,
    bos: String,
    eos: String,
    /// The control tokens that occur in the template.
    texts: Vec<String>,
    controls: Specials, // of `texts`, by index
    compiled: Compiled,
}

/// A template with sentinels in the place of control tokens.
struct Compiled {
    environment: Environment<'static>,
    sentinels: Vec<char>, // one for each of `texts`
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos`, what `bos_token` and `eos_token` stand for, are its control tokens; more
    /// are named with [`ChatTemplate::with_control_tokens`].
    ///
    /// # Errors
    /// [`Error::Template`] if the template is not valid.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        ChatTemplate::compile(source, bos, eos, [bos, eos].into_iter())
    }

    /// [`ChatTemplate::new`], with all control tokens of the vocabulary.
    ///
    /// # Errors
    /// [`Error::Template`] if the template is not valid.
    pub fn with_control_tokens<'a>(
        source: &str,
        bos: &str,
        eos: &str,
        controls: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self> {
        ChatTemplate::compile(source, bos, eos, controls.into_iter())
    }

    /// The template in a model file, if it has one.
    ///
    /// # Errors
    /// [`Error::Template`] if the template is not valid.
    pub fn from_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let Some(source) = tokenizer.chat_template() else {
            return Ok(None);
        };
        let text = |id: Option<u32>| id.map(|id| tokenizer.token_text(id)).unwrap_or_default();
        let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
        let controls = tokenizer.parsed_only().map(|(text, _)| text);
        ChatTemplate::compile(source, &bos, &eos, controls).map(Some)
    }

    fn compile<'a>(
        source: &str,
        bos: &str,
        eos: &str,
        controls: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Error::Template(format!(
                "expected at most {MAX_SOURCE} bytes, found {}",
                source.len()
            )));
        }
        let mut texts: Vec<String> = controls
            .filter(|text| *text == bos || *text == eos || source.contains(text))
            // White space at an end would be trimmed where a sentinel is not.
            .filter(|text| !text.is_empty() && text.trim() == *text)
            .map(str::to_owned)
            .collect();
        texts.sort_unstable();
        texts.dedup();
        let controls = Specials::new(texts.iter().cloned().zip(0..));
        let source = TemplateSource::parse(source);
        let sentinels = sentinels(
            texts.len(),
            &source.instantiate(&Specials::default(), &[], &[], |_, _| false),
        )?;
        let instance = source.instantiate(&controls, &texts, &sentinels, |_, place| {
            place != Place::Tested
        });
        let compiled = Compiled {
            environment: environment(instance)?,
            sentinels,
        };
        Ok(ChatTemplate {
            source,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            texts,
            controls,
            compiled,
        })
    }

    /// The prompt for a conversation, in parts.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the messages or fails on them.
    pub fn render(&self, messages: &[Message], opts: &RenderOptions) -> Result<Vec<Piece>> {
        // All that comes from outside, as text: strings appear in it as they are but for JSON's escapes.
        let outside = serde_json::to_string(&(messages, opts.tools, opts.extra))
            .map_err(|e| Error::Template(e.to_string()))?;
        let fuel = (FUEL + outside.len() as u64 / 4).min(MAX_FUEL);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("chat template".into())
                .stack_size(fuel as usize * STACK_PER_FUEL)
                .spawn_scoped(scope, || self.render_here(messages, opts, &outside, fuel))
                .map_err(|e| Error::Template(format!("no thread to render it: {e}")))?;
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn render_here(
        &self,
        messages: &[Message],
        opts: &RenderOptions,
        outside: &str,
        fuel: u64,
    ) -> Result<Vec<Piece>> {
        let taken = self.compiled.sentinels.iter().any(|&s| outside.contains(s));
        let other;
        let compiled = if taken {
            other = self.instance(outside, |_, place| place != Place::Tested)?;
            &other
        } else {
            &self.compiled
        };
        let output = compiled.run(self, messages, opts, fuel)?;

        // A template may test what a user said against a control token in a way that its syntax does not show (through
        // a variable). Only if the user said one can that matter: then compare with the template as it was written.
        let said: Vec<&str> = self
            .texts
            .iter()
            .map(String::as_str)
            .filter(|t| outside.contains(&escaped(t)))
            .collect();
        if !said.is_empty() {
            let plain = self.instance(outside, |_, _| false)?;
            let expected = plain.run(self, messages, opts, fuel)?;
            let as_written = |compiled: &Compiled, output: &str| {
                self.expand(compiled, output) == self.expand(&plain, &expected)
            };
            if !as_written(compiled, &output) {
                let cautious = self.instance(outside, |text, place| {
                    place == Place::Output || (place == Place::Statement && !said.contains(&text))
                })?;
                let output = cautious.run(self, messages, opts, fuel)?;
                if as_written(&cautious, &output) {
                    return Ok(self.pieces(&cautious, &output));
                }
            }
        }
        Ok(self.pieces(compiled, &output))
    }

    /// The tokens of the prompt for a conversation. Begins with one BOS if the model wants one or the template states it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn tokens(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        opts: &RenderOptions,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.add_bos()) {
            ids.push(bos);
        }
        for piece in self.render(messages, opts)? {
            match piece {
                Piece::Text(text) => tokenizer.encode_to(&text, Special::Text, &mut ids),
                Piece::Control(text) => match tokenizer.special_id(&text) {
                    Some(id) if ids.len() == 1 && ids[0] == id && tokenizer.bos() == Some(id) => {}
                    Some(id) => ids.push(id),
                    None => tokenizer.encode_to(&text, Special::Text, &mut ids),
                },
            }
        }
        Ok(ids)
    }

    /// The template with sentinels that do not occur in `outside`, where `replace` says so.
    fn instance(&self, outside: &str, replace: impl Fn(&str, Place) -> bool) -> Result<Compiled> {
        let written = self
            .source
            .instantiate(&Specials::default(), &[], &[], |_, _| false);
        let sentinels = sentinels(self.texts.len(), &format!("{written}{outside}"))?;
        let source = self
            .source
            .instantiate(&self.controls, &self.texts, &sentinels, replace);
        Ok(Compiled {
            environment: environment(source)?,
            sentinels,
        })
    }

    /// The rendered text as people read it.
    fn expand(&self, compiled: &Compiled, output: &str) -> String {
        let pieces = self.pieces(compiled, output);
        pieces
            .iter()
            .map(|(Piece::Text(text) | Piece::Control(text))| &**text)
            .collect()
    }

    fn pieces(&self, compiled: &Compiled, output: &str) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut rest = output;
        let sentinel = |c: char| compiled.sentinels.iter().position(|&s| s == c);
        while let Some((at, idx, len)) = rest
            .char_indices()
            .find_map(|(at, c)| Some((at, sentinel(c)?, c.len_utf8())))
        {
            if at > 0 {
                pieces.push(Piece::Text(rest[..at].to_owned()));
            }
            pieces.push(Piece::Control(self.texts[idx].clone()));
            rest = &rest[at + len..];
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        pieces
    }
}

impl Compiled {
    fn run(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        opts: &RenderOptions,
        fuel: u64,
    ) -> Result<String> {
        let variable = |text: &String| match template.texts.binary_search(text) {
            Ok(idx) => self.sentinels[idx].to_string(),
            Err(_) => text.clone(),
        };
        let mut context = opts.extra.cloned().unwrap_or_default();
        let messages =
            serde_json::to_value(messages).map_err(|e| Error::Template(e.to_string()))?;
        context.insert("messages".into(), messages);
        context.insert("tools".into(), opts.tools.cloned().unwrap_or_default());
        context.insert(
            "add_generation_prompt".into(),
            opts.add_generation_prompt.into(),
        );
        context.insert("bos_token".into(), variable(&template.bos).into());
        context.insert("eos_token".into(), variable(&template.eos).into());
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let now = opts.now.unwrap_or_else(SystemTime::now);
        environment.add_function("strftime_now", move |format: &str| {
            python::strftime(now, format)
        });
        let rendered = environment
            .get_template(NAME)
            .and_then(|compiled| compiled.render(Value::from(Serde(&context))));
        rendered.map_err(|err| match err.kind() {
            ErrorKind::OutOfFuel => {
                Error::Template("it does too much for a conversation of this size".into())
            }
            _ => Error::Template(template.expand(self, &err.to_string())),
        })
    }
}

/// An environment like the one of the `transformers` library, with one template.
fn environment(source: String) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let error = |err: minijinja::Error| Error::Template(err.to_string());
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(error)?;
    environment.set_syntax(syntax);
    environment.set_recursion_limit(MAX_NESTING);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.set_formatter(python::write_value);
    environment.add_test("iterable", python::is_iterable);
    environment.add_filter("tojson", python::tojson);
    environment.add_function(
        "raise_exception",
        |what: &str| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                what.to_owned(),
            ))
        },
    );
    environment
        .add_template_owned(NAME, source)
        .map_err(error)?;
    Ok(environment)
}

/// `n` characters that do not occur in `avoid`: first what Unicode keeps free for the inner use of a program.
fn sentinels(n: usize, avoid: &str) -> Result<Vec<char>> {
    const FIRST: char = '\u{FDD0}';
    let taken: HashSet<char> = avoid.chars().filter(|&c| c >= FIRST).collect();
    let free = (FIRST..='\u{FDEF}').chain('\u{100000}'..='\u{10FFFD}');
    let sentinels: Vec<char> = free.filter(|c| !taken.contains(c)).take(n).collect();
    if sentinels.len() < n {
        return Err(Error::Template(
            "the messages use up the private characters of Unicode".into(),
        ));
    }
    Ok(sentinels)
}

/// How a text looks inside JSON.
fn escaped(text: &str) -> String {
    let json = serde_json::Value::from(text).to_string();
    json[1..json.len() - 1].to_owned()
}

/// Clients send `null` for the content of a message that only calls tools.
fn null_is_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
