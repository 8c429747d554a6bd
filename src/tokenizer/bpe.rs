//! Byte-level byte pair encoding: a word starts as its bytes, and the neighbours of the lowest rank merge, the leftmost
//! first, until no pair is in the list of merges.
//!
//! Vocabularies spell bytes as printable characters (GPT-2's table); everything here is in raw bytes. Symbols are
//! *pieces*: token ids, and above these the few intermediate results of merges that are no tokens themselves.

use super::cache::WordCache;
use super::index::{Merge, MergeIndex, TextIndex};
use super::pretokenize::Pretokenizer;
use super::vocab::bad;
use crate::gguf::StringArray;
use crate::{Cancel, Result};
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Words longer than this many bytes merge through a heap; below it, scanning all pairs is faster.
const SHORT_WORD: usize = 40;

/// The byte that each of GPT-2's printable characters stands for.
pub(super) fn byte_of_char(c: char) -> Option<u8> {
    let c = u32::from(c);
    match c {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(c).ok(),
        // The bytes that are not printable, in order, are U+0100 and what follows.
        0x100..=0x120 => u8::try_from(c - 0x100).ok(),
        0x121..=0x142 => u8::try_from(c - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// Appends the bytes that a spelling stands for; false if a character is outside GPT-2's table.
pub(super) fn decode_to(text: &[u8], out: &mut Vec<u8>) -> bool {
    let Ok(text) = std::str::from_utf8(text) else {
        return false;
    };
    text.chars()
        .all(|c| byte_of_char(c).map(|byte| out.push(byte)).is_some())
}

/// The pieces of a merge.
enum Pieces {
    /// They cannot occur.
    Never,
    /// Left, right, merged: all of them tokens.
    Tokens(u32, u32, u32),
    /// One at least is no token: what both spell, cut here.
    Inner(usize, Vec<u8>),
}

/// The encoder of a byte-level vocabulary.
pub(super) struct Bpe {
    pretokenizer: Pretokenizer,
    /// A word that is itself a token is taken whole (`ignore_merges`).
    whole_words: bool,
    /// Tokens by their bytes; control tokens are not among them.
    tokens: TextIndex,
    merges: MergeIndex,
    byte_pieces: [u32; 256],
    n_tokens: u32,
    /// The bytes of the pieces from `n_tokens` on.
    inner: StringArray,
}

/// A symbol of the word being merged.
#[derive(Clone, Copy)]
struct Symbol {
    piece: u32,
    /// The merge with the symbol after it.
    rank: u32,
    merged: u32,
    prev: u32,
    next: u32,
}

/// Room that encoding reuses from word to word.
#[derive(Default)]
struct Scratch {
    symbols: Vec<Symbol>,
    heap: BinaryHeap<Reverse<(u32, u32)>>, // (rank, position)
}

impl Bpe {
    /// `pairs`: pairs of spellings, highest priority first. `bytes`: what each token stands for. `is_text`: whether a
    /// token may be made from text.
    pub(super) fn new(
        pairs: &StringArray,
        bytes: &StringArray,
        is_text: impl Fn(u32) -> bool,
        pretokenizer: Pretokenizer,
        whole_words: bool,
        cancel: &Cancel,
    ) -> Result<Bpe> {
        let n_tokens = u32::try_from(bytes.len()).expect("the number of tokens was checked");
        let mut tokens = TextIndex::with_room_for(bytes.len());
        for id in (0..n_tokens).filter(|&id| is_text(id)) {
            tokens.insert(bytes, id);
        }
        let mut inner = StringArray::default();
        let mut inner_ids: HashMap<Vec<u8>, u32> = HashMap::new();
        let mut piece_of = |text: &[u8]| -> Result<u32> {
            if let Some(id) = tokens
                .get(bytes, text)
                .or_else(|| inner_ids.get(text).copied())
            {
                return Ok(id);
            }
            let id = n_tokens + u32::try_from(inner.len()).expect("at most three for each merge");
            inner.push(text)?;
            inner_ids.insert(text.to_vec(), id);
            Ok(id)
        };
        let mut byte_pieces = [0; 256];
        for (byte, piece) in (0..=255).zip(&mut byte_pieces) {
            *piece = piece_of(&[byte])?;
        }
        // Looking the pieces up is most of the work, and can be done on all cores; nearly all of them are tokens.
        let halves = (0..pairs.len()).into_par_iter();
        let known = halves.map_init(Vec::new, |merged: &mut Vec<u8>, rank| {
            cancel.check()?;
            let merge = pairs.get(rank).expect("a rank is an index");
            // A space that separates is not the first character.
            let Some(at) = merge.iter().skip(1).position(|&b| b == b' ') else {
                return bad(format!(
                    "tokenizer.ggml.merges: entry {rank}: expected two pieces separated by a space, found `{}`",
                    String::from_utf8_lossy(merge)
                ));
            };
            merged.clear();
            let is_spelled = decode_to(&merge[..at + 1], merged);
            let middle = merged.len();
            // A piece outside the alphabet, or an empty one, never occurs in a word.
            if !is_spelled || !decode_to(&merge[at + 2..], merged) || middle == merged.len() {
                return Ok(Pieces::Never);
            }
            let ids = [&merged[..middle], &merged[middle..], &merged[..]].map(|p| tokens.get(bytes, p));
            Ok(match ids {
                [Some(left), Some(right), Some(merged)] => Pieces::Tokens(left, right, merged),
                _ => Pieces::Inner(middle, merged.clone()),
            })
        });
        let known: Vec<Pieces> = known.collect::<Result<_>>()?;
        let mut merges = MergeIndex::with_room_for(pairs.len());
        for (rank, pieces) in (0u32..).zip(known) {
            cancel.check()?;
            match pieces {
                Pieces::Never => {}
                Pieces::Tokens(left, right, merged) => merges.insert(left, right, rank, merged),
                Pieces::Inner(middle, merged) => {
                    let (left, right) =
                        (piece_of(&merged[..middle])?, piece_of(&merged[middle..])?);
                    merges.insert(left, right, rank, piece_of(&merged)?);
                }
            }
        }
        Ok(Bpe {
            pretokenizer,
            whole_words,
            tokens,
            merges,
            byte_pieces,
            n_tokens,
            inner,
        })
    }

    /// Appends the tokens of `text`. `bytes` as given to [`Bpe::new`].
    pub(super) fn encode<'t>(
        &self,
        bytes: &StringArray,
        text: &'t str,
        cache: &mut WordCache<'t>,
        out: &mut Vec<u32>,
    ) {
        let mut scratch = Scratch::default();
        self.pretokenizer.split(text, |word| {
            let word = word.as_bytes();
            cache.encode(word, out, |out| {
                self.encode_word(bytes, word, &mut scratch, out)
            });
        });
    }

    fn encode_word(
        &self,
        bytes: &StringArray,
        word: &[u8],
        scratch: &mut Scratch,
        out: &mut Vec<u32>,
    ) {
        if let [byte] = word {
            return self.emit(self.byte_pieces[usize::from(*byte)], out);
        }
        if self.whole_words
            && let Some(id) = self.tokens.get(bytes, word)
        {
            return out.push(id);
        }
        if word.len() <= SHORT_WORD {
            self.merge_short(word, out);
        } else {
            self.merge_long(word, scratch, out);
        }
    }

    /// Appends a piece: a token, or what can be said of it byte by byte. A byte that the vocabulary has no token for
    /// is lost, as in llama.cpp: the unknown token may be a control token.
    fn emit(&self, piece: u32, out: &mut Vec<u32>) {
        if piece < self.n_tokens {
            return out.push(piece);
        }
        let text = self
            .inner
            .get((piece - self.n_tokens) as usize)
            .unwrap_or_default();
        let tokens = text.iter().map(|&b| self.byte_pieces[usize::from(b)]);
        out.extend(tokens.filter(|&id| id < self.n_tokens));
    }

    /// Merges by scanning all pairs for the lowest rank.
    fn merge_short(&self, word: &[u8], out: &mut Vec<u32>) {
        let mut pieces = [0u32; SHORT_WORD];
        let mut ranks = [Merge::NONE; SHORT_WORD]; // of the pair (i, i + 1)
        let mut merged = [0u32; SHORT_WORD];
        let mut n = word.len();
        for (piece, &byte) in pieces.iter_mut().zip(word) {
            *piece = self.byte_pieces[usize::from(byte)];
        }
        for i in 0..n - 1 {
            let merge = self.merges.get(pieces[i], pieces[i + 1]);
            (ranks[i], merged[i]) = (merge.rank, merge.piece);
        }
        loop {
            let (mut at, mut rank) = (0, Merge::NONE);
            for (i, &r) in ranks[..n - 1].iter().enumerate() {
                if r < rank {
                    (at, rank) = (i, r);
                }
            }
            if rank == Merge::NONE {
                break;
            }
            pieces[at] = merged[at];
            pieces.copy_within(at + 2..n, at + 1);
            ranks.copy_within(at + 1..n, at);
            merged.copy_within(at + 1..n, at);
            n -= 1;
            ranks[n - 1] = Merge::NONE;
            for i in at.saturating_sub(1)..(at + 1).min(n - 1) {
                let merge = self.merges.get(pieces[i], pieces[i + 1]);
                (ranks[i], merged[i]) = (merge.rank, merge.piece);
            }
        }
        for &piece in &pieces[..n] {
            self.emit(piece, out);
        }
    }

    /// Merges through a heap of pairs; an entry whose pair has changed since is skipped.
    fn merge_long(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        const NO: u32 = u32::MAX;
        let Scratch { symbols, heap } = scratch;
        symbols.clear();
        heap.clear();
        let n = word.len() as u32;
        symbols.extend((0u32..).zip(word).map(|(i, &byte)| Symbol {
            piece: self.byte_pieces[usize::from(byte)],
            rank: Merge::NONE,
            merged: 0,
            prev: i.wrapping_sub(1), // NO for the first
            next: if i + 1 == n { NO } else { i + 1 },
        }));
        let update = |symbols: &mut [Symbol], heap: &mut BinaryHeap<_>, i: u32| {
            let symbol = symbols[i as usize];
            let mut rank = Merge::NONE;
            if symbol.next != NO {
                let merge = self
                    .merges
                    .get(symbol.piece, symbols[symbol.next as usize].piece);
                symbols[i as usize].merged = merge.piece;
                rank = merge.rank;
            }
            symbols[i as usize].rank = rank;
            if rank != Merge::NONE {
                heap.push(Reverse((rank, i)));
            }
        };
        for i in 0..n {
            update(symbols, heap, i);
        }
        while let Some(Reverse((rank, i))) = heap.pop() {
            let symbol = symbols[i as usize];
            // Equal ranks are equal pairs. A symbol that was merged away has no rank.
            if symbol.rank != rank {
                continue;
            }
            let next = symbols[symbol.next as usize].next;
            symbols[symbol.next as usize].rank = Merge::NONE;
            symbols[i as usize].piece = symbol.merged;
            symbols[i as usize].next = next;
            if next != NO {
                symbols[next as usize].prev = i;
            }
            update(symbols, heap, i);
            if symbol.prev != NO {
                update(symbols, heap, symbol.prev);
            }
        }
        let mut i = 0;
        while i != NO {
            let symbol = symbols[i as usize];
            self.emit(symbol.piece, out);
            i = symbol.next;
        }
    }
}
