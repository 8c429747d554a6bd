//! The header of one GGUF file: magic, version, counts, metadata, tensor table.
//!
//! ```text
//! "GGUF"  u32 version  u64 n_tensors  u64 n_keys
//! n_keys    × { string key, u32 type, value }
//! n_tensors × { string name, u32 n_dims, u64 × n_dims sizes, u32 type, u64 offset }
//! padding to `general.alignment`, then the data section; offsets count from it
//! string = u64 length, bytes; array = u32 type, u64 count, values
//! ```
//! Source: the GGUF specification of the ggml project. Versions 2 and 3 in little-endian order have the same layout.
//!
//! Nothing is trusted: see [`super::reader`]. The limits below hold memory while reading under 64 MiB + 4 × the bytes
//! of the header: entries of the two tables and arrays inside arrays take more memory than file, so their numbers are
//! bounded; strings and arrays take about what they take in the file, three times that while they grow.

use std::io::Read;

use super::metadata::Metadata;
use super::reader::{Fault, Reader, bad, grow, quoted};
use super::tensor::{MIN_ENTRY_BYTES, TensorInfo, read_entry};
use super::value::{Array, MAX_INNER_ARRAYS, Value};

/// Keys that one file may have.
const MAX_KEYS: usize = 65_536;
/// Tensors that a model may have.
pub(crate) const MAX_TENSORS: usize = 65_536;
/// Bytes of the longest key, as in the specification.
const MAX_KEY_BYTES: usize = 65_535;
/// Bytes of the shortest entry of the metadata: a key of one byte, a value of one byte.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;

/// What is bounded by number, old and new allocation at once while it doubles, must fit in the 64 MiB.
const _: () = {
    let key = size_of::<(Box<str>, Value)>() + size_of::<u32>();
    let tensor = size_of::<TensorInfo>() + 2 * size_of::<u32>();
    let tables = MAX_KEYS * key + MAX_TENSORS * tensor + MAX_INNER_ARRAYS * size_of::<Array>();
    assert!(3 * tables < 63 << 20);
};

/// The first four bytes.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The key of the alignment.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// The alignment of a file without the key.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The largest alignment accepted.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// What the header of a file says, all of it checked against the length of the file.
pub(crate) struct Header {
    pub version: u32,
    pub metadata: Metadata,
    /// In the order of the file; offsets count from the start of the file.
    pub tensors: Vec<TensorInfo>,
    pub alignment: u64,
    /// Bytes up to the end of the tensor table.
    pub header_bytes: u64,
    /// Where the data section begins.
    pub data_start: u64,
}

/// The alignment that `metadata` asks for.
pub(crate) fn alignment(metadata: &Metadata) -> Result<u64, Fault> {
    match metadata.get(ALIGNMENT_KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => match value.as_integer().map(u64::try_from) {
            Some(Ok(n)) if n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&n) => Ok(n),
            _ => bad!(
                "metadata key `{ALIGNMENT_KEY}`: expected a power of two from 8 to {MAX_ALIGNMENT}, found {} {value}",
                value.type_name()
            ),
        },
    }
}

/// What a file must hold after its header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    /// Every tensor, whole.
    Weights,
    /// Nothing: what the header says of them is enough.
    Ignored,
}

/// Reads the header of the file that `r` is at the start of.
pub(crate) fn parse<R: Read>(r: &mut Reader<R>, content: Content) -> Result<Header, Fault> {
    let version = version(r)?;
    let n_tensors = r.count("number of tensors", MIN_ENTRY_BYTES, MAX_TENSORS)?;
    let n_keys = r.count("number of metadata keys", MIN_KEY_BYTES, MAX_KEYS)?;
    let metadata = read_metadata(r, n_keys)?;
    let alignment = alignment(&metadata)?;

    let mut tensors = Vec::new();
    for i in 0..n_tensors {
        grow(&mut tensors, 1, n_tensors)?;
        tensors.push(read_entry(r, i, alignment)?);
    }
    let header_bytes = r.pos();
    let data_start = header_bytes.next_multiple_of(alignment);
    let data_end = match content {
        Content::Weights => r.len(),
        Content::Ignored => r.len().max(end(&tensors, data_start)),
    };
    place(&mut tensors, data_start, data_end)?;
    Ok(Header {
        version,
        metadata,
        tensors,
        alignment,
        header_bytes,
        data_start,
    })
}

fn version<R: Read>(r: &mut Reader<R>) -> Result<u32, Fault> {
    let mut start = [0; 64];
    let n = r.left().min(8) as usize;
    if n == 0 {
        return bad!("expected a GGUF file, found an empty file");
    }
    r.fill(&mut start[..n], "magic")?;
    if start[..4] != MAGIC {
        let more = r.left().min(64 - n as u64) as usize;
        r.fill(&mut start[n..n + more], "magic")?;
        let found = what_else(&start[..n + more]);
        return bad!("expected a GGUF file (magic `GGUF`), found {found}");
    }
    if n < 8 {
        return bad!("version: expected 4 bytes, found the end of the file");
    }
    let version = [start[4], start[5], start[6], start[7]];
    match u32::from_le_bytes(version) {
        v @ (2 | 3) => Ok(v),
        _ if matches!(u32::from_be_bytes(version), 1..=255) => bad!(
            "byte order: expected a little-endian GGUF file, found a big-endian one (version {})",
            u32::from_be_bytes(version)
        ),
        1 => bad!(
            "GGUF version: expected 2 or 3, found 1, a layout of 2023; convert the model again"
        ),
        v => bad!("GGUF version: expected 2 or 3, found {v}"),
    }
}

/// What a file that begins with `start` seems to be.
fn what_else(start: &[u8]) -> String {
    let known: &[(&[u8], &str)] = &[
        (b"FUGG", "a GGUF file with its bytes swapped (big-endian)"),
        (b"tjgg", "a GGJT file, the format before GGUF"),
        (b"fmgg", "a GGMF file, the format before GGUF"),
        (b"lmgg", "a GGML file, the format before GGUF"),
        (b"PK\x03\x04", "a zip archive (or PyTorch checkpoint)"),
        (b"\x1f\x8b", "a gzip archive"),
        (
            b"version https://git-lfs",
            "a Git LFS pointer; fetch the file itself",
        ),
        (b"<!DOCTYPE", "an HTML page; the download went wrong"),
        (b"<!doctype", "an HTML page; the download went wrong"),
        (b"<html", "an HTML page; the download went wrong"),
    ];
    if let Some((_, what)) = known.iter().find(|(magic, _)| start.starts_with(magic)) {
        return (*what).into();
    }
    if start.get(8..10) == Some(b"{\"") {
        return "a safetensors file".into();
    }
    let line = start.split(|b| *b == b'\n').next().unwrap_or(start);
    // A character cut at the end of what was read is still text.
    let text = match std::str::from_utf8(start) {
        Ok(_) => true,
        Err(e) => e.error_len().is_none() && e.valid_up_to() > 0,
    };
    let printable = start
        .iter()
        .all(|b| !b.is_ascii_control() || b.is_ascii_whitespace());
    if text && printable {
        return format!("text beginning with {}", quoted(line));
    }
    let hex: Vec<_> = start.iter().take(4).map(|b| format!("{b:02x}")).collect();
    format!("the bytes {}", hex.join(" "))
}

fn read_metadata<R: Read>(r: &mut Reader<R>, n_keys: usize) -> Result<Metadata, Fault> {
    let mut entries = Vec::new();
    let mut inner_arrays = MAX_INNER_ARRAYS;
    for i in 0..n_keys {
        let mut key = Vec::new();
        r.string(&mut key, "length of the key", MAX_KEY_BYTES)
            .map_err(|e| e.within(format_args!("metadata key {i}")))?;
        let key = match String::from_utf8(key) {
            Ok(key) if !key.is_empty() => key.into_boxed_str(),
            Ok(_) => return bad!("metadata key {i}: expected a name, found an empty one"),
            Err(e) => {
                let found = quoted(e.as_bytes());
                return bad!("metadata key {i}: expected a name in UTF-8, found {found}");
            }
        };
        let value = r
            .u32("value type")
            .and_then(|id| Value::read(r, id, &mut inner_arrays))
            .map_err(|e| e.within(format_args!("metadata key {}", quoted(key.as_bytes()))))?;
        grow(&mut entries, 1, n_keys)?;
        entries.push((key, value));
    }
    Metadata::from_entries(entries).map_err(|key| {
        let key = quoted(key.as_bytes());
        Fault::Bad(format!("metadata key {key}: expected once, found twice"))
    })
}

/// Where the last tensor of a whole file would end; the start of the data where that overflows, which is then an error.
fn end(tensors: &[TensorInfo], data_start: u64) -> u64 {
    let ends = tensors
        .iter()
        .map(|t| t.offset.checked_add(t.bytes.max(1) as u64));
    let last = ends
        .max()
        .flatten()
        .and_then(|end| end.checked_add(data_start));
    last.unwrap_or(data_start)
}

/// Turns offsets into positions in the file and checks that each tensor lies in the file and on no other one.
fn place(tensors: &mut [TensorInfo], data_start: u64, file_bytes: u64) -> Result<(), Fault> {
    for t in &mut *tensors {
        let (offset, bytes) = (t.offset, t.bytes.max(1) as u64);
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_bytes => t.offset = start,
            _ => {
                return bad!(
                    "tensor {}: expected {bytes} bytes at {offset} of the data section (which begins at {data_start}), \
                     found a file of {file_bytes} bytes; is it truncated?",
                    quoted(t.name.as_bytes())
                );
            }
        }
    }
    let mut order: Vec<u32> = (0..tensors.len() as u32).collect();
    order.sort_unstable_by_key(|i| tensors[*i as usize].offset);
    for (at, i) in order.iter().enumerate() {
        let next = order.get(at + 1).map(|i| &tensors[*i as usize]);
        let limit = next.map_or(file_bytes, |t| t.offset);
        let t = &tensors[*i as usize];
        let room = limit - t.offset;
        if let Some(next) = next
            && room < t.bytes.max(1) as u64
        {
            return bad!(
                "tensor {}: expected {} bytes at {}, found tensor {} at {}: they overlap",
                quoted(t.name.as_bytes()),
                t.bytes.max(1),
                t.offset,
                quoted(next.name.as_bytes()),
                next.offset
            );
        }
        if t.bytes == 0 {
            let Ok(bytes) = usize::try_from(room) else {
                return bad!(
                    "tensor {}: expected fewer bytes than memory has addresses, found {room}",
                    quoted(t.name.as_bytes())
                );
            };
            tensors[*i as usize].bytes = bytes;
        }
    }
    Ok(())
}
