//! Calls in Python's syntax, `[f(x=1), g.h(s='a')]`: names, and literals as arguments. Nothing is evaluated.

use serde_json::{Map, Number, Value};

use super::ToolCall;

/// Lists in lists.
const MAX_DEPTH: usize = 64;

/// The calls in `text`, in brackets or one alone, if it holds nothing else.
pub(super) fn calls(text: &str) -> Option<Vec<ToolCall>> {
    let mut p = Parser { rest: text };
    let calls = match p.take('[') {
        true => p.until(']', Parser::call)?,
        false => vec![p.call()?],
    };
    p.skip_space();
    p.rest.is_empty().then_some(calls)
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Takes `sign` if it is next.
    fn take(&mut self, sign: char) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(sign) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Items with commas between them, and perhaps one after the last, up to `end`.
    fn until<T>(
        &mut self,
        end: char,
        mut item: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let mut items = Vec::new();
        while !self.take(end) {
            if !items.is_empty() && !self.take(',') {
                return None;
            }
            if !items.is_empty() && self.take(end) {
                break;
            }
            items.push(item(self)?);
        }
        Some(items)
    }

    /// The longest beginning whose characters are all wanted, if there is any.
    fn word(&mut self, wanted: impl Fn(char) -> bool) -> Option<&'a str> {
        self.skip_space();
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }

    fn name(&mut self, dots: bool) -> Option<&'a str> {
        let name =
            self.word(|c| c.is_alphanumeric() || c == '_' || c == '-' || (dots && c == '.'))?;
        name.starts_with(|c: char| c.is_alphabetic() || c == '_')
            .then_some(name)
    }

    fn call(&mut self) -> Option<ToolCall> {
        let name = self.name(true)?.to_owned();
        if !self.take('(') {
            return None;
        }
        let mut arguments = Map::new();
        let all = self.until(')', |p| {
            let name = p.name(false)?;
            let value = p.take('=').then(|| p.value(0))??;
            // Twice the same is an error in Python too.
            arguments
                .insert(name.to_owned(), value)
                .is_none()
                .then_some(())
        });
        all.map(|_| ToolCall { name, arguments })
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.skip_space();
        match self.rest.chars().next()? {
            '[' => {
                self.take('[');
                self.until(']', |p| p.value(depth + 1)).map(Value::Array)
            }
            '(' => self.tuple(depth),
            '{' => {
                self.take('{');
                let mut fields = Map::new();
                self.until('}', |p| {
                    let Value::String(name) = p.value(depth + 1)? else {
                        return None;
                    };
                    let value = p.take(':').then(|| p.value(depth + 1))??;
                    fields.insert(name, value);
                    Some(())
                })?;
                Some(Value::Object(fields))
            }
            '"' | '\'' => self.texts().map(Value::String),
            c if c.is_ascii_digit() || "+-.".contains(c) => self.number(),
            _ => match self.name(false)? {
                "True" | "true" => Some(Value::Bool(true)),
                "False" | "false" => Some(Value::Bool(false)),
                "None" | "null" => Some(Value::Null),
                _ => None,
            },
        }
    }

    /// `(1, 2)` and `(1,)` are tuples, `(1)` is 1.
    fn tuple(&mut self, depth: usize) -> Option<Value> {
        self.take('(');
        if self.take(')') {
            return Some(Value::Array(Vec::new()));
        }
        let first = self.value(depth + 1)?;
        if self.take(')') {
            return Some(first);
        }
        if !self.take(',') {
            return None;
        }
        let rest = self.until(')', |p| p.value(depth + 1))?;
        Some(Value::Array(std::iter::once(first).chain(rest).collect()))
    }

    fn number(&mut self) -> Option<Value> {
        let word = self.word(|c| c.is_ascii_alphanumeric() || "+-._".contains(c))?;
        let digits = word.replace('_', "");
        let digits = digits.strip_prefix('+').unwrap_or(&digits);
        if let Ok(n) = digits.parse::<i64>() {
            return Some(n.into());
        }
        if let Ok(n) = digits.parse::<u64>() {
            return Some(n.into());
        }
        // Not what Rust takes besides: `inf`, `nan`.
        let is_decimal = digits
            .chars()
            .all(|c| c.is_ascii_digit() || "+-.eE".contains(c));
        let n: f64 = digits.parse().ok().filter(|_| is_decimal)?;
        Number::from_f64(n).map(Value::Number)
    }

    /// Strings that follow each other are one.
    fn texts(&mut self) -> Option<String> {
        let mut text = String::new();
        loop {
            self.skip_space();
            if !self.rest.starts_with(['"', '\'']) {
                return Some(text);
            }
            self.text(&mut text)?;
        }
    }

    fn text(&mut self, out: &mut String) -> Option<()> {
        let quote = &self.rest[..1];
        let triple = &quote.repeat(3);
        let end = match self.rest.starts_with(triple.as_str()) {
            true => triple,
            false => quote,
        };
        self.rest = &self.rest[end.len()..];
        loop {
            if let Some(rest) = self.rest.strip_prefix(end) {
                self.rest = rest;
                return Some(());
            }
            match self.next()? {
                '\\' => self.escape(out)?,
                c => out.push(c),
            }
        }
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        Some(c)
    }

    fn escape(&mut self, out: &mut String) -> Option<()> {
        let c = match self.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'b' => '\u{8}',
            'f' => '\u{c}',
            'a' => '\u{7}',
            'v' => '\u{b}',
            '0' => '\0',
            '\n' => return Some(()),
            'x' => self.code(2)?,
            'u' => match self.hex(4)? {
                // JSON's way to write what lies beyond.
                high @ 0xd800..0xdc00 => {
                    self.rest = self.rest.strip_prefix("\\u")?;
                    let low = self
                        .hex(4)?
                        .checked_sub(0xdc00)
                        .filter(|low| *low < 0x400)?;
                    char::from_u32(0x1_0000 + (high - 0xd800) * 0x400 + low)?
                }
                code => char::from_u32(code)?,
            },
            'U' => self.code(8)?,
            c @ ('\\' | '\'' | '"' | '/') => c,
            c => {
                // Python keeps both.
                out.push('\\');
                c
            }
        };
        out.push(c);
        Some(())
    }

    fn code(&mut self, n: usize) -> Option<char> {
        self.hex(n).and_then(char::from_u32)
    }

    fn hex(&mut self, n: usize) -> Option<u32> {
        let digits = self.rest.get(..n)?;
        self.rest = &self.rest[n..];
        let is_hex = digits.bytes().all(|b| b.is_ascii_hexdigit());
        u32::from_str_radix(digits, 16).ok().filter(|_| is_hex)
    }
}
