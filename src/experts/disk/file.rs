//! Files: positioned reads on descriptors of our own, past the page cache where the system can.

use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use super::{Disk, Fault, sys};
use crate::experts::IoMode;
use crate::experts::layout::ALIGN;
use crate::{Error, Result};

pub(crate) struct Files {
    files: Vec<Entry>,
    /// Whether reads go past the page cache. Cleared for good when the system refuses one.
    direct: AtomicBool,
    /// Whether refused reads go through the page cache.
    may_fall_back: bool,
    has_ring: bool,
}

struct Entry {
    path: PathBuf,
    cached: File,
    direct: Option<File>,
    /// The byte that readers call 0.
    start: u64,
    opened: Identity,
}

/// What of a file shows that somebody has written to it. The descriptor stays with the file that was opened: one that
/// is renamed over it, or a removal, changes nothing for us.
#[derive(PartialEq, Eq)]
struct Identity {
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl Files {
    /// Opens `paths`, whose lengths are known to be `bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] if one cannot be opened, or not in this `mode`; [`Error::BadFile`] if it has another length.
    pub fn open(paths: &[PathBuf], bytes: &[u64], mode: IoMode) -> Result<Self> {
        if paths.len() != bytes.len() {
            return Err(Error::Invalid(format!(
                "experts: expected {} files, found {}",
                bytes.len(),
                paths.len()
            )));
        }
        let mut files = Vec::with_capacity(paths.len());
        for (path, expected) in paths.iter().zip(bytes) {
            let io = |e| Error::io(path, e);
            let cached = File::open(path).map_err(io)?;
            let opened = Identity::of(&cached.metadata().map_err(io)?);
            if opened.bytes != *expected {
                let found = opened.bytes;
                return Err(Error::BadFile {
                    path: path.clone(),
                    what: format!("expected the {expected} bytes of its header, found {found}"),
                });
            }
            let direct = match mode {
                IoMode::Buffered => None,
                IoMode::Auto => sys::open_direct(path).ok(),
                IoMode::Direct | IoMode::Uring => Some(sys::open_direct(path).map_err(io)?),
            };
            let direct = match direct {
                // Between the two somebody may have put another file there.
                Some(file) if !same_file(&file, &cached).map_err(io)? => {
                    return Err(Fault::Changed.error(path));
                }
                direct => direct,
            };
            files.push(Entry {
                path: path.clone(),
                cached,
                direct,
                start: 0,
                opened,
            });
        }
        let direct = files.iter().all(|file| file.direct.is_some());
        Ok(Self {
            files,
            direct: AtomicBool::new(direct),
            may_fall_back: matches!(mode, IoMode::Auto | IoMode::Buffered),
            has_ring: mode == IoMode::Uring,
        })
    }

    /// What a ring reads `file` from.
    #[cfg(target_os = "linux")]
    pub(super) fn descriptor(&self, file: usize) -> &File {
        let entry = &self.files[file];
        entry.direct.as_ref().unwrap_or(&entry.cached)
    }

    /// Whether `read` bytes of `file` from `offset` suffice, and are those of the file that was opened. To be asked after
    /// they were read: what is written later does not concern them.
    pub(super) fn check(
        &self,
        file: usize,
        offset: u64,
        read: usize,
        needed: usize,
    ) -> Result<(), Fault> {
        let entry = &self.files[file];
        let metadata = entry.cached.metadata().map_err(|e| Fault::from(&e))?;
        let now = Identity::of(&metadata);
        if read < needed {
            return Err(Fault::Short(now.bytes.min(offset + read as u64)));
        }
        if now != entry.opened {
            return Err(Fault::Changed);
        }
        Ok(())
    }

    /// One file that is open, whose bytes count from `start`; there are to be as many as `bytes` says.
    ///
    /// # Errors
    /// As [`Files::open`], and [`Error::Unsupported`] to read past the page cache.
    pub fn open_in(
        file: File,
        start: u64,
        name: &Path,
        bytes: &[u64],
        mode: IoMode,
    ) -> Result<Self> {
        let &[expected] = bytes else {
            return Err(Error::Invalid(format!(
                "experts: expected one file, found {}",
                bytes.len()
            )));
        };
        if let IoMode::Direct | IoMode::Uring = mode {
            return Err(Error::Unsupported {
                kind: "way to read an open file",
                found: "direct, uring".into(),
                supported: "auto, buffered".into(),
            });
        }
        let opened = Identity::of(&file.metadata().map_err(|e| Error::io(name, e))?);
        if start
            .checked_add(expected)
            .is_none_or(|end| end > opened.bytes)
        {
            return Err(Error::BadFile {
                path: name.into(),
                what: format!(
                    "expected the {expected} bytes of its header from {start}, found a file of {}",
                    opened.bytes
                ),
            });
        }
        Ok(Self {
            files: vec![Entry {
                path: name.into(),
                cached: file,
                direct: None,
                start,
                opened,
            }],
            direct: AtomicBool::new(false),
            may_fall_back: true,
            has_ring: false,
        })
    }
}

fn same_file(a: &File, b: &File) -> io::Result<bool> {
    let (a, b) = (a.metadata()?, b.metadata()?);
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        if (a.dev(), a.ino()) != (b.dev(), b.ino()) {
            return Ok(false);
        }
    }
    Ok(Identity::of(&a) == Identity::of(&b))
}

impl Disk for Files {
    fn name(&self) -> &'static str {
        if self.has_ring {
            "io_uring"
        } else if self.direct.load(Ordering::Relaxed) {
            "direct"
        } else {
            "buffered"
        }
    }

    fn path(&self, file: usize) -> &Path {
        &self.files[file].path
    }

    fn read(&self, file: usize, offset: u64, into: &mut [u8], needed: usize) -> Result<(), Fault> {
        let entry = &self.files[file];
        let offset = entry.start + offset;
        let direct = entry.direct.as_ref();
        let direct = direct.filter(|_| self.direct.load(Ordering::Relaxed));
        let read = match direct {
            Some(file) => match fill(file, into, offset, needed) {
                Err(e) if self.may_fall_back && e.kind() == io::ErrorKind::InvalidInput => {
                    self.direct.store(false, Ordering::Relaxed);
                    None
                }
                read => Some(read),
            },
            None => None,
        };
        let read = read.unwrap_or_else(|| {
            let read = fill(&entry.cached, into, offset, needed);
            sys::drop_cached(&entry.cached, offset, into.len());
            read
        });
        let read = read.map_err(|e| Fault::from(&e))?;
        self.check(file, offset, read, needed)
    }
}

/// Reads until `into` is full, or the file ends, or what is `needed` is there and the system stops in mid-block. How
/// many bytes were read.
fn fill(file: &File, into: &mut [u8], offset: u64, needed: usize) -> io::Result<usize> {
    let mut done = 0;
    while done < into.len() {
        match sys::read_at(file, &mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => {
                done += n;
                if done >= needed {
                    break;
                }
                if done < into.len() && !done.is_multiple_of(ALIGN) {
                    // A direct read goes on where a block begins; the end of the file is no such place.
                    let block = done / ALIGN * ALIGN;
                    if n == done - block {
                        break;
                    }
                    done = block;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
