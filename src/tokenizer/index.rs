//! Hash tables of the tokenizer: token by spelling, merge by pair. Open addressing over ids, because the spellings
//! already lie in one allocation: 8 bytes a token instead of the 60 of a `HashMap` with owned keys.
//!
//! Hashes are seeded by the process, so a file cannot be built to collide.

use crate::gguf::StringArray;
use std::hash::{BuildHasher, RandomState};

const EMPTY: u32 = u32::MAX;

/// Ids by spelling.
pub(super) struct TextIndex {
    slots: Box<[u32]>, // a power of two; EMPTY or an id
    seed: u64,
}

impl TextIndex {
    /// A table for up to `n` ids.
    pub(super) fn with_room_for(n: usize) -> Self {
        TextIndex {
            slots: vec![EMPTY; (n + n / 2 + 1).next_power_of_two()].into(),
            seed: RandomState::new().hash_one(0),
        }
    }

    /// Enters `id`, whose spelling is `texts[id]`. Returns the id that is spelled alike, if there is one already.
    pub(super) fn insert(&mut self, texts: &StringArray, id: u32) -> Option<u32> {
        let text = texts.get(id as usize)?;
        let slot = match self.find(texts, text) {
            Ok(there) => return Some(there),
            Err(slot) => slot,
        };
        self.slots[slot] = id;
        None
    }

    /// The id spelled `text`.
    #[inline]
    pub(super) fn get(&self, texts: &StringArray, text: &[u8]) -> Option<u32> {
        self.find(texts, text).ok()
    }

    /// The id spelled `text`, or the free slot where it would be.
    #[inline]
    fn find(&self, texts: &StringArray, text: &[u8]) -> Result<u32, usize> {
        let mask = self.slots.len() - 1;
        let mut slot = hash_bytes(self.seed, text) as usize & mask;
        loop {
            let id = self.slots[slot];
            if id == EMPTY {
                return Err(slot);
            }
            if texts.get(id as usize) == Some(text) {
                return Ok(id);
            }
            slot = (slot + 1) & mask;
        }
    }
}

/// What two neighbours become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Merge {
    left: u32,
    right: u32,
    /// Lower merges first; never [`Merge::NONE`].
    pub(super) rank: u32,
    /// The piece they become.
    pub(super) piece: u32,
}

impl Merge {
    /// The rank of a pair that does not merge: above every real one.
    pub(super) const NONE: u32 = u32::MAX;
}

/// Merges by pair of pieces.
pub(super) struct MergeIndex {
    slots: Box<[Merge]>, // a power of two; free where rank is NONE
    seed: u64,
}

impl MergeIndex {
    /// A table for up to `n` merges.
    pub(super) fn with_room_for(n: usize) -> Self {
        let free = Merge {
            left: 0,
            right: 0,
            rank: Merge::NONE,
            piece: 0,
        };
        MergeIndex {
            slots: vec![free; (n + n / 2 + 1).next_power_of_two()].into(),
            seed: RandomState::new().hash_one(1),
        }
    }

    /// Enters a merge; of two for the same pair the first stays.
    pub(super) fn insert(&mut self, left: u32, right: u32, rank: u32, piece: u32) {
        let slot = self.slot(left, right);
        if self.slots[slot].rank == Merge::NONE {
            self.slots[slot] = Merge {
                left,
                right,
                rank,
                piece,
            };
        }
    }

    /// The merge of `left` and `right`; its rank is [`Merge::NONE`] if there is none.
    #[inline]
    pub(super) fn get(&self, left: u32, right: u32) -> Merge {
        self.slots[self.slot(left, right)]
    }

    /// The slot of the pair, or the free one where it would be.
    #[inline]
    fn slot(&self, left: u32, right: u32) -> usize {
        let mask = self.slots.len() - 1;
        let key = u64::from(left) << 32 | u64::from(right);
        let mut slot = mix(key ^ self.seed, MULTIPLIER) as usize & mask;
        loop {
            let merge = self.slots[slot];
            if merge.rank == Merge::NONE || (merge.left == left && merge.right == right) {
                return slot;
            }
            slot = (slot + 1) & mask;
        }
    }
}

/// An odd number without pattern: the fractional part of the golden ratio.
const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

/// Both halves of the 128-bit product, folded.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// A hash of a short string, eight bytes at a time.
#[inline]
pub(super) fn hash_bytes(seed: u64, text: &[u8]) -> u64 {
    let mut hash = seed ^ text.len() as u64;
    let (words, rest) = text.as_chunks::<8>();
    for word in words {
        hash = mix(hash ^ u64::from_le_bytes(*word), MULTIPLIER);
    }
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    hash = mix(hash ^ u64::from_le_bytes(last), MULTIPLIER);
    mix(hash, seed | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_and_doubles_reported() {
        let spellings = (0..1000)
            .map(|i| format!("token {i}"))
            .chain(["token 7".into()]);
        let texts = StringArray::from_strings(spellings).unwrap();
        let mut index = TextIndex::with_room_for(texts.len());
        for id in 0..1000 {
            assert_eq!(index.insert(&texts, id), None);
        }
        assert_eq!(index.insert(&texts, 1000), Some(7));
        assert_eq!(index.get(&texts, b"token 999"), Some(999));
        assert_eq!(index.get(&texts, b"token 1000"), None);
        assert_eq!(index.get(&texts, b""), None);
    }

    #[test]
    fn the_first_merge_of_a_pair_stays() {
        let mut index = MergeIndex::with_room_for(3);
        index.insert(1, 2, 0, 3);
        index.insert(2, 1, 1, 4);
        index.insert(1, 2, 2, 5);
        assert_eq!((index.get(1, 2).rank, index.get(1, 2).piece), (0, 3));
        assert_eq!(index.get(2, 1).piece, 4);
        assert_eq!(index.get(1, 1).rank, Merge::NONE);
    }
}
