//! Pre-tokenizers: the cut of a text into words before byte-level BPE merges inside each word.
//!
//! Each published pattern is a regular expression; here it is a hand-written scanner with the same result (a test
//! compares them through `fancy-regex`), because the expressions need look-ahead and are ten times slower.
//! `L`, `N`, `S` below are `\p{L}`, `\p{N}`, `\s`; the first alternative that matches wins.

use super::unicode::{Class, Classes, LETTER, NUMBER, PUNCT, SPACE};
use crate::{Error, Result};

/// A published way to cut text into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pretokenizer {
    /// `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nLN]?L+|N{1,k}| ?[^SLN]+[\r\n]*|S*[\r\n]+|S+(?!\S)|S+`
    /// with k = 3 in Llama 3 and LFM2, k = 1 in Qwen 2.
    Llama3 {
        /// k: the longest run of digits that stays one word.
        max_digits: u8,
    },
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?L+| ?N+| ?[^SLN]+|S+(?!\S)|S+`
    Gpt2,
    /// Every `N` is a word; what lies between is cut as in GPT-2.
    Smollm,
    /// llama.cpp's fallback for files that name none: runs of `[\p{P}$+<=>^~|]`, the rest as in GPT-2, then runs of
    /// `N` cut out, then triples of ASCII digits.
    Default,
}

/// `tokenizer.ggml.pre` to pre-tokenizer. Names in one line share their pattern.
/// `true`: a word that is itself a token is taken whole, and a BOS is added unless the file says otherwise.
const NAMES: &[(&[&str], Pretokenizer, bool)] = &[
    (
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "lfm2",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
        ],
        Pretokenizer::Llama3 { max_digits: 3 },
        true,
    ),
    (
        &["dbrx", "smaug-bpe", "chatglm-bpe"],
        Pretokenizer::Llama3 { max_digits: 3 },
        false,
    ),
    (
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "hunyuan",
            "megrez",
            "solar-open",
            "grok-2",
            "kormo",
        ],
        Pretokenizer::Llama3 { max_digits: 1 },
        false,
    ),
    (
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        Pretokenizer::Smollm,
        false,
    ),
    (
        &[
            "gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "exaone4", "trillion", "gigachat",
        ],
        Pretokenizer::Gpt2,
        false,
    ),
    (&["default", ""], Pretokenizer::Default, false),
];

impl Pretokenizer {
    /// The pre-tokenizer that a file names, and whether it belongs to the group that takes whole words (`ignore_merges`)
    /// and adds a BOS.
    pub(super) fn from_name(name: &str) -> Result<(Pretokenizer, bool)> {
        NAMES
            .iter()
            .find(|(names, ..)| names.contains(&name))
            .map(|&(_, pre, whole_words)| (pre, whole_words))
            .ok_or_else(|| Error::Unsupported {
                kind: "pre-tokenizer",
                found: name.to_owned(),
                supported: NAMES
                    .iter()
                    .flat_map(|(names, ..)| names.iter().copied())
                    .filter(|n| !n.is_empty())
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// Calls `word` with each word of `text`, in order; together they are `text`.
    pub(super) fn split<'t>(self, text: &'t str, mut word: impl FnMut(&'t str)) {
        let scan = Scan::new(text);
        match self {
            Pretokenizer::Llama3 { max_digits } => scan.llama3(max_digits, &mut word),
            Pretokenizer::Gpt2 => scan.gpt2(0, text.len(), &mut word),
            Pretokenizer::Smollm => scan.smollm(&mut word),
            Pretokenizer::Default => scan.fallback(&mut word),
        }
    }
}

/// A text and the class table; positions are byte offsets at character boundaries.
struct Scan<'t> {
    text: &'t str,
    classes: &'static Classes,
}

/// The character at a position.
#[derive(Clone, Copy)]
struct At {
    class: Class,
    len: usize,
}

/// What lies past the end: no character, so neither white space nor "none of the classes".
const END: At = At { class: 0, len: 0 };

impl At {
    fn is(self, class: Class) -> bool {
        self.class & class != 0
    }

    /// `[^SLN]`
    fn is_other(self) -> bool {
        self.len > 0 && !self.is(LETTER | NUMBER | SPACE)
    }
}

impl<'t> Scan<'t> {
    fn new(text: &'t str) -> Self {
        Scan {
            text,
            classes: Classes::get(),
        }
    }

    fn byte(&self, pos: usize, end: usize) -> u8 {
        if pos < end {
            self.text.as_bytes()[pos]
        } else {
            0
        }
    }

    #[inline]
    fn at(&self, pos: usize, end: usize) -> At {
        if pos >= end {
            return END;
        }
        let byte = self.text.as_bytes()[pos];
        if byte < 0x80 {
            return At {
                class: self.classes.of(char::from(byte)),
                len: 1,
            };
        }
        match self.text[pos..].chars().next() {
            Some(c) => At {
                class: self.classes.of(c),
                len: c.len_utf8(),
            },
            None => END,
        }
    }

    /// The end of the run of characters from `pos` that are of `class`.
    #[inline]
    fn run(&self, mut pos: usize, end: usize, class: Class) -> usize {
        loop {
            let at = self.at(pos, end);
            if !at.is(class) {
                return pos;
            }
            pos += at.len;
        }
    }

    fn run_of_others(&self, mut pos: usize, end: usize) -> usize {
        loop {
            let at = self.at(pos, end);
            if !at.is_other() {
                return pos;
            }
            pos += at.len;
        }
    }

    /// The length of `'s 't 'm 'd 're 've 'll` at `pos`, else 0.
    fn contraction(&self, pos: usize, end: usize, any_case: bool) -> usize {
        if self.byte(pos, end) != b'\'' {
            return 0;
        }
        let lower = |b: u8| if any_case { b.to_ascii_lowercase() } else { b };
        let first = lower(self.byte(pos + 1, end));
        let second = lower(self.byte(pos + 2, end));
        match (first, second) {
            (b's' | b't' | b'm' | b'd', _) => 2,
            (b'r' | b'v', b'e') | (b'l', b'l') => 3,
            _ => 0,
        }
    }

    /// The end of the word that `S+(?!\S)|S+` takes from the white space at `pos`: a run before a word leaves its last
    /// character to that word.
    fn spaces(&self, pos: usize, end: usize) -> usize {
        let (mut last, mut stop) = (pos, pos);
        loop {
            let at = self.at(stop, end);
            if !at.is(SPACE) {
                break;
            }
            last = stop;
            stop += at.len;
        }
        if last > pos && stop < end { last } else { stop }
    }

    fn llama3(&self, max_digits: u8, word: &mut impl FnMut(&'t str)) {
        let end = self.text.len();
        let mut start = 0;
        while start < end {
            let stop = self.llama3_word(start, end, max_digits);
            word(&self.text[start..stop]);
            start = stop;
        }
    }

    #[inline]
    fn llama3_word(&self, start: usize, end: usize, max_digits: u8) -> usize {
        let first = self.at(start, end);
        let byte = self.byte(start, end);
        let next = start + first.len;
        if first.is(LETTER) {
            return self.run(next, end, LETTER);
        }
        if byte == b'\'' {
            let len = self.contraction(start, end, true);
            if len > 0 {
                return start + len;
            }
        }
        if first.is(NUMBER) {
            let mut stop = next;
            for _ in 1..max_digits {
                let at = self.at(stop, end);
                if !at.is(NUMBER) {
                    break;
                }
                stop += at.len;
            }
            return stop;
        }
        if byte != b'\r' && byte != b'\n' && self.at(next, end).is(LETTER) {
            return self.run(next, end, LETTER);
        }
        let others = if byte == b' ' { next } else { start };
        if self.at(others, end).is_other() {
            let mut stop = self.run_of_others(others, end);
            while matches!(self.byte(stop, end), b'\r' | b'\n') {
                stop += 1;
            }
            return stop;
        }
        // Only white space is left: up to the last line break of the run, if there is one.
        let run = &self.text[start..self.run(start, end, SPACE)];
        match run.rfind(['\r', '\n']) {
            Some(line_break) => start + line_break + 1,
            None => self.spaces(start, end),
        }
    }

    fn gpt2(&self, mut start: usize, end: usize, word: &mut impl FnMut(&'t str)) {
        while start < end {
            let stop = self.gpt2_word(start, end);
            word(&self.text[start..stop]);
            start = stop;
        }
    }

    #[inline]
    fn gpt2_word(&self, start: usize, end: usize) -> usize {
        let len = self.contraction(start, end, false);
        if len > 0 {
            return start + len;
        }
        let body = start + usize::from(self.byte(start, end) == b' ');
        let at = self.at(body, end);
        if at.is(LETTER) {
            self.run(body + at.len, end, LETTER)
        } else if at.is(NUMBER) {
            self.run(body + at.len, end, NUMBER)
        } else if at.is_other() {
            self.run_of_others(body + at.len, end)
        } else {
            self.spaces(start, end)
        }
    }

    fn smollm(&self, word: &mut impl FnMut(&'t str)) {
        let mut start = 0;
        let mut pos = 0;
        while pos < self.text.len() {
            let at = self.at(pos, self.text.len());
            if at.is(NUMBER) {
                self.gpt2(start, pos, word);
                word(&self.text[pos..pos + at.len]);
                start = pos + at.len;
            }
            pos += at.len;
        }
        self.gpt2(start, self.text.len(), word);
    }

    fn fallback(&self, word: &mut impl FnMut(&'t str)) {
        let is_mark = |at: At, pos| {
            at.is(PUNCT)
                || matches!(
                    self.byte(pos, pos + 1),
                    b'$' | b'+' | b'<' | b'=' | b'>' | b'^' | b'~' | b'|'
                )
        };
        let end = self.text.len();
        let mut start = 0;
        while start < end {
            let marks = is_mark(self.at(start, end), start);
            let mut stop = start;
            while stop < end {
                let at = self.at(stop, end);
                if is_mark(at, stop) != marks {
                    break;
                }
                stop += at.len;
            }
            if marks {
                word(&self.text[start..stop]);
            } else {
                self.gpt2(start, stop, &mut |w| self.cut_digits(w, word));
            }
            start = stop;
        }
    }

    /// Runs of `N` cut out of `text`, and triples of ASCII digits out of these.
    fn cut_digits(&self, text: &'t str, word: &mut impl FnMut(&'t str)) {
        let scan = Scan {
            text,
            classes: self.classes,
        };
        let end = text.len();
        let mut start = 0;
        while start < end {
            let numbers = scan.at(start, end).is(NUMBER);
            let mut stop = start;
            while stop < end && scan.at(stop, end).is(NUMBER) == numbers {
                stop += scan.at(stop, end).len;
            }
            let (mut from, mut pos) = (start, start);
            while numbers && pos + 3 <= stop {
                if text.as_bytes()[pos..pos + 3].iter().all(u8::is_ascii_digit) {
                    if from < pos {
                        word(&text[from..pos]);
                    }
                    word(&text[pos..pos + 3]);
                    pos += 3;
                    from = pos;
                } else {
                    pos += scan.at(pos, end).len;
                }
            }
            if from < stop {
                word(&text[from..stop]);
            }
            start = stop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fancy_regex::Regex;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    /// The published expressions, and what they mean to the scanners.
    fn patterns() -> Vec<(Pretokenizer, Vec<Regex>)> {
        let llama3 = |digits: &str| {
            format!(
                r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            )
        };
        let gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
        let all = |sources: &[&str]| sources.iter().map(|s| Regex::new(s).unwrap()).collect();
        vec![
            (
                Pretokenizer::Llama3 { max_digits: 3 },
                all(&[&llama3("{1,3}")]),
            ),
            (Pretokenizer::Llama3 { max_digits: 1 }, all(&[&llama3("")])),
            (Pretokenizer::Gpt2, all(&[gpt2])),
            (Pretokenizer::Smollm, all(&[r"\p{N}", gpt2])),
            (
                Pretokenizer::Default,
                all(&[r"[\p{P}$+<=>^~|]+", gpt2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
            ),
        ]
    }

    /// Every pattern cuts each piece of the one before it; what it does not match stays as it is.
    fn by_patterns<'t>(text: &'t str, patterns: &[Regex]) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for pattern in patterns {
            let mut next = Vec::new();
            for piece in pieces {
                let mut end = 0;
                for found in pattern.find_iter(piece) {
                    let found = found.unwrap();
                    next.push(&piece[end..found.start()]);
                    next.push(found.as_str());
                    end = found.end();
                }
                next.push(&piece[end..]);
            }
            next.retain(|p| !p.is_empty());
            pieces = next;
        }
        pieces
    }

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        let err = Pretokenizer::from_name("kimi-k2").unwrap_err().to_string();
        assert!(
            err.contains("pre-tokenizer `kimi-k2`") && err.contains("lfm2"),
            "{err}"
        );
        let (lfm2, whole_words) = Pretokenizer::from_name("lfm2").unwrap();
        assert_eq!(
            (lfm2, whole_words),
            (Pretokenizer::Llama3 { max_digits: 3 }, true)
        );
    }

    #[test]
    fn words_of_known_texts() {
        let words = |pre: &str, text| {
            let mut words = Vec::new();
            Pretokenizer::from_name(pre)
                .unwrap()
                .0
                .split(text, |w| words.push(w));
            words
        };
        assert_eq!(
            words("lfm2", "It'S 12345  days\n\n"),
            ["It", "'S", " ", "123", "45", " ", " days", "\n\n"]
        );
        assert_eq!(
            words("qwen2", "a=10;\n  b"),
            ["a", "=", "1", "0", ";\n", " ", " b"]
        );
        assert_eq!(words("smollm", "x  42 y"), ["x", "  ", "4", "2", " y"]);
        assert_eq!(
            words("gpt-2", "it's 2024!  "),
            ["it", "'s", " 2024", "!", "  "]
        );
        assert_eq!(
            words("default", "$1234.5 a"),
            ["$", "123", "4", ".", "5", " a"]
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            max_global_rejects: 40_000,
            ..ProptestConfig::with_cases(4000)
        })]
        #[test]
        fn scanners_equal_their_patterns(
            text in prop_oneof![
                "[ \\n\\r\\ta-cR'sTlLvVeEmd0-9!<|é\u{a0}\u{3000}٣字]{0,40}",
                "\\PC{0,40}",
                "[\\s\\d'.,$+<=>~^|A-Za-z]{0,40}",
            ]
        ) {
            // The expressions know a newer Unicode than the tables.
            static NEWER: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[^\p{age=15.1}]").unwrap());
            static PATTERNS: LazyLock<Vec<(Pretokenizer, Vec<Regex>)>> = LazyLock::new(patterns);
            let text = NEWER.replace_all(&text, "");
            for (pre, patterns) in PATTERNS.iter() {
                let mut words = Vec::new();
                pre.split(&text, |w| words.push(w));
                prop_assert_eq!(&words, &by_patterns(&text, patterns), "{:?}", pre);
            }
        }
    }
}
