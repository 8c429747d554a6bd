//! Where the bytes of a part are: the file at a path, or a range of a file that somebody has opened.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Result};

/// Weights are read where they lie, four bytes at a time at least.
const ALIGN: u64 = 4;

/// The place of a part.
#[derive(Clone)]
pub(super) struct Place {
    /// What errors call it.
    pub path: PathBuf,
    /// `None`: the file of that name, all of it.
    pub open: Option<Arc<Open>>,
}

/// A range of an open file, which it has.
pub(super) struct Open {
    pub file: File,
    pub bytes: Range<u64>,
}

impl Place {
    pub fn named(path: &Path) -> Self {
        Self {
            path: path.into(),
            open: None,
        }
    }

    pub fn open(file: File, bytes: Range<u64>) -> Result<Self> {
        let path = PathBuf::from("<open file>");
        let found = file.metadata().map_err(|e| Error::io(&path, e))?;
        if !found.is_file() {
            return Err(Error::BadFile {
                path,
                what: "expected a file with a GGUF model in it, found a directory, pipe or device"
                    .into(),
            });
        }
        let Range { start, end } = bytes;
        let len = found.len();
        if start > end || end > len {
            return Err(Error::Invalid(format!(
                "model in an open file: expected bytes of its {len}, found {start} to {end}"
            )));
        }
        if !start.is_multiple_of(ALIGN) {
            return Err(Error::Invalid(format!(
                "model in an open file: expected it to begin at a multiple of {ALIGN} (zipalign does that for what is not \
                 compressed), found {start}"
            )));
        }
        Ok(Self {
            path,
            open: Some(Arc::new(Open { file, bytes })),
        })
    }

    /// The file once more, and where the part begins in it.
    pub fn reopen(&self) -> Result<(File, u64)> {
        let reopened = match &self.open {
            None => File::open(&self.path).map(|file| (file, 0)),
            Some(open) => open.file.try_clone().map(|file| (file, open.bytes.start)),
        };
        reopened.map_err(|e| Error::io(&self.path, e))
    }
}

/// Reads a range of a file, whose position others may use.
pub(super) struct ReadAt<'a> {
    file: &'a File,
    left: Range<u64>,
}

impl<'a> ReadAt<'a> {
    pub fn new(file: &'a File, bytes: Range<u64>) -> Self {
        Self { file, left: bytes }
    }
}

impl Read for ReadAt<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.left.end - self.left.start;
        let len = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let (out, at) = (&mut out[..len], self.left.start);
        #[cfg(unix)]
        let n = std::os::unix::fs::FileExt::read_at(self.file, out, at)?;
        #[cfg(windows)]
        let n = std::os::windows::fs::FileExt::seek_read(self.file, out, at)?;
        #[cfg(not(any(unix, windows)))]
        let n = {
            use std::io::{Seek, SeekFrom};
            let mut file = self.file;
            file.seek(SeekFrom::Start(at))?;
            file.read(out)?
        };
        self.left.start += n as u64;
        Ok(n)
    }
}
