//! The one reader through which every byte of a header passes: it knows how many bytes are left, compares each
//! count and length with them before anything is allocated, and never reserves more than twice what was read.

use std::fmt::Display;
use std::io::Read;
use std::path::Path;

use crate::Error;

/// Bytes that a header may have: some ten times the largest vocabulary known.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Bytes read from the source at a time when the length is the file's word.
const CHUNK: usize = 8192;

/// What is wrong with a header, before the path is known.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The source could not be read.
    Io(std::io::Error),
    /// Object, expected, found.
    Bad(String),
    /// An allocation was refused.
    NoMemory { what: String, bytes: usize },
}

impl Fault {
    /// Names the object that the fault concerns.
    pub fn within(self, object: impl Display) -> Self {
        match self {
            Fault::Bad(what) => Fault::Bad(format!("{object}: {what}")),
            Fault::NoMemory { bytes, .. } => Fault::NoMemory {
                what: object.to_string(),
                bytes,
            },
            io => io,
        }
    }

    /// The public error for the file `path`.
    pub fn at(self, path: &Path) -> Error {
        match self {
            Fault::Io(source) => Error::io(path, source),
            Fault::Bad(what) => Error::BadFile {
                path: path.into(),
                what,
            },
            Fault::NoMemory { what, bytes } => Error::OutOfMemory { what, bytes },
        }
    }
}

/// `Err(Fault::Bad)` with a formatted message.
macro_rules! bad {
    ($($arg:tt)*) => { Err($crate::gguf::reader::Fault::Bad(format!($($arg)*))) };
}
pub(crate) use bad;

/// Little-endian values from a source of known length.
pub(crate) struct Reader<R> {
    source: R,
    pos: u64,
    len: u64,
    /// Where reading ends: `len`, or the most that a header may have.
    end: u64,
}

impl<R: Read> Reader<R> {
    /// A reader of `source`, which holds `len` bytes.
    pub fn new(source: R, len: u64) -> Self {
        Self {
            source,
            pos: 0,
            len,
            end: len.min(MAX_HEADER_BYTES),
        }
    }

    /// Bytes read so far.
    pub fn pos(&self) -> u64 {
        self.pos
    }

    /// Bytes of the source.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Bytes that may still be read.
    pub fn left(&self) -> u64 {
        self.end - self.pos
    }

    /// What ends after the bytes left.
    fn limit(&self) -> &'static str {
        if self.end < self.len {
            "what a header may have (256 MiB)"
        } else {
            "the file"
        }
    }

    /// Fills `out`.
    pub fn fill(&mut self, out: &mut [u8], what: &str) -> Result<(), Fault> {
        if out.len() as u64 > self.left() {
            return bad!(
                "{what}: expected {} more bytes, found the end of {} after {}",
                out.len(),
                self.limit(),
                self.left()
            );
        }
        self.source.read_exact(out).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Fault::Bad(format!(
                "{what}: expected a file of {} bytes, found that it shrank while it was read",
                self.len
            )),
            _ => Fault::Io(e),
        })?;
        self.pos += out.len() as u64;
        Ok(())
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        self.fill(&mut out, what)?;
        Ok(out)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The next 64-bit number as a count of things that take at least `min_bytes` each, and of which at most `max`
    /// are accepted.
    pub fn count(&mut self, what: &str, min_bytes: u64, max: usize) -> Result<usize, Fault> {
        let n = self.u64(what)?;
        let room = self.left() / min_bytes;
        if n > room {
            return bad!(
                "{what}: expected at most {room} in the {} bytes left of {}, found {n}",
                self.left(),
                self.limit()
            );
        }
        match usize::try_from(n) {
            Ok(n) if n <= max => Ok(n),
            _ => bad!("{what}: expected at most {max}, found {n}"),
        }
    }

    /// Appends a string, its length first, to `out`.
    pub fn string(&mut self, out: &mut Vec<u8>, what: &str, max: usize) -> Result<(), Fault> {
        let mut n = self.count(what, 1, max)?;
        let limit = out.len().saturating_add(n);
        while n > 0 {
            let (start, step) = (out.len(), n.min(CHUNK));
            grow(out, step, limit)?;
            out.resize(start + step, 0);
            self.fill(&mut out[start..], what)?;
            n -= step;
        }
        Ok(())
    }

    /// `n` values of `N` bytes each.
    pub fn values<T, const N: usize>(
        &mut self,
        n: usize,
        decode: impl Fn([u8; N]) -> Result<T, Fault>,
    ) -> Result<Vec<T>, Fault> {
        let mut out = Vec::new();
        let mut buffer = [0; CHUNK];
        while out.len() < n {
            let step = (n - out.len()).min(CHUNK / N);
            grow(&mut out, step, n)?;
            self.fill(&mut buffer[..step * N], "array")?;
            for bytes in buffer[..step * N].as_chunks::<N>().0 {
                out.push(decode(*bytes)?);
            }
        }
        Ok(out)
    }
}

/// Makes room for `extra` more elements in `v`, of which at most `limit` are expected. At most doubles, so that what
/// is reserved follows what was read and not what the file announces.
pub(crate) fn grow<T>(v: &mut Vec<T>, extra: usize, limit: usize) -> Result<(), Fault> {
    let needed = v.len() + extra;
    if needed <= v.capacity() {
        return Ok(());
    }
    let target = v.len().saturating_mul(2).min(limit).max(needed);
    v.try_reserve_exact(target - v.len())
        .map_err(|_| Fault::NoMemory {
            what: "the header".into(),
            bytes: target.saturating_mul(size_of::<T>()),
        })
}

/// `bytes` as a name to print: quoted, control characters escaped, cut to a line.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    const SHOWN: usize = 80;
    let head = &bytes[..bytes.len().min(4 * SHOWN)]; // at most four bytes make a character
    let text = String::from_utf8_lossy(head);
    let mut out = String::from("`");
    out.extend(text.chars().take(SHOWN).flat_map(char::escape_debug));
    if head.len() < bytes.len() || text.chars().nth(SHOWN).is_some() {
        out.push('…');
    }
    out.push('`');
    out
}
