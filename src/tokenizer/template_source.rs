//! The source of a chat template, taken apart far enough to know which of its characters are literal text.
//!
//! Control tokens that the template spells out are replaced by one private character each before it is compiled. What a
//! user says never holds these characters, so in the rendered prompt they and nothing else are control tokens. A literal
//! that only tests or splits what a user said (`'</think>' in content`) must stay as it is to find anything.

use super::special::{Part, Specials};
use std::ops::Range;

/// Methods and filters whose first argument is looked for in a text.
const SEARCHES: &[&str] = &[
    "split",
    "rsplit",
    "startswith",
    "endswith",
    "find",
    "rfind",
    "index",
    "rindex",
    "count",
    "partition",
    "rpartition",
    "removeprefix",
    "removesuffix",
    "strip",
    "lstrip",
    "rstrip",
    "replace",
];

/// Where in a template a piece of it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Syntax.
    Code,
    /// Text between blocks, or a string inside `{{ }}`.
    Output,
    /// A string inside `{% %}`.
    Statement,
    /// A string that something is compared with or searched for.
    Tested,
}

/// A template cut into pieces that together are its source.
pub(super) struct TemplateSource {
    pieces: Vec<(String, Place)>,
}

/// A token inside a block, as far as it matters here.
#[derive(Clone, Copy, PartialEq)]
enum Token<'s> {
    Name(&'s str),
    Text,
    Mark(u8),
    /// `==`, `!=`, `<=`, `>=`
    Compare,
}

/// An open bracket.
struct Bracket {
    /// The first argument of a search, or the right side of `in`.
    tests: bool,
    /// Whether what follows a comma is tested too.
    tests_all: bool,
}

impl TemplateSource {
    /// Takes a template apart. `{% generation %}` tags, which only mark what a model is trained on, become a condition
    /// that always holds. What is no valid template stays so.
    pub(super) fn parse(source: &str) -> TemplateSource {
        let mut parsed = TemplateSource { pieces: Vec::new() };
        let mut rest = source;
        while let Some((text, start, kind)) = next_block(rest) {
            parsed.add(text, Place::Output);
            rest = &rest[start..];
            if kind == b'#' {
                let end = rest.find("#}").map_or(rest.len(), |at| at + 2);
                parsed.add(&rest[..end], Place::Code);
                rest = &rest[end..];
                continue;
            }
            let end = parsed.block(rest, kind);
            let (block, after) = rest.split_at(end);
            rest = after;
            if kind == b'%' && block_name(block) == "raw" {
                // Nothing in it is syntax up to the tag that ends it.
                let raw = raw_end(rest);
                parsed.add(&rest[..raw], Place::Output);
                rest = &rest[raw..];
            }
        }
        parsed.add(rest, Place::Output);
        parsed
    }

    /// The source, with each text of `controls` replaced by its sentinel in the pieces that `replace` accepts. The ids of
    /// `controls` are indices into `texts`, its texts, and into `sentinels`.
    pub(super) fn instantiate(
        &self,
        controls: &Specials,
        texts: &[String],
        sentinels: &[char],
        replace: impl Fn(&str, Place) -> bool,
    ) -> String {
        let mut source = String::new();
        for (piece, place) in &self.pieces {
            if *place == Place::Code {
                source.push_str(piece);
                continue;
            }
            controls.split(piece, |part| match part {
                Part::Text(text) => source.push_str(text),
                Part::Token(idx) => match texts[idx as usize].as_str() {
                    text if replace(text, *place) => source.push(sentinels[idx as usize]),
                    text => source.push_str(text),
                },
            });
        }
        source
    }

    fn add(&mut self, text: &str, place: Place) {
        if !text.is_empty() {
            self.pieces.push((text.to_owned(), place));
        }
    }

    /// Takes the block apart that `source` starts with; returns its length.
    fn block(&mut self, source: &str, kind: u8) -> usize {
        let name = block_name(source);
        if kind == b'%' && matches!(name, "generation" | "endgeneration") {
            let end = source.find("%}").map_or(source.len(), |at| at + 2);
            let condition = if name == "generation" {
                "if true"
            } else {
                "endif"
            };
            self.add(&source[..end].replacen(name, condition, 1), Place::Code);
            return end;
        }
        let close = if kind == b'{' { "}}" } else { "%}" };
        let place = if kind == b'{' {
            Place::Output
        } else {
            Place::Statement
        };
        let (tokens, end) = tokens(source, close);
        let mut brackets: Vec<Bracket> = Vec::new();
        let mut done = 0;
        for (i, (token, at)) in tokens.iter().enumerate() {
            let before = |n: usize| i.checked_sub(n).map(|i| tokens[i].0);
            let after = |n: usize| tokens.get(i + n).map(|t| t.0);
            match token {
                Token::Mark(b'(' | b'[' | b'{') => {
                    let tests_all = before(1) == Some(Token::Name("in"));
                    let searches = matches!(before(1), Some(Token::Name(name)) if SEARCHES.contains(&name))
                        && matches!(before(2), Some(Token::Mark(b'.' | b'|')));
                    brackets.push(Bracket {
                        tests: tests_all || searches,
                        tests_all,
                    });
                }
                Token::Mark(b')' | b']' | b'}') => {
                    brackets.pop();
                }
                Token::Mark(b',') => {
                    if let Some(bracket) = brackets.last_mut() {
                        bracket.tests = bracket.tests_all;
                    }
                }
                Token::Text => {
                    let compared = |token| {
                        matches!(
                            token,
                            Some(Token::Compare | Token::Name("in") | Token::Mark(b'<' | b'>'))
                        )
                    };
                    let tested = brackets.last().is_some_and(|b| b.tests)
                        || compared(before(1))
                        || compared(after(1))
                        || (after(1) == Some(Token::Name("not"))
                            && after(2) == Some(Token::Name("in")));
                    self.add(&source[done..at.start], Place::Code);
                    self.add(
                        &source[at.clone()],
                        if tested { Place::Tested } else { place },
                    );
                    done = at.end;
                }
                _ => {}
            }
        }
        self.add(&source[done..end], Place::Code);
        end
    }
}

/// The text before the next block, where the block starts, and its kind: `{`, `%` or `#`.
fn next_block(source: &str) -> Option<(&str, usize, u8)> {
    let bytes = source.as_bytes();
    let at = bytes
        .windows(2)
        .position(|w| w[0] == b'{' && matches!(w[1], b'{' | b'%' | b'#'))?;
    Some((&source[..at], at, bytes[at + 1]))
}

/// The first name in a block.
fn block_name(block: &str) -> &str {
    let block = block.get(2..).unwrap_or_default();
    let block = block.trim_start_matches(['-', '+']).trim_start();
    let end = block
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(block.len());
    &block[..end]
}

/// How far a raw block reaches: up to the tag that ends it.
fn raw_end(source: &str) -> usize {
    let mut from = 0;
    while let Some(at) = source[from..].find("{%") {
        let at = from + at;
        if block_name(&source[at..]) == "endraw" {
            return at;
        }
        from = at + 2;
    }
    source.len()
}

/// The tokens of the block that `source` starts with, and the length of the block.
fn tokens<'s>(source: &'s str, close: &str) -> (Vec<(Token<'s>, Range<usize>)>, usize) {
    let bytes = source.as_bytes();
    let mut tokens = Vec::new();
    let mut braces = 0usize;
    let mut pos = 2;
    while pos < bytes.len() {
        let byte = bytes[pos];
        if braces == 0 && bytes[pos..].starts_with(close.as_bytes()) {
            return (tokens, pos + 2);
        }
        let start = pos;
        let token = match byte {
            b'"' | b'\'' => {
                pos += 1;
                while pos < bytes.len() && bytes[pos] != byte {
                    pos += if bytes[pos] == b'\\' { 2 } else { 1 };
                }
                pos = (pos + 1).min(bytes.len());
                Token::Text
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                while pos < bytes.len()
                    && (bytes[pos] == b'_' || bytes[pos].is_ascii_alphanumeric())
                {
                    pos += 1;
                }
                Token::Name(&source[start..pos])
            }
            b'=' | b'!' | b'<' | b'>' if bytes.get(pos + 1) == Some(&b'=') => {
                pos += 2;
                Token::Compare
            }
            _ => {
                pos += 1;
                match byte {
                    b'{' => braces += 1,
                    b'}' => braces = braces.saturating_sub(1),
                    _ => {}
                }
                if byte.is_ascii_whitespace() {
                    continue;
                }
                Token::Mark(byte)
            }
        };
        tokens.push((token, start..pos));
    }
    (tokens, bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The literals of a template and their places.
    fn literals(source: &str) -> Vec<(String, Place)> {
        let parsed = TemplateSource::parse(source);
        let whole: String = parsed.pieces.iter().map(|(text, _)| &**text).collect();
        assert_eq!(whole, source);
        parsed
            .pieces
            .into_iter()
            .filter(|(_, place)| *place != Place::Code)
            .collect()
    }

    #[test]
    fn literals_know_their_places() {
        use Place::{Output, Statement, Tested};
        for (source, expected) in [
            (
                "a{{ 'b' + x }}c",
                vec![("a", Output), ("'b'", Output), ("c", Output)],
            ),
            ("{%- set x = \"<e>\" -%}", vec![("\"<e>\"", Statement)]),
            ("{% if '<e>' in x %}", vec![("'<e>'", Tested)]),
            ("{% if '<e>' not in x %}", vec![("'<e>'", Tested)]),
            (
                "{% if x in ['<e>', '<f>'] %}",
                vec![("'<e>'", Tested), ("'<f>'", Tested)],
            ),
            ("{% if x == '<e>' %}", vec![("'<e>'", Tested)]),
            (
                "{{ x.split('<e>')[-1] + '<f>' }}",
                vec![("'<e>'", Tested), ("'<f>'", Output)],
            ),
            (
                "{{ x | replace('<e>', '<f>') }}",
                vec![("'<e>'", Tested), ("'<f>'", Output)],
            ),
            ("{{ macro('<e>') }}", vec![("'<e>'", Output)]),
            (
                "{{ {'k': '}}'} }}b",
                vec![("'k'", Output), ("'}}'", Output), ("b", Output)],
            ),
            ("{{ 'it\\'s' }}é", vec![("'it\\'s'", Output), ("é", Output)]),
            ("{# it's #}a", vec![("a", Output)]),
            (
                "{% raw %}{{ it's }}{% endraw %}b",
                vec![("{{ it's }}", Output), ("b", Output)],
            ),
            ("{{ 'open", vec![("'open", Output)]),
        ] {
            let expected: Vec<(String, Place)> = expected
                .into_iter()
                .map(|(t, p)| (t.to_owned(), p))
                .collect();
            assert_eq!(literals(source), expected, "{source}");
        }
    }

    #[test]
    fn sentinels_replace_control_tokens_in_literals_only() {
        let texts = ["<e>".to_owned(), "x".to_owned()];
        let controls = Specials::new(texts.iter().cloned().zip(0..));
        let source = TemplateSource::parse("<e>{{ x + '<e>x' if '<e>' in x }}");
        let with = source.instantiate(&controls, &texts, &['1', '2'], |_, place| {
            place != Place::Tested
        });
        assert_eq!(with, "1{{ x + '12' if '<e>' in x }}");
    }

    #[test]
    fn generation_tags_become_a_condition() {
        let source = TemplateSource::parse("a\n{%- generation -%}\nb{% endgeneration %}");
        let source = source.instantiate(&Specials::default(), &[], &[], |_, _| true);
        assert_eq!(source, "a\n{%- if true -%}\nb{% endif %}");
    }
}
