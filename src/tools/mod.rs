//! Calls of tools in replies, found while the text comes in.
//!
//! ```text
//! LFM2           <|tool_call_start|>[find(name="x", most=3), other()]<|tool_call_end|>
//! Hermes, Qwen   <tool_call>{"name": "find", "arguments": {"name": "x", "most": 3}}</tool_call>
//! ```
//! Between either pair of marks may stand calls in Python's syntax (`python.rs`), or JSON: one call or a list of them, with
//! `arguments` or `parameters`, which may be a text of JSON. What is none of it stays text, as it was written.

mod python;

use serde::Serialize;
use serde_json::{Map, Value};

/// The marks around calls.
const MARKS: &[(&str, &str)] = &[
    ("<|tool_call_start|>", "<|tool_call_end|>"),
    ("<tool_call>", "</tool_call>"),
];

/// Bytes between two marks; more is no call.
const MAX_CALL: usize = 1 << 20;

/// The marks, which must be in the text: where a vocabulary has them as control tokens they would be left out.
pub fn marks() -> impl Iterator<Item = &'static str> {
    MARKS.iter().flat_map(|(start, end)| [*start, *end])
}

/// A call.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ToolCall {
    /// The tool.
    pub name: String,
    /// Its arguments by name.
    pub arguments: Map<String, Value>,
}

/// A part of a reply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Part {
    /// Text.
    Text(String),
    /// A whole call.
    Call(ToolCall),
}

/// Tells calls from text while it comes in, in pieces of any length. Text that cannot be part of a mark goes by at once.
#[derive(Clone, Debug, Default)]
pub struct ToolParser {
    /// What may be the beginning of a mark, or the mark and what has come after it.
    held: String,
    /// The pair of marks, of which the first has come.
    within: Option<(&'static str, &'static str)>,
    /// Where the second need not be looked for any more.
    searched: usize,
}

impl ToolParser {
    /// Adds `piece`; what has become certain goes to `out`.
    pub fn push(&mut self, piece: &str, out: &mut Vec<Part>) {
        self.held.push_str(piece);
        loop {
            let more = match self.within {
                None => self.find_start(out),
                Some((start, end)) => self.find_end(start, end, out),
            };
            if !more {
                return;
            }
        }
    }

    /// The reply has ended: calls whose last mark did not come, and what was held.
    pub fn finish(&mut self, out: &mut Vec<Part>) {
        let held = std::mem::take(&mut self.held);
        self.searched = 0;
        let Some((start, _)) = self.within.take() else {
            return push_text(held, out);
        };
        match calls(&held[start.len()..]) {
            Some(calls) => out.extend(calls.into_iter().map(Part::Call)),
            None => push_text(held, out),
        }
    }

    fn find_start(&mut self, out: &mut Vec<Part>) -> bool {
        let first = MARKS
            .iter()
            .filter_map(|pair| Some((self.held.find(pair.0)?, *pair)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, pair)) = first {
            let rest = self.held.split_off(at);
            push_text(std::mem::replace(&mut self.held, rest), out);
            self.within = Some(pair);
            self.searched = pair.0.len();
            return true;
        }
        let may_start = |at: &usize| {
            let rest = &self.held[*at..];
            MARKS.iter().any(|(start, _)| start.starts_with(rest))
        };
        let cut = self.held.match_indices('<').map(|(at, _)| at);
        let cut = cut.into_iter().find(may_start).unwrap_or(self.held.len());
        let rest = self.held.split_off(cut);
        push_text(std::mem::replace(&mut self.held, rest), out);
        false
    }

    fn find_end(&mut self, start: &str, end: &str, out: &mut Vec<Part>) -> bool {
        let from = self.held.floor_char_boundary(self.searched);
        match self.held[from..].find(end) {
            Some(at) => {
                let at = from + at;
                let rest = self.held.split_off(at + end.len());
                let whole = std::mem::replace(&mut self.held, rest);
                match calls(&whole[start.len()..at]) {
                    Some(calls) => out.extend(calls.into_iter().map(Part::Call)),
                    None => push_text(whole, out),
                }
            }
            None if self.held.len() > MAX_CALL => push_text(std::mem::take(&mut self.held), out),
            None => {
                let may_end = self.held.len().saturating_sub(end.len());
                self.searched = may_end.max(start.len());
                return false;
            }
        }
        self.within = None;
        true
    }
}

/// Text never follows text.
fn push_text(text: String, out: &mut Vec<Part>) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Text(before)) => before.push_str(&text),
        _ => out.push(Part::Text(text)),
    }
}

/// The calls in `text`, if it holds nothing else.
fn calls(text: &str) -> Option<Vec<ToolCall>> {
    let text = text.trim();
    let calls = match serde_json::from_str(text) {
        Ok(Value::Array(calls)) => calls.into_iter().map(json_call).collect::<Option<Vec<_>>>(),
        Ok(call) => json_call(call).map(|call| vec![call]),
        Err(_) => python::calls(text),
    };
    calls.filter(|calls| !calls.is_empty())
}

/// `{"name": …, "arguments": {…}}`, or that as the value of `function`.
fn json_call(call: Value) -> Option<ToolCall> {
    let Value::Object(mut call) = call else {
        return None;
    };
    if let Some(Value::Object(function)) = call.remove("function") {
        call = function;
    }
    let Some(Value::String(name)) = call.remove("name") else {
        return None;
    };
    let arguments = call
        .remove("arguments")
        .or_else(|| call.remove("parameters"));
    let arguments = match arguments {
        Some(Value::Object(arguments)) => arguments,
        Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
        None | Some(Value::Null) => Map::new(),
        Some(_) => return None,
    };
    (!name.is_empty()).then_some(ToolCall { name, arguments })
}
