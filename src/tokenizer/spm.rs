//! SentencePiece encoding as llama.cpp does it: a text starts as its characters, and the neighbours that spell the token
//! of the highest score merge, the leftmost first, until no two spell one. What is no token then is spelled in bytes.
//!
//! A space is U+2581 in the vocabulary. No merge can cross a place where two characters meet that no token holds side by
//! side: the text is cut before each U+2581 where that is so, and the pieces (mostly words) are merged on their own.

use super::cache::WordCache;
use super::index::TextIndex;
use crate::gguf::StringArray;
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// U+2581, the space of SentencePiece vocabularies.
pub(super) const SPACE: &str = "\u{2581}";

/// Pieces with more characters than this merge through a heap; below it, scanning all pairs is faster.
const SHORT: usize = 32;

/// No token.
const NONE: u32 = u32::MAX;

/// The encoder of a SentencePiece vocabulary.
pub(super) struct Spm {
    /// Tokens by spelling; control and byte tokens are not among them.
    tokens: TextIndex,
    scores: Vec<f32>,
    byte_tokens: [u32; 256], // NONE where the vocabulary has none
    /// Characters that some token holds right before U+2581, sorted.
    before_space: Vec<char>,
}

/// Two neighbours that spell a token.
#[derive(Clone, Copy, PartialEq)]
struct Pair {
    score: f32, // never NaN
    left: u32,
    /// The bytes of both: an entry whose neighbours have changed since has another sum.
    len: u32,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_score = self
            .score
            .partial_cmp(&other.score)
            .unwrap_or(Ordering::Equal);
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A run of bytes in the text being merged.
#[derive(Clone, Copy)]
struct Symbol {
    start: u32,
    len: u32, // 0 once merged away
    prev: u32,
    next: u32,
}

/// Room that encoding reuses.
#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Pair>,
}

impl Spm {
    /// `texts`: the spelling of each token. `is_text`: whether a token may be made from text. `byte_of`: the byte that
    /// a byte token stands for. `scores` may be empty.
    pub(super) fn new(
        texts: &StringArray,
        scores: &[f32],
        is_text: impl Fn(u32) -> bool,
        byte_of: impl Fn(u32) -> Option<u8>,
    ) -> Spm {
        let n_tokens = u32::try_from(texts.len()).expect("the number of tokens was checked");
        let mut tokens = TextIndex::with_room_for(texts.len());
        let mut byte_tokens = [NONE; 256];
        let mut before_space = Vec::new();
        for (id, text) in (0..n_tokens).zip(texts.iter()) {
            if let Some(byte) = byte_of(id) {
                byte_tokens[usize::from(byte)] = id;
            } else if is_text(id)
                && let Ok(text) = std::str::from_utf8(text)
            {
                tokens.insert(texts, id);
                for (at, _) in text.match_indices(SPACE) {
                    before_space.extend(text[..at].chars().next_back());
                }
            }
        }
        before_space.sort_unstable();
        before_space.dedup();
        let scores = if scores.is_empty() {
            vec![0.0; texts.len()]
        } else {
            scores.to_vec()
        };
        Spm {
            tokens,
            scores,
            byte_tokens,
            before_space,
        }
    }

    /// Appends the tokens of `text`, with a space put before it if `space_prefix`.
    pub(super) fn encode(
        &self,
        texts: &StringArray,
        text: &str,
        space_prefix: bool,
        out: &mut Vec<u32>,
    ) {
        let mut escaped = String::with_capacity(text.len() + text.len() / 4);
        if space_prefix {
            escaped.push_str(SPACE);
        }
        for (i, part) in text.split(' ').enumerate() {
            if i > 0 {
                escaped.push_str(SPACE);
            }
            escaped.push_str(part);
        }
        let mut scratch = Scratch::default();
        let mut cache = WordCache::for_text(&escaped);
        let mut start = 0;
        let cuts = escaped.match_indices(SPACE).map(|(at, _)| at);
        for at in cuts.chain([escaped.len()]) {
            let before = escaped[..at].chars().next_back();
            let inside = before.is_none_or(|c| self.before_space.binary_search(&c).is_ok());
            if start < at && (!inside || at == escaped.len()) {
                let piece = &escaped[start..at];
                cache.encode(piece.as_bytes(), out, |out| {
                    self.encode_piece(texts, piece, &mut scratch, out)
                });
                start = at;
            }
        }
    }

    /// The token that `text` spells, and its score.
    #[inline]
    fn token(&self, texts: &StringArray, text: &str) -> Option<(u32, f32)> {
        let id = self.tokens.get(texts, text.as_bytes())?;
        Some((id, self.scores[id as usize]))
    }

    fn encode_piece(
        &self,
        texts: &StringArray,
        piece: &str,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        if piece.chars().nth(SHORT).is_none() {
            self.merge_short(texts, piece, out);
        } else {
            self.merge_long(texts, piece, scratch, out);
        }
    }

    /// Appends the token of a symbol, or the tokens of its bytes. A byte without a token is lost.
    fn emit(&self, texts: &StringArray, symbol: &str, out: &mut Vec<u32>) {
        match self.token(texts, symbol) {
            Some((id, _)) => out.push(id),
            None => {
                let ids = symbol.bytes().map(|b| self.byte_tokens[usize::from(b)]);
                out.extend(ids.filter(|&id| id != NONE));
            }
        }
    }

    /// Merges by scanning all pairs for the highest score.
    fn merge_short(&self, texts: &StringArray, piece: &str, out: &mut Vec<u32>) {
        let mut starts = [0usize; SHORT + 1]; // of symbol i; its end is the next start
        let mut scores = [None::<f32>; SHORT]; // of the pair (i, i + 1)
        let mut n = 0;
        for (at, _) in piece.char_indices() {
            starts[n] = at;
            n += 1;
        }
        starts[n] = piece.len();
        let score = |starts: &[usize], i: usize| {
            self.token(texts, &piece[starts[i]..starts[i + 2]])
                .map(|(_, score)| score)
        };
        for (i, pair) in scores[..n - 1].iter_mut().enumerate() {
            *pair = score(&starts, i);
        }
        loop {
            let mut best: Option<(usize, f32)> = None;
            for (i, &score) in scores[..n - 1].iter().enumerate() {
                if let Some(score) = score
                    && best.is_none_or(|(_, highest)| score > highest)
                {
                    best = Some((i, score));
                }
            }
            let Some((at, _)) = best else { break };
            starts.copy_within(at + 2..n + 1, at + 1);
            scores.copy_within(at + 1..n, at);
            n -= 1;
            let changed = at.saturating_sub(1)..(at + 1).min(n - 1);
            for (i, pair) in changed.clone().zip(&mut scores[changed]) {
                *pair = score(&starts, i);
            }
        }
        for i in 0..n {
            self.emit(texts, &piece[starts[i]..starts[i + 1]], out);
        }
    }

    /// Merges through a heap.
    fn merge_long(
        &self,
        texts: &StringArray,
        piece: &str,
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        let Scratch { symbols, heap } = scratch;
        symbols.clear();
        heap.clear();
        for (at, c) in piece.char_indices() {
            let i = symbols.len() as u32;
            symbols.push(Symbol {
                start: at as u32,
                len: c.len_utf8() as u32,
                prev: i.wrapping_sub(1), // NONE for the first
                next: i + 1,
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let text =
            |symbol: Symbol, len: u32| &piece[symbol.start as usize..(symbol.start + len) as usize];
        let push = |symbols: &[Symbol], heap: &mut BinaryHeap<Pair>, left: u32| {
            let symbol = symbols[left as usize];
            if symbol.next == NONE {
                return;
            }
            let len = symbol.len + symbols[symbol.next as usize].len;
            if let Some((_, score)) = self.token(texts, text(symbol, len)) {
                heap.push(Pair { score, left, len });
            }
        };
        for left in 0..symbols.len() as u32 {
            push(symbols, heap, left);
        }
        while let Some(pair) = heap.pop() {
            let symbol = symbols[pair.left as usize];
            if symbol.len == 0 || symbol.next == NONE {
                continue;
            }
            let gone = symbols[symbol.next as usize];
            if symbol.len + gone.len != pair.len {
                continue;
            }
            symbols[symbol.next as usize].len = 0;
            symbols[pair.left as usize].len = pair.len;
            symbols[pair.left as usize].next = gone.next;
            if gone.next != NONE {
                symbols[gone.next as usize].prev = pair.left;
            }
            if symbol.prev != NONE {
                push(symbols, heap, symbol.prev);
            }
            push(symbols, heap, pair.left);
        }
        let mut i = 0;
        while i != NONE {
            let symbol = symbols[i as usize];
            self.emit(texts, text(symbol, symbol.len), out);
            i = symbol.next;
        }
    }
}
