//! Whether a model gets a copy of its matrices in panels, which decoding reads faster.
//!
//! On two cores of an EPYC (Zen 5) with 32 MiB of last-level cache, files of 50 to 700 MB: 11 to 40 % with one thread, 2 to
//! 20 % with two, which memory holds up; 90 MB are copied in 30 ms, 490 MB in 500. On a Xeon with 300 MiB of it, alone there,
//! files of 50 to 100 MB gain, 217 MB do not, and 693 MB are a tenth to a fifth slower: there memory likes the four streams of rows.

use super::{LoadOptions, experts};
use crate::backend::BackendKind;
use crate::backend::cpu::panels;
use crate::gguf::Gguf;
use crate::profile::machine;

/// Bytes that are copied at most where nobody said so.
const MOST: u64 = 256 << 20;

/// Whether matrices are copied into the layout of the kernels of decoding. Prompts are read from the file as ever.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Repack {
    /// Where what a token reads is at most four times the last-level cache and 256 MiB, so that it is copied soon, a
    /// quarter of the memory that is free suffices, and there is no budget for memory.
    #[default]
    Auto,
    /// Always. Takes as much memory again as these matrices have in the file.
    On,
    /// Never.
    Off,
}

impl Repack {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::On, Self::Off];

    /// As users write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// The one called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|repack| repack.name() == name)
    }
}

/// Bytes of the copies that `options` have the matrices of `gguf` get; 0: none.
pub(super) fn copied_bytes(gguf: &Gguf, options: &LoadOptions) -> u64 {
    let table = experts::table(gguf).map(|table| &table.name);
    let read = || gguf.tensors().filter(|t| Some(&t.name) != table);
    let is_small = || {
        let bytes: u64 = read().map(|t| t.bytes as u64).sum();
        machine::last_level_cache().is_some_and(|cache| bytes <= MOST.min(4 * cache))
            && machine::memory_available().is_some_and(|free| bytes <= free / 4)
    };
    let wanted = match options.repack {
        Repack::Auto => options.memory.is_none() && is_small(),
        Repack::On => true,
        Repack::Off => false,
    };
    let in_slots = || !matches!(experts::to_store(gguf, options), Ok(None));
    if !wanted || options.backend != BackendKind::Cpu || in_slots() {
        return 0;
    }
    let copies = read().filter_map(|t| panels::copied_bytes(t.dtype.dtype()?, &t.shape));
    copies.map(|bytes| bytes as u64).sum()
}
