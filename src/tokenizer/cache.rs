//! What the words of one text became, so that a word that comes again is not merged again.

use super::index::hash_bytes;

/// Texts up to this many bytes are not worth a table.
const MIN_TEXT: usize = 512;
/// Longer words seldom come again.
const MAX_WORD: usize = 64;
const SLOTS: usize = 4096; // a power of two

/// Words of one text and where their tokens lie in the output. A new word takes the slot of an old one.
pub(super) struct WordCache<'t> {
    slots: Vec<(&'t [u8], u32, u32)>, // empty if the text is short
}

impl<'t> WordCache<'t> {
    /// A cache for one encoding of `text`.
    pub(super) fn for_text(text: &str) -> Self {
        WordCache {
            slots: vec![(&[], 0, 0); if text.len() > MIN_TEXT { SLOTS } else { 0 }],
        }
    }

    /// Appends to `out` what `encode` appends for this word. All calls share one `out`, which only grows.
    #[inline]
    pub(super) fn encode(
        &mut self,
        word: &'t [u8],
        out: &mut Vec<u32>,
        encode: impl FnOnce(&mut Vec<u32>),
    ) {
        if self.slots.is_empty() || word.len() > MAX_WORD {
            return encode(out);
        }
        let slot = hash_bytes(0, word) as usize & (SLOTS - 1);
        let (known, start, end) = self.slots[slot];
        if known == word {
            return out.extend_from_within(start as usize..end as usize);
        }
        let start = out.len();
        encode(out);
        if let (Ok(start), Ok(end)) = (u32::try_from(start), u32::try_from(out.len())) {
            self.slots[slot] = (word, start, end);
        }
    }
}
