//! Vocabulary and source to a constraint.
//!
//! Every source is hostile: its size, its references and what compiling may cost are bounded, it is compiled on a stack
//! of its own, and what the crate does for a token has an end, after which the reply is an error.

use std::fmt;
use std::sync::Arc;
use std::thread;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities};
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use super::{ReplyFormat, locate};
use crate::error::{Error, Result};
use crate::sampler::{Constraint, Follow};
use crate::tokenizer::{TokenType, Tokenizer};

/// Bytes of a schema; published ones of whole standards have as many.
const MAX_SCHEMA: usize = 1 << 20;
/// Bytes of a grammar: some work goes by the pairs of its rules.
const MAX_GRAMMAR: usize = 64 << 10;
/// References in a schema: a chain of them is as deep on the stack.
const MAX_REFERENCES: usize = 1024;
/// Values in a schema: some work goes by their pairs.
const MAX_VALUES: usize = 20_000;
/// Stack to compile a source on; only what is used is ever committed.
const STACK: usize = 64 << 20;
/// Between two signs of JSON: without a bound a weak model would never come to an end.
const WHITE_SPACE: &str = r"(?: |\n[ \t]{0,20})";

/// Bytes of an error: some quote what was compiled.
const MAX_MESSAGE: usize = 400;

/// A byte that occurs in no text. Tokens whose words begin with it stand for themselves: `<|im_start|>` in a grammar.
const MARK: u8 = 0xff;

/// A vocabulary as a tree of bytes; made once for a model.
pub(crate) struct Lexicon {
    factory: ParserFactory,
}

impl Lexicon {
    /// The tree of `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Grammar`] if there is no tree of it.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let n = tokenizer.n_vocab() as u32; // ids are 32 bits wide
        let words: Vec<Vec<u8>> = (0..n).map(|id| word(tokenizer, id)).collect();
        let ends = tokenizer.ends();
        let info = TokRxInfo::new(n, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(ends);
        }
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| Error::Grammar(one_line(&e.to_string())))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 50_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory })
    }

    /// Compiles a source.
    ///
    /// # Errors
    /// [`Error::Grammar`], which says where.
    pub fn compile(&self, format: &ReplyFormat) -> Result<Arc<dyn Constraint>> {
        let name = format.name();
        let bad = |what: String| Error::Grammar(format!("{name}{what}"));
        let len = format.text().len();
        let most = match format {
            ReplyFormat::JsonSchema(_) => MAX_SCHEMA,
            ReplyFormat::Lark(_) => MAX_GRAMMAR,
        };
        if len > most {
            return Err(bad(format!(": expected at most {most} bytes, found {len}")));
        }
        let schema = match format {
            ReplyFormat::JsonSchema(text) => Some(schema(text).map_err(bad)?),
            ReplyFormat::Lark(_) => None,
        };
        let compile = || -> Result<Matcher, String> {
            match (&schema, format) {
                (Some(schema), _) => self.matcher(schema_grammar(schema)).map_err(|what| {
                    let fails = |part: &Value| self.matcher(schema_grammar(part)).err();
                    let at = locate::deepest(schema, &fails);
                    let (at, what) = at.unwrap_or((String::new(), what));
                    let at = if at.is_empty() { "/" } else { &at };
                    format!(" at `{at}`: {what}")
                }),
                (None, format) => self
                    .matcher(TopLevelGrammar::from_lark(format.text().into()))
                    .map_err(|what| format!(": {what}")),
            }
        };
        let on_own_stack = || {
            thread::scope(|scope| {
                let thread = thread::Builder::new().name("grammar".into());
                let thread = thread.stack_size(STACK).spawn_scoped(scope, compile);
                let thread = thread.map_err(|e| format!(": no thread to compile it: {e}"))?;
                let done = thread.join();
                done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        };
        let matcher = on_own_stack().map_err(bad)?;
        Ok(Arc::new(Guide { name, matcher }))
    }

    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = self.factory.create_parser(grammar);
        parser
            .map(|parser| Matcher::new(Ok(parser)))
            .map_err(|e| one_line(&e.to_string()))
    }
}

/// What a token stands for: nothing for those that no text may contain.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    match tokenizer.token_type(id) {
        Some(TokenType::Control) => {
            let text = tokenizer.token_text(id);
            match text.starts_with('<') && text.ends_with('>') {
                true => [&[MARK], text.as_bytes()].concat(),
                false => Vec::new(),
            }
        }
        Some(TokenType::Unknown | TokenType::Unused) | None => Vec::new(),
        Some(_) => {
            let bytes = tokenizer.token_bytes(id);
            // No UTF-8 has this byte; it would be taken for the mark.
            if bytes.contains(&MARK) {
                return Vec::new();
            }
            bytes.into_owned()
        }
    }
}

/// The schema in `text`, which is not larger than we take.
fn schema(text: &str) -> Result<Value, String> {
    let schema: Value = serde_json::from_str(text).map_err(|e| format!(": {e}"))?;
    if !matches!(schema, Value::Object(_) | Value::Bool(_)) {
        return Err(" at `/`: expected an object, found another value".into());
    }
    let (mut n_values, mut n_references) = (0, 0);
    count(&schema, &mut n_values, &mut n_references);
    if n_values > MAX_VALUES {
        return Err(format!(
            ": expected at most {MAX_VALUES} values, found {n_values}"
        ));
    }
    if n_references > MAX_REFERENCES {
        return Err(format!(
            ": expected at most {MAX_REFERENCES} references, found {n_references}"
        ));
    }
    Ok(schema)
}

/// `serde_json` nests no deeper than 128.
fn count(value: &Value, n_values: &mut usize, n_references: &mut usize) {
    *n_values += 1;
    match value {
        Value::Array(items) => items.iter().for_each(|v| count(v, n_values, n_references)),
        Value::Object(fields) => {
            *n_references += usize::from(fields.contains_key("$ref"));
            fields
                .values()
                .for_each(|v| count(v, n_values, n_references));
        }
        _ => {}
    }
}

fn schema_grammar(schema: &Value) -> TopLevelGrammar {
    let mut schema = schema.clone();
    if let Value::Object(fields) = &mut schema {
        let options = json!({"whitespace_pattern": WHITE_SPACE});
        fields.entry("x-guidance").or_insert(options);
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// What an error says, on one line, without the state of the parser behind it.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|l| !l.is_empty());
    let said: Vec<_> = lines.take_while(|line| !line.starts_with('<')).collect();
    let mut said = said.join(" ");
    if said.len() > MAX_MESSAGE {
        said.truncate(said.floor_char_boundary(MAX_MESSAGE));
        said.push('…');
    }
    said
}

/// A source, compiled.
struct Guide {
    name: &'static str,
    /// That has seen nothing yet.
    matcher: Matcher,
}

impl fmt::Debug for Guide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guide").field("name", &self.name).finish()
    }
}

impl Constraint for Guide {
    fn start(&self) -> Box<dyn Follow> {
        Box::new(Following {
            name: self.name,
            // With caches of its own: replies on other threads do not wait for each other.
            matcher: self.matcher.deep_clone(),
            allowed: Vec::new(),
        })
    }
}

/// A reply that is being followed.
struct Following {
    name: &'static str,
    matcher: Matcher,
    allowed: Vec<u32>,
}

impl Following {
    fn failed(&self, error: impl fmt::Display) -> Error {
        Error::Grammar(format!("{}: {}", self.name, one_line(&error.to_string())))
    }
}

impl Follow for Following {
    fn allowed(&mut self) -> Result<&[u32]> {
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|e| self.failed(e))?;
        self.allowed.clear();
        self.allowed.extend_from_slice(mask.as_slice());
        Ok(&self.allowed)
    }

    fn accept(&mut self, token: u32) -> Result<()> {
        let accepted = self.matcher.consume_token(token);
        accepted.map_err(|e| self.failed(e))
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped() && !self.matcher.is_error()
    }

    fn take_back(&mut self, n: usize) -> Result<()> {
        let taken = self.matcher.rollback(n);
        taken.map_err(|e| self.failed(e))
    }

    fn fork(&self) -> Box<dyn Follow> {
        Box::new(Self {
            name: self.name,
            matcher: self.matcher.deep_clone(),
            allowed: Vec::new(),
        })
    }
}
