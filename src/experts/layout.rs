//! Where the experts of a model lie in its files: plain numbers, checked once.

use std::ops::Range;

use crate::{Error, Result};

/// Parts of an expert at most: gate, up, down.
pub const MAX_PARTS: usize = 3;

/// Direct reads begin and end at multiples of this in the file and in memory: the largest block that drives have, which
/// is also a page. A system that wants more refuses, and the read goes through the page cache.
pub(super) const ALIGN: usize = 4096;

/// Experts of a model at most.
const MAX_EXPERTS: usize = 1 << 20;

/// One tensor of all experts of a layer: those of an expert lie together, the experts one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    /// Index of the file.
    pub file: usize,
    /// Where expert 0 begins in the file.
    pub offset: u64,
    /// Bytes of each expert.
    pub expert_bytes: u64,
}

/// The experts of one layer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerExperts {
    /// How many there are.
    pub n_experts: usize,
    /// How many a token uses.
    pub n_used: usize,
    /// In the order in which computing needs them: gate, up, down, or gate and up in one, down.
    pub parts: Vec<Part>,
}

/// An expert of the model: all of layer 0, then all of layer 1, and so on.
pub type Key = u32;

/// Where all experts lie. Layers are counted among those that have experts.
#[derive(Clone, Debug)]
pub struct Layout {
    file_bytes: Vec<u64>,
    layers: Vec<LayerExperts>,
    /// First key of each layer, and the number of all.
    base: Vec<Key>,
    slot_bytes: usize,
}

/// A part of an expert in its file.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Place {
    pub file: usize,
    pub offset: u64,
    pub bytes: usize,
}

impl Place {
    /// Where the aligned range around it begins in the file.
    pub fn start(&self) -> u64 {
        self.offset / ALIGN as u64 * ALIGN as u64
    }

    /// Where it begins in that range.
    pub fn skip(&self) -> usize {
        (self.offset % ALIGN as u64) as usize
    }

    /// Bytes of that range.
    pub fn widened(&self) -> usize {
        (self.skip() + self.bytes).next_multiple_of(ALIGN)
    }
}

impl Layout {
    /// The experts `layers` in files of `file_bytes`.
    ///
    /// # Errors
    /// [`Error::BadModel`] if a range does not lie in its file, or numbers are zero or contradict each other.
    pub fn new(file_bytes: Vec<u64>, layers: Vec<LayerExperts>) -> Result<Self> {
        let bad = |what: String| Err(Error::BadModel(format!("experts: {what}")));
        if layers.is_empty() {
            return bad("expected at least one layer, found none".into());
        }
        let mut base = vec![0];
        let mut n_all = 0usize;
        let mut slot_bytes = 0;
        for (idx, layer) in layers.iter().enumerate() {
            let LayerExperts {
                n_experts,
                n_used,
                parts,
            } = layer;
            if *n_used == 0 || n_used > n_experts {
                return bad(format!(
                    "layer {idx}: expected 1 to {n_experts} used of {n_experts}, found {n_used}"
                ));
            }
            n_all = n_all.saturating_add(*n_experts);
            if n_all > MAX_EXPERTS {
                return bad(format!("expected at most {MAX_EXPERTS}, found {n_all}"));
            }
            if !(1..=MAX_PARTS).contains(&parts.len()) {
                let n = parts.len();
                return bad(format!(
                    "layer {idx}: expected 1 to {MAX_PARTS} parts, found {n}"
                ));
            }
            let mut layer_bytes = 0usize;
            for (p, part) in parts.iter().enumerate() {
                let name = || format!("layer {idx}, part {p}");
                let Some(&file_bytes) = file_bytes.get(part.file) else {
                    let n = file_bytes.len();
                    return bad(format!(
                        "{}: expected a file below {n}, found {}",
                        name(),
                        part.file
                    ));
                };
                let end = part.expert_bytes.checked_mul(*n_experts as u64);
                let end = end.and_then(|all| all.checked_add(part.offset));
                if part.expert_bytes == 0 || end.is_none_or(|end| end > file_bytes) {
                    return bad(format!(
                        "{}: expected {n_experts} experts within the {file_bytes} bytes of the file, found {} bytes each from byte {}",
                        name(),
                        part.expert_bytes,
                        part.offset
                    ));
                }
                // A widened range: as many whole blocks as the part fills, and one more where it straddles.
                let area = usize::try_from(part.expert_bytes)
                    .ok()
                    .and_then(|bytes| bytes.checked_next_multiple_of(ALIGN)?.checked_add(ALIGN));
                let sum = area.and_then(|area| layer_bytes.checked_add(area));
                match sum.filter(|sum| *sum <= isize::MAX as usize) {
                    Some(sum) => layer_bytes = sum,
                    None => {
                        return bad(format!(
                            "{}: expected an expert that fits the address space, found {} bytes",
                            name(),
                            part.expert_bytes
                        ));
                    }
                }
            }
            slot_bytes = slot_bytes.max(layer_bytes);
            base.push(n_all as Key);
        }
        Ok(Self {
            file_bytes,
            layers,
            base,
            slot_bytes,
        })
    }

    /// The layers.
    pub fn layers(&self) -> &[LayerExperts] {
        &self.layers
    }

    /// Lengths of the files.
    pub fn file_bytes(&self) -> &[u64] {
        &self.file_bytes
    }

    /// Bytes of the memory that holds one expert of any layer: its parts, each widened to whole blocks.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Experts of all layers.
    pub fn n_experts(&self) -> usize {
        self.base[self.layers.len()] as usize
    }

    /// Experts that one token uses in all layers together.
    pub fn cycle(&self) -> usize {
        self.layers.iter().map(|layer| layer.n_used).sum()
    }

    /// The most experts that one layer uses for a token.
    pub fn n_used(&self) -> usize {
        let used = self.layers.iter().map(|layer| layer.n_used);
        used.max().expect("at least one layer")
    }

    /// The fewest slots with which a store works: those of a layer at work, of the next, and of as many on their way.
    pub fn min_slots(&self) -> usize {
        (3 * self.n_used()).min(self.n_experts())
    }

    /// Slots from which on plain eviction works: the experts of one token, and those of two layers.
    pub fn cycle_slots(&self) -> usize {
        (self.cycle() + 2 * self.n_used()).min(self.n_experts())
    }

    /// Bytes of `expert` of any layer that are read for it, without widening.
    pub fn expert_bytes(&self, layer: usize) -> u64 {
        let parts = self.layers[layer].parts.iter();
        parts.map(|part| part.expert_bytes).sum()
    }

    /// The key of `expert` of `layer`, which exist.
    pub(super) fn key(&self, layer: usize, expert: u32) -> Key {
        self.base[layer] + expert
    }

    /// The keys of `layer`.
    pub(super) fn keys(&self, layer: usize) -> Range<Key> {
        self.base[layer]..self.base[layer + 1]
    }

    /// Layer and expert of `key`.
    pub(super) fn expert(&self, key: Key) -> (usize, u32) {
        let layer = self.base.partition_point(|base| *base <= key) - 1;
        (layer, key - self.base[layer])
    }

    /// Where the parts of `key` lie.
    pub(super) fn places(&self, key: Key) -> impl ExactSizeIterator<Item = Place> {
        let (layer, expert) = self.expert(key);
        self.layers[layer].parts.iter().map(move |part| Place {
            file: part.file,
            offset: part.offset + u64::from(expert) * part.expert_bytes,
            bytes: part.expert_bytes as usize,
        })
    }

    /// Where part `part` of `key` lies.
    pub(super) fn place(&self, key: Key, part: usize) -> Place {
        self.places(key).nth(part).expect("a part of the layer")
    }

    /// What distinguishes this layout from others: a hash of all its numbers.
    pub(super) fn hash(&self) -> u64 {
        let mut bytes = Vec::new();
        let mut number = |n: u64| bytes.extend_from_slice(&n.to_le_bytes());
        self.file_bytes.iter().for_each(|n| number(*n));
        for layer in &self.layers {
            number(layer.n_experts as u64);
            number(layer.n_used as u64);
            for part in &layer.parts {
                number(part.file as u64);
                number(part.offset);
                number(part.expert_bytes);
            }
        }
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }
}
