//! New model files: version 3, tensor by tensor, in place only when complete.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::header::{self, MAGIC};
use super::metadata::Metadata;
use super::reader::{Fault, Reader, quoted};
use super::tensor::{TensorInfo, TensorType, checked_size};
use super::value::write_string;
use crate::{Error, Result};

/// What a tensor of a new file will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name: `blk.3.attn_q.weight`.
    pub name: String,
    /// The type; one whose size follows from the shape.
    pub dtype: TensorType,
    /// One to four sizes, the contiguous dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A tensor of these properties.
    pub fn new(
        name: impl Into<String>,
        dtype: impl Into<TensorType>,
        shape: impl Into<Vec<usize>>,
    ) -> Self {
        Self {
            name: name.into(),
            dtype: dtype.into(),
            shape: shape.into(),
        }
    }

    /// Bytes of the data.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the shape is none, does not fit the type, or the type's layout is not known.
    pub fn bytes(&self) -> Result<usize> {
        let dims: Vec<u64> = self.shape.iter().map(|d| *d as u64).collect();
        let name = quoted(self.name.as_bytes());
        match checked_size(self.dtype, &dims).map_err(invalid) {
            Ok((_, Some(bytes))) => Ok(bytes),
            Ok((_, None)) => Err(Error::Invalid(format!(
                "tensor {name}: expected a type whose layout is known, found {}",
                self.dtype
            ))),
            Err(e) => Err(Error::Invalid(format!("tensor {name}: {e}"))),
        }
    }
}

impl From<&TensorInfo> for TensorSpec {
    fn from(t: &TensorInfo) -> Self {
        Self::new(&t.name, t.dtype, t.dims())
    }
}

fn invalid(fault: Fault) -> Error {
    match fault {
        Fault::Bad(what) => Error::Invalid(what),
        other => other.at(Path::new("")),
    }
}

/// Writes a model file: the header at once, then the tensors in the order of their specs.
///
/// Everything goes to a temporary file beside the target; [`finish`](Self::finish) syncs it and renames it. A writer
/// that is dropped before removes it.
pub struct Writer {
    /// `None` after `finish`, so that the drop leaves the file alone.
    file: Option<BufWriter<File>>,
    temporary: PathBuf,
    target: PathBuf,
    alignment: usize,
    /// Specs with their bytes, in order.
    tensors: Vec<(TensorSpec, usize)>,
    /// The tensor being written, and how much of it was.
    at: usize,
    written: usize,
}

impl Writer {
    /// Starts the file `path` with `metadata` and these tensors. An existing file stays until `finish`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the header is one that [`Gguf::open`](super::Gguf::open) refuses; [`Error::Io`].
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorSpec]) -> Result<Self> {
        let alignment = header::alignment(metadata).map_err(invalid)?;
        let header = encode_header(metadata, tensors, alignment)?;
        let sized = tensors
            .iter()
            .map(|t| Ok((t.clone(), t.bytes()?)))
            .collect::<Result<_>>()?;
        let temporary = temporary_beside(path)?;
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(|e| Error::io(&temporary, e))?;
        let mut writer = Self {
            file: Some(BufWriter::with_capacity(1 << 18, file)),
            temporary,
            target: path.into(),
            alignment: alignment as usize, // at most 1 MiB
            tensors: sized,
            at: 0,
            written: 0,
        };
        writer.put(&header)?;
        writer.pad(header.len())?;
        Ok(writer)
    }

    /// The tensor to be written, or to be continued; `None` when all are complete.
    pub fn current(&self) -> Option<&TensorSpec> {
        self.tensors.get(self.at).map(|t| &t.0)
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `data` has not the size that the spec says, or another tensor is incomplete;
    /// [`Error::Io`].
    pub fn tensor(&mut self, data: &[u8]) -> Result<()> {
        if let Some((spec, bytes)) = self.tensors.get(self.at)
            && data.len() + self.written != *bytes
        {
            return Err(Error::Invalid(format!(
                "tensor {}: expected {} more bytes, found {}",
                quoted(spec.name.as_bytes()),
                bytes - self.written,
                data.len()
            )));
        }
        self.append(data)
    }

    /// Writes the next piece of the current tensor; a complete one makes the next current.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the piece goes beyond the end of the tensor; [`Error::Io`].
    pub fn append(&mut self, piece: &[u8]) -> Result<()> {
        let Some((spec, bytes)) = self.tensors.get(self.at) else {
            return Err(Error::Invalid(format!(
                "{}: expected no tensor after the last of {}, found another",
                self.target.display(),
                self.tensors.len()
            )));
        };
        let (left, bytes) = (bytes - self.written, *bytes);
        if piece.len() > left {
            return Err(Error::Invalid(format!(
                "tensor {}: expected at most {left} more bytes, found {}",
                quoted(spec.name.as_bytes()),
                piece.len()
            )));
        }
        self.put(piece)?;
        self.written += piece.len();
        if self.written == bytes {
            self.pad(bytes)?;
            self.at += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Puts the complete file in its place, durably.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a tensor is missing; [`Error::Io`]. The temporary file is removed then.
    pub fn finish(mut self) -> Result<()> {
        if let Some(spec) = self.current() {
            return Err(Error::Invalid(format!(
                "tensor {}: expected its data before the end, found {} bytes",
                quoted(spec.name.as_bytes()),
                self.written
            )));
        }
        let file = self.file.as_mut().expect("only `finish` takes the file");
        let result = file
            .flush()
            .and_then(|()| file.get_ref().sync_all())
            .and_then(|()| fs::rename(&self.temporary, &self.target));
        result.map_err(|e| Error::io(&self.target, e))?;
        self.file = None; // in its place: nothing to remove
        sync_directory(&self.target).map_err(|e| Error::io(&self.target, e))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .as_mut()
            .expect("only `finish` takes the file")
            .write_all(bytes)
            .map_err(|e| Error::io(&self.temporary, e))
    }

    /// Zeros that bring `len` bytes to a multiple of the alignment.
    fn pad(&mut self, len: usize) -> Result<()> {
        let mut n = len.next_multiple_of(self.alignment) - len;
        while n > 0 {
            let step = n.min(64);
            self.put(&[0; 64][..step])?;
            n -= step;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            drop(file.into_parts()); // unwritten bytes are not wanted
            let _ = fs::remove_file(&self.temporary); // nobody to tell
        }
    }
}

/// The header of a file of these keys and tensors, checked by reading it.
fn encode_header(metadata: &Metadata, tensors: &[TensorSpec], alignment: u64) -> Result<Vec<u8>> {
    let mut names: Vec<&str> = tensors.iter().map(|t| &*t.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|w| w[0] == w[1]) {
        let name = quoted(pair[0].as_bytes());
        return Err(Error::Invalid(format!(
            "tensor {name}: expected once, found twice"
        )));
    }

    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        write_string(&mut out, key.as_bytes());
        out.extend_from_slice(&value.type_id().to_le_bytes());
        value.write(&mut out);
    }
    let mut offset = 0u64;
    for t in tensors {
        write_string(&mut out, t.name.as_bytes());
        out.extend_from_slice(&(t.shape.len() as u32).to_le_bytes());
        for d in &t.shape {
            out.extend_from_slice(&(*d as u64).to_le_bytes());
        }
        out.extend_from_slice(&t.dtype.id().to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        let end = offset.checked_add(t.bytes()? as u64);
        offset = end
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| Error::Invalid("tensors: expected less than 2^64 bytes".into()))?;
    }
    let data_start = (out.len() as u64).next_multiple_of(alignment);
    let mut reader = Reader::new(&out[..], data_start.saturating_add(offset));
    header::parse(&mut reader, header::Content::Weights).map_err(invalid)?;
    Ok(out)
}

/// A new name in the directory of `path`: a rename does not leave the file system.
fn temporary_beside(path: &Path) -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Some(name) = path.file_name() else {
        return Err(Error::Invalid(format!(
            "{}: expected the name of a file",
            path.display()
        )));
    };
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    temporary.push(format!(".{}-{n}.tmp", std::process::id()));
    Ok(path.with_file_name(temporary))
}

/// Makes the new name durable, where directories can be synced.
fn sync_directory(path: &Path) -> std::io::Result<()> {
    if cfg!(unix) {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        File::open(dir.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}
