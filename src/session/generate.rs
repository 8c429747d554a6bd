//! A prompt to a reply: reuse what the session holds already, prefill the rest, decode until something ends it.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Session;
use crate::error::{Error, Result};
use crate::profile::{ExpertWork, Work};
use crate::sampler::{Constraint, Sampler};
use crate::tools::{self, Part, ToolCall, ToolParser};

/// When a reply ends, and how its tokens become text.
#[derive(Clone, Debug, Default)]
pub struct GenerateOptions {
    /// Tokens at most; `None`: until the model ends or the context is full.
    pub max_tokens: Option<usize>,
    /// Texts that end the reply. They are not part of it.
    pub stop: Vec<String>,
    /// Whether the model may not end: its end tokens are never chosen.
    pub ignore_end: bool,
    /// Whether the reply continues the text of the prompt, so that a space it begins with stays.
    pub continued: bool,
    /// What the reply must be, from [`Model::constraint`](super::Model::constraint).
    pub constraint: Option<Arc<dyn Constraint>>,
    /// Whether calls of tools are told apart from the text, see [`tools`](crate::tools).
    pub tools: bool,
}

/// Why a reply ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finish {
    /// The model ended it, or a stop text came.
    Stop,
    /// It has as many tokens as were asked for.
    Length,
    /// The caller broke.
    Cancelled,
    /// The context is full.
    ContextFull,
}

impl Finish {
    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
            Finish::ContextFull => "context_full",
        }
    }
}

/// What happens while a reply is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event<'a> {
    /// `done` of `total` tokens of the prompt are read.
    Prefill {
        /// Tokens read.
        done: usize,
        /// Tokens to read: those of the prompt that the session did not hold.
        total: usize,
    },
    /// A token came, and completed this text: often none.
    Text(&'a str),
    /// A token came, and completed this call, with [`GenerateOptions::tools`].
    Call(&'a ToolCall),
}

/// Counts and times of a reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those that the session held already; the others were read.
    pub reused_tokens: usize,
    /// Those of them that ran once more, to rebuild convolutions where the session went back.
    pub replayed_tokens: usize,
    /// Time to read the others.
    pub prefill: Duration,
    /// Time from the call to the first token of the reply.
    pub first_token: Duration,
    /// Forward passes of single tokens.
    pub decode_tokens: usize,
    /// Their time, with sampling.
    pub decode: Duration,
    /// What was read of experts for them, where these are read when they are used.
    pub experts: ExpertWork,
    /// What the backend did for all of it.
    pub work: Work,
}

impl Stats {
    /// Tokens of the prompt read per second.
    pub fn prefill_rate(&self) -> f64 {
        rate(self.prompt_tokens - self.reused_tokens, self.prefill)
    }

    /// Tokens decoded per second.
    pub fn decode_rate(&self) -> f64 {
        rate(self.decode_tokens, self.decode)
    }
}

fn rate(n: usize, time: Duration) -> f64 {
    let seconds = time.as_secs_f64();
    if seconds > 0.0 {
        n as f64 / seconds
    } else {
        0.0
    }
}

/// A reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Reply {
    /// The text, without a stop text and calls of tools.
    pub text: String,
    /// Calls of tools, with [`GenerateOptions::tools`].
    pub calls: Vec<ToolCall>,
    /// Text and calls, as the model wrote them, where there are calls.
    pub written: Option<String>,
    /// The tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Counts and times.
    pub stats: Stats,
}

/// Makes the session hold `prompt` and continues it. Tokens that the session holds already and `prompt` begins with are
/// kept. `on` is called between the steps of the prefill and after every token; if it breaks, the reply ends there, as it
/// does in the middle of a step where [`Session::set_cancel`] has its flag set.
///
/// # Errors
/// [`Error::ContextFull`] if `prompt` does not fit (the session stays as it was), [`Error::Invalid`] if it is empty or
/// has tokens that the model does not know; what [`Session::decode`] and [`Sampler::sample`] say.
pub fn generate(
    session: &mut Session,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions,
    on: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Reply> {
    let begin = Instant::now();
    let before = session.work();
    let (needed, n_ctx) = (prompt.len(), session.n_ctx());
    if needed > n_ctx {
        return Err(Error::ContextFull { needed, n_ctx });
    }
    if prompt.is_empty() {
        return Err(Error::Invalid(
            "prompt: expected at least one token, found none".into(),
        ));
    }
    let model = session.model().clone();
    let tokenizer = model.tokenizer()?;
    let ends = if options.ignore_end {
        tokenizer.ends()
    } else {
        &[]
    };
    sampler.forbid(ends);
    sampler.reset();
    // What ends a turn is in every prompt of a chat; a penalty on it would make the model ramble.
    let text = prompt.iter().filter(|token| !tokenizer.is_end(**token));
    text.for_each(|token| sampler.accept(*token));

    let mut reply = Reply {
        text: String::new(),
        calls: Vec::new(),
        written: None,
        tokens: Vec::new(),
        finish: Finish::Length,
        stats: Stats {
            prompt_tokens: prompt.len(),
            ..Stats::default()
        },
    };
    let replayed = session.n_replayed();
    let begins = rewind(session, prompt);
    let mut cancelled = matches!(begins, Err(Error::Cancelled));
    reply.stats.reused_tokens = if cancelled { 0 } else { begins? };
    reply.stats.replayed_tokens = session.n_replayed() - replayed;
    let rest = &prompt[reply.stats.reused_tokens..];
    let prefill_begin = Instant::now();
    if !cancelled && !rest.is_empty() {
        let read = session.prefill(rest, &mut |done, total| {
            let flow = on(Event::Prefill { done, total });
            cancelled |= flow.is_break();
            flow
        });
        cancelled |= is_cancelled(read)?;
    }
    cancelled |= is_cancelled(session.mark())?; // another reply begins here
    reply.stats.prefill = prefill_begin.elapsed();
    if cancelled {
        reply.finish = Finish::Cancelled;
        return Ok(reply);
    }

    let mut follow = options.constraint.as_ref().map(|c| c.start());
    // A constraint is one on all of the text.
    let mut detokenizer = if options.continued || follow.is_some() {
        tokenizer.stream_continued()
    } else {
        tokenizer.stream()
    };
    let mut stops = Stops::new(&options.stop);
    let mut told = Told::new(options.tools);
    if options.tools {
        detokenizer = detokenizer.show(tools::marks().filter_map(|m| tokenizer.special_id(m)));
    }
    let mut piece = String::new();
    let mut decode_begin = Instant::now();
    let work = session.work();
    while options.max_tokens.is_none_or(|n| reply.tokens.len() < n) {
        let allowed = follow.as_mut().map(|follow| follow.allowed()).transpose()?;
        let token = choose(session, sampler, allowed)?;
        if reply.tokens.is_empty() {
            reply.stats.first_token = begin.elapsed();
            decode_begin = Instant::now();
        }
        if tokenizer.is_end(token) {
            reply.finish = Finish::Stop;
            break;
        }
        if let Some(follow) = &mut follow {
            follow.accept(token)?;
        }
        sampler.accept(token);
        reply.tokens.push(token);
        piece.clear();
        detokenizer.push_to(token, &mut piece);
        let shown = told.written.len();
        let stopped = stops.push(&piece, &mut told.written);
        let flow = told.tell(shown, &mut reply, on);
        if stopped {
            reply.finish = Finish::Stop;
            break;
        }
        if flow.is_break() {
            reply.finish = Finish::Cancelled;
            break;
        }
        if follow.as_ref().is_some_and(|follow| follow.is_complete()) {
            reply.finish = Finish::Stop;
            break;
        }
        if options.max_tokens == Some(reply.tokens.len()) {
            break;
        }
        if session.tokens().len() == session.n_ctx() {
            reply.finish = Finish::ContextFull;
            break;
        }
        // A constraint may leave but the least likely.
        let k = match &follow {
            None => sampler.reach().unwrap_or(0),
            Some(_) => 0,
        };
        if is_cancelled(session.decode_top(token, k))? {
            reply.finish = Finish::Cancelled;
            break;
        }
        reply.stats.decode_tokens += 1;
        reply.stats.decode = decode_begin.elapsed();
        reply.stats.experts = session.work().experts.since(&work.experts);
    }
    reply.stats.work = session.work().since(&before);
    // Half a character, or what might have become a stop text.
    let shown = told.written.len();
    if !stops.found {
        stops.push(&detokenizer.flush(), &mut told.written);
        stops.finish(&mut told.written);
    }
    told.finish(shown, &mut reply, on);
    Ok(reply)
}

/// The token after those of `session`, from as many logits as it knows.
pub(super) fn choose(
    session: &Session,
    sampler: &mut Sampler,
    allowed: Option<&[u32]>,
) -> Result<u32> {
    match session.top() {
        [] => sampler.sample_among(session.logits(), allowed),
        top => sampler.sample_top(top, session.model().info().config.n_vocab),
    }
}

/// Tells a reply as it comes in.
struct Told {
    /// All that came.
    written: String,
    /// Where calls are told apart.
    parser: Option<ToolParser>,
    parts: Vec<Part>,
}

impl Told {
    fn new(tools: bool) -> Self {
        Self {
            written: String::new(),
            parser: tools.then(ToolParser::default),
            parts: Vec::new(),
        }
    }

    /// Tells what was written from `at` on, and puts it into `reply`. There is an event for each token.
    fn tell(
        &mut self,
        at: usize,
        reply: &mut Reply,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let piece = &self.written[at..];
        let Some(parser) = &mut self.parser else {
            reply.text.push_str(piece);
            return on(Event::Text(piece));
        };
        parser.push(piece, &mut self.parts);
        if self.parts.is_empty() {
            return on(Event::Text(""));
        }
        self.tell_parts(reply, on)
    }

    fn tell_parts(
        &mut self,
        reply: &mut Reply,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut flow = ControlFlow::Continue(());
        for part in self.parts.drain(..) {
            let more = match part {
                Part::Text(text) => {
                    reply.text.push_str(&text);
                    on(Event::Text(&text))
                }
                Part::Call(call) => {
                    let flow = on(Event::Call(&call));
                    reply.calls.push(call);
                    flow
                }
            };
            if more.is_break() {
                flow = more;
            }
        }
        flow
    }

    /// The reply has ended, whatever is said to the last events.
    fn finish(
        mut self,
        at: usize,
        reply: &mut Reply,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) {
        if self.written.len() > at {
            let _ = self.tell(at, reply, on);
        }
        if let Some(parser) = &mut self.parser {
            parser.finish(&mut self.parts);
            let _ = self.tell_parts(reply, on);
        }
        if !reply.calls.is_empty() {
            reply.written = Some(self.written);
        }
    }
}

/// Whether a flag, or the caller, has stopped what else has succeeded.
fn is_cancelled(done: Result<()>) -> Result<bool> {
    match done {
        Err(Error::Cancelled) => Ok(true),
        done => done.map(|()| false),
    }
}

/// Goes back to where the session and `prompt` part. Returns how many tokens of `prompt` need not be read.
fn rewind(session: &mut Session, prompt: &[u32]) -> Result<usize> {
    let pairs = session.tokens().iter().zip(prompt);
    let common = pairs.take_while(|(a, b)| a == b).count();
    session.cut(common);
    if common == prompt.len() {
        session.recall_logits()?;
    } else {
        session.mark()?; // a prompt in place of this one begins here
    }
    Ok(common)
}

/// Holds text back as long as it may be the beginning of a stop text.
struct Stops<'a> {
    stops: Vec<&'a str>,
    held: String,
    found: bool,
}

impl<'a> Stops<'a> {
    fn new(stops: &'a [String]) -> Self {
        let stops = stops.iter().map(String::as_str).filter(|s| !s.is_empty());
        Self {
            stops: stops.collect(),
            held: String::new(),
            found: false,
        }
    }

    /// Appends to `out` what is certain; whether a stop text has come.
    fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(piece);
            return false;
        }
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s)).min() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.found = true;
            return true;
        }
        let held = &self.held;
        let may_stop = |at: &usize| self.stops.iter().any(|s| s.starts_with(&held[*at..]));
        let cuts = held.char_indices().map(|(at, _)| at);
        let cut = cuts.filter(|at| may_stop(at)).min().unwrap_or(held.len());
        out.push_str(&held[..cut]);
        self.held.drain(..cut);
        false
    }

    fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<_> = stops.iter().map(|s| s.to_string()).collect();
        let mut stops = Stops::new(&stops);
        let mut out = String::new();
        let found = pieces.iter().any(|piece| stops.push(piece, &mut out));
        stops.finish(&mut out);
        (out, found)
    }

    #[test]
    fn stop_texts_are_found_across_pieces() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), ("a ".into(), true));
        assert_eq!(
            run(&["END"], &["a E", "N", "E", "ND"]),
            ("a EN".into(), true)
        );
        assert_eq!(run(&["END"], &["EEN", "D"]), ("E".into(), true));
        assert_eq!(run(&["b", "ab"], &["xa", "b"]), ("x".into(), true));
        assert_eq!(run(&["é!"], &["caf", "é", "?"]), ("café?".into(), false));
        assert_eq!(run(&[""], &["x"]), ("x".into(), false));
        assert_eq!(run(&["zz"], &["a z"]), ("a z".into(), false));
    }

    #[test]
    fn text_is_held_back_only_while_it_may_stop() {
        let stops = ["\n\nUser:".to_string()];
        let mut stops = Stops::new(&stops);
        let mut out = String::new();
        stops.push("hello\n", &mut out);
        assert_eq!(out, "hello");
        stops.push("world", &mut out);
        assert_eq!(out, "hello\nworld");
    }
}
