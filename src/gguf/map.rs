//! The mapped file, and advice to the operating system about its pages.
#![allow(
    unsafe_code,
    reason = "mapping a file and dropping its pages are unsafe calls of memmap2"
)]

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::{Mmap, MmapOptions};

use crate::quant::Pages;

/// What the operating system should expect of a range of a mapped file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advice {
    /// Nothing in particular.
    Normal,
    /// Read from start to end, once: read ahead, drop behind.
    Sequential,
    /// Read in no order: no reading ahead.
    Random,
    /// Read soon: start now.
    WillNeed,
    /// Read at once: returns when the pages are in memory and mapped, so that nobody faults on them. Where the system
    /// has no such call, as [`Advice::WillNeed`].
    Populate,
    /// Not read for a while: the pages may go, and come from the file again when they are read.
    DontNeed,
}

/// Bytes that somebody else owns.
pub(crate) type Owner = Box<dyn AsRef<[u8]> + Send + Sync>;

/// The bytes of one part.
pub(crate) enum Source {
    /// A mapped file, and the byte of it at which the map begins.
    Map(Mmap, u64),
    /// Memory of the caller, which begins at a multiple of 16 as a map does: tensors are aligned relative to it.
    Memory(Owner),
    /// A copy of memory that does not.
    Copied { words: Vec<u128>, len: usize },
    /// No bytes: the header alone was read.
    Absent,
}

impl AsRef<[u8]> for Source {
    #[inline]
    fn as_ref(&self) -> &[u8] {
        match self {
            Source::Map(map, _) => map,
            Source::Memory(bytes) => (**bytes).as_ref(),
            Source::Copied { words, len } => &bytemuck::cast_slice(words)[..*len],
            Source::Absent => &[],
        }
    }
}

impl Source {
    /// Maps `bytes` of `file`, which it has.
    pub fn map(file: &File, bytes: Range<u64>) -> io::Result<Self> {
        let len = usize::try_from(bytes.end - bytes.start).map_err(|_| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                "the file is larger than the address space",
            )
        })?;
        // SAFETY: the map is read-only and its range is one that the file has. Nothing in this process writes to a model file:
        // `Writer` makes a new one and renames it. That nobody else truncates or writes the file while it is mapped
        // is what every program that maps files asks of its user; the header, which decides about lengths, is
        // read and checked outside the map, and weights are plain numbers for which any bits are valid.
        let map = unsafe { MmapOptions::new().offset(bytes.start).len(len).map(file) }?;
        Ok(Source::Map(map, bytes.start))
    }

    /// `bytes` where they are, if they are aligned, or a copy.
    pub fn memory(bytes: Owner) -> Self {
        let given = (*bytes).as_ref();
        if given.as_ptr().align_offset(align_of::<u128>()) == 0 {
            return Source::Memory(bytes);
        }
        let len = given.len();
        let mut words = vec![0u128; len.div_ceil(size_of::<u128>())];
        bytemuck::cast_slice_mut(&mut words)[..len].copy_from_slice(given);
        Source::Copied { words, len }
    }

    /// Passes `advice` about `range` on; where there is no map, or no such advice, nothing happens.
    ///
    /// # Panics
    /// If `range` does not lie in the source.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> io::Result<()> {
        let len = self.as_ref()[range.clone()].len();
        match self {
            #[cfg(unix)]
            Source::Map(map, _) if len > 0 => {
                use memmap2::{Advice as Safe, UncheckedAdvice};
                let safe = match advice {
                    Advice::Normal => Safe::Normal,
                    Advice::Sequential => Safe::Sequential,
                    Advice::Random => Safe::Random,
                    Advice::WillNeed => Safe::WillNeed,
                    #[cfg(target_os = "linux")]
                    Advice::Populate => Safe::PopulateRead,
                    #[cfg(not(target_os = "linux"))]
                    Advice::Populate => Safe::WillNeed,
                    Advice::DontNeed => {
                        // SAFETY: the map is read-only and backed by the file, so a dropped page comes back with the
                        // same contents; the range lies in the map, as the slice above has checked.
                        return unsafe {
                            map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, len)
                        };
                    }
                };
                map.advise_range(safe, range.start, len)
            }
            _ => {
                let _ = (advice, len); // no advice on this system
                Ok(())
            }
        }
    }
}

/// What a fault in a mapped file brings along: Linux maps the pages around that are in memory, in windows of this size,
const FAULT_WINDOW: usize = 64 << 10;

/// or all that the system keeps as one folio, which is aligned in the file and at most so large.
const FOLIO: usize = 2 << 20;

impl Pages for Source {
    fn prefetch(&self, range: Range<usize>) {
        let _ = self.advise(range, Advice::WillNeed); // it will be read in any case
    }

    fn release(&self, range: Range<usize>) {
        let before = match self {
            Source::Map(_, start) => (start % FOLIO as u64) as usize,
            _ => 0,
        };
        // Windows are aligned in memory, not in the file: they may begin before a folio.
        let start = (before + range.start) / FOLIO * FOLIO;
        let start = start.saturating_sub(before + FAULT_WINDOW);
        let end = (before + range.end).next_multiple_of(FOLIO) - before + FAULT_WINDOW;
        let end = end.min(self.as_ref().len());
        let _ = self.advise(start..end, Advice::DontNeed); // what is refused stays, and is counted as resident
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misaligned_memory_is_copied() {
        struct Skip(Vec<u8>, usize);
        impl AsRef<[u8]> for Skip {
            fn as_ref(&self) -> &[u8] {
                &self.0[self.1..]
            }
        }
        let mut copied = 0;
        for skip in 0..16 {
            let bytes: Vec<u8> = (0..100).collect();
            let source = Source::memory(Box::new(Skip(bytes.clone(), skip)));
            assert_eq!(source.as_ref(), &bytes[skip..]);
            assert_eq!(source.as_ref().as_ptr().align_offset(16), 0);
            copied += usize::from(matches!(source, Source::Copied { .. }));
        }
        assert_eq!(copied, 15);
    }
}
