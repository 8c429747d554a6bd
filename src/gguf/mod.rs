//! Model files: GGUF versions 2 and 3, mapped and checked.
//!
//! [`Gguf::open`] reads the header into memory of its own through one checked reader and maps the file; tensors are
//! handed out by reference into the map. Whatever the file says, opening it returns a model whose tensors lie in the
//! file, aligned and apart, or an error that names the object, what was expected and what was found; memory while
//! reading stays below 64 MiB + 4 × the bytes of the header. [`Writer`] makes such files.
//!
//! | File | What |
//! |---|---|
//! | `reader.rs` | bytes with a count of what is left |
//! | `header.rs` | header → metadata and tensor table |
//! | `value.rs`, `metadata.rs` | values, and the map of them with typed getters |
//! | `tensor.rs` | types, shapes and places of tensors |
//! | `split.rs` | a model in several files |
//! | `map.rs` | the mapped file and advice about its pages |
//! | `place.rs` | where the bytes of a part are: a file of that name, or a range of one that is open |
//! | `writer.rs` | new files |

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

mod header;
mod map;
mod metadata;
mod place;
mod reader;
mod split;
mod tensor;
mod value;
mod writer;

pub use self::map::Advice;
pub use self::metadata::Metadata;
pub use self::tensor::{TensorInfo, TensorType};
pub use self::value::{Array, StringArray, Value};
pub use self::writer::{TensorSpec, Writer};

use self::header::{Content, Header};
use self::map::Source;
use self::place::Place;
use self::reader::{Reader, quoted};
use crate::quant::{Bytes, DType, Tensor};
use crate::{Error, Result};

/// A model file, or all parts of a split one: checked header, mapped weights.
pub struct Gguf {
    parts: Vec<Part>,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, sorted by name.
    by_name: Vec<u32>,
}

/// One file of a model.
pub struct Part {
    place: Place,
    file_bytes: u64,
    version: u32,
    header_bytes: u64,
    data_start: u64,
    alignment: u64,
    source: Arc<Source>,
}

impl Part {
    /// The file; of one that was given open, what errors call it.
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Whether there is a file at [`path`](Self::path): it was not given open.
    pub fn is_named(&self) -> bool {
        self.place.open.is_none()
    }

    /// The file once more, for reads that are told where, and the byte at which the part begins in it.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn reopen(&self) -> Result<(File, u64)> {
        self.place.reopen()
    }

    /// The size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes from the start of the file to the end of the tensor table.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// These bytes: what the file says of itself.
    pub fn header(&self) -> &[u8] {
        &(*self.source).as_ref()[..self.header_bytes as usize] // in the map, so below the address space
    }

    /// Where the data section begins: the header, padded to the alignment.
    pub fn data_start(&self) -> u64 {
        self.data_start
    }

    /// The alignment of tensors in this file, in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }
}

/// A file, opened and its header read, but not joined with its siblings yet.
struct Opened {
    part: Part,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

impl Opened {
    fn new(place: Place, file_bytes: u64, header: Header, source: Source) -> Self {
        let part = Part {
            place,
            file_bytes,
            version: header.version,
            header_bytes: header.header_bytes,
            data_start: header.data_start,
            alignment: header.alignment,
            source: Arc::new(source),
        };
        Self {
            part,
            metadata: header.metadata,
            tensors: header.tensors,
        }
    }

    fn open(path: &Path, content: Content) -> Result<Self> {
        // Asked before opening: a pipe would make `open` wait for a writer.
        let found = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !found.is_file() {
            let what = if found.is_dir() {
                "a directory"
            } else {
                "a pipe or device"
            };
            return Err(Error::BadFile {
                path: path.into(),
                what: format!("expected a GGUF file, found {what}"),
            });
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let len = file.metadata().map_err(|e| Error::io(path, e))?.len();
        Self::read(Place::named(path), &file, 0..len, content)
    }

    /// What lies in `bytes` of `file`, which there are.
    fn read(place: Place, file: &File, bytes: Range<u64>, content: Content) -> Result<Self> {
        let len = bytes.end - bytes.start;
        // Not from the map: a file that another program truncates meanwhile would end this one.
        let source = BufReader::with_capacity(1 << 16, place::ReadAt::new(file, bytes.clone()));
        let header =
            header::parse(&mut Reader::new(source, len), content).map_err(|e| e.at(&place.path))?;
        let source = match content {
            Content::Weights => Source::map(file, bytes).map_err(|e| Error::io(&place.path, e))?,
            Content::Ignored => Source::Absent,
        };
        Ok(Self::new(place, len, header, source))
    }

    fn bad(&self, what: impl Into<String>) -> Error {
        Error::BadFile {
            path: self.part.path().into(),
            what: what.into(),
        }
    }

    fn split_keys(&self) -> Result<Option<split::Keys>> {
        split::Keys::of(&self.metadata).map_err(|e| self.bad(e.to_string()))
    }
}

impl Gguf {
    /// Opens a model file. If it is one part of a split model (`model-00002-of-00005.gguf`), all parts are opened.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be opened or mapped, [`Error::BadFile`] if it is no sound GGUF file or the
    /// parts do not belong together, [`Error::OutOfMemory`].
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_content(path, Content::Weights)
    }

    /// The header of a model file, of all parts of a split one, and nothing after it: the weights may be missing. Its
    /// tensors have sizes and no bytes.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_header(path: &Path) -> Result<Self> {
        Self::open_content(path, Content::Ignored)
    }

    /// A model that is a range of bytes of an open file: an asset that lies in an app's package. Its position is neither
    /// used nor moved. It must be a whole model, no part of several, and begin at a multiple of 4, as `zipalign` puts
    /// what is not compressed.
    ///
    /// # Errors
    /// As [`open`](Self::open), and [`Error::Invalid`] for a range that the file does not have; the path in them is
    /// `<open file>`.
    pub fn open_file(file: File, bytes: Range<u64>) -> Result<Self> {
        Self::open_range(Place::open(file, bytes)?, Content::Weights)
    }

    /// As [`open_header`](Self::open_header), of an open file.
    ///
    /// # Errors
    /// As [`open_file`](Self::open_file).
    pub fn open_file_header(file: File, bytes: Range<u64>) -> Result<Self> {
        Self::open_range(Place::open(file, bytes)?, Content::Ignored)
    }

    /// The header of the same model once more.
    ///
    /// # Errors
    /// As [`open_header`](Self::open_header).
    pub fn reopen_header(&self) -> Result<Self> {
        let place = &self.parts[0].place;
        match place.open {
            None => Self::open_header(&place.path),
            Some(_) => Self::open_range(place.clone(), Content::Ignored),
        }
    }

    fn open_range(place: Place, content: Content) -> Result<Self> {
        let open = place.open.clone().expect("the caller has an open file");
        let opened = Opened::read(place, &open.file, open.bytes.clone(), content)?;
        Self::whole(opened, "in an open file")
    }

    /// A model that has no siblings to be found.
    fn whole(opened: Opened, place: &str) -> Result<Self> {
        match opened.split_keys()? {
            None => Self::join(vec![opened]),
            Some(keys) => Err(opened.bad(format!(
                "expected a whole model {place}, found part {} of {}",
                keys.no.saturating_add(1),
                keys.count
            ))),
        }
    }

    fn open_content(path: &Path, content: Content) -> Result<Self> {
        let opened = Opened::open(path, content)?;
        match opened.split_keys()? {
            None => Self::join(vec![opened]),
            Some(keys) => Self::open_parts(opened, &keys, content),
        }
    }

    /// A model file in memory: a `Vec<u8>`, `include_bytes!`, an asset that the app has mapped. It must be a whole
    /// one, no part of several. Memory that does not begin at a multiple of 16 is copied.
    ///
    /// # Errors
    /// As [`open`](Self::open); the path in them is `<memory>`.
    pub fn from_bytes(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let path = Path::new("<memory>");
        let given = bytes.as_ref();
        let len = given.len() as u64;
        let header = header::parse(&mut Reader::new(given, len), Content::Weights)
            .map_err(|e| e.at(path))?;
        let source = Source::memory(Box::new(bytes));
        let opened = Opened::new(Place::named(path), len, header, source);
        Self::whole(opened, "in memory")
    }

    fn open_parts(opened: Opened, keys: &split::Keys, content: Content) -> Result<Self> {
        let path = opened.part.path().to_owned();
        let (no, count) = (keys.no, keys.count);
        let name = split::PartName::of(&path)
            .filter(|n| n.no.checked_sub(1) == Some(no) && n.count == count);
        let Some(name) = name else {
            return Err(opened.bad(format!(
                "expected a file name ending in `-{:05}-of-{count:05}.gguf` for part {} of {count}, found another",
                no.saturating_add(1),
                no.saturating_add(1)
            )));
        };
        let mut opened = Some(opened);
        let mut parts = Vec::new();
        let mut n_tensors = 0;
        for i in 0..count {
            let path = split::part_path(&path, name.prefix, i + 1, count);
            let mut part = match opened.take_if(|_| i == no) {
                Some(part) => part,
                None => Opened::open(&path, content).map_err(|e| match e {
                    Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                        Error::BadFile {
                            path: path.clone(),
                            what: format!("expected part {} of {count}, found no file", i + 1),
                        }
                    }
                    e => e,
                })?,
            };
            let found = part.split_keys()?;
            let expect = |key: &str, expected: usize, found: usize| {
                if expected == found {
                    return Ok(());
                }
                Err(part.bad(format!(
                    "metadata key `{key}`: expected {expected}, found {found}"
                )))
            };
            let Some(found) = found else {
                return Err(part.bad(format!(
                    "expected part {} of {count}, found a file without `{}`",
                    i + 1,
                    split::COUNT
                )));
            };
            expect(split::COUNT, count, found.count)?;
            expect(split::NO, i, found.no)?;
            if let (Some(expected), Some(found)) = (keys.n_tensors, found.n_tensors) {
                expect(split::TENSORS, expected, found)?;
            }
            n_tensors += part.tensors.len();
            if n_tensors > header::MAX_TENSORS {
                return Err(part.bad(format!(
                    "expected at most {} tensors in all parts, found more",
                    header::MAX_TENSORS
                )));
            }
            if i > 0 {
                part.metadata = Metadata::new(); // dropped now: many parts together could exceed the bound
            }
            parts.push(part);
        }
        let model = Self::join(parts)?;
        match keys.n_tensors {
            Some(n) if n != model.tensors.len() => Err(Error::BadFile {
                path,
                what: format!(
                    "metadata key `{}`: expected {n} tensors in all {count} parts, found {}",
                    split::TENSORS,
                    model.tensors.len()
                ),
            }),
            _ => Ok(model),
        }
    }

    /// Joins the parts, of which the first has the metadata.
    fn join(opened: Vec<Opened>) -> Result<Self> {
        let mut parts = Vec::with_capacity(opened.len());
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut metadata = None;
        for (i, mut from) in opened.into_iter().enumerate() {
            from.tensors.iter_mut().for_each(|t| t.part = i);
            tensors.append(&mut from.tensors);
            metadata.get_or_insert(from.metadata);
            parts.push(from.part);
        }
        let mut metadata = metadata.expect("a model has at least one part");
        for key in [split::NO, split::COUNT, split::TENSORS] {
            metadata.remove(key);
        }
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        let name = |i: &u32| &*tensors[*i as usize].name;
        by_name.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        if let Some(pair) = by_name.windows(2).find(|w| name(&w[0]) == name(&w[1])) {
            let second = &tensors[pair[0].max(pair[1]) as usize];
            return Err(Error::BadFile {
                path: parts[second.part].path().into(),
                what: format!(
                    "tensor {}: expected once, found twice",
                    quoted(second.name.as_bytes())
                ),
            });
        }
        Ok(Self {
            parts,
            metadata,
            tensors,
            by_name,
        })
    }

    /// The file, or the first of its parts.
    pub fn path(&self) -> &Path {
        self.parts[0].path()
    }

    /// The files of the model, in order: one, unless it is split.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].version
    }

    /// The size of all files.
    pub fn file_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.file_bytes).sum()
    }

    /// The size of all headers.
    pub fn header_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.header_bytes).sum()
    }

    /// The alignment of tensors in the first file, in bytes.
    pub fn alignment(&self) -> u64 {
        self.parts[0].alignment
    }

    /// The metadata, without the `split.` keys: they describe a file, and this is the whole model.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors, in the order of the files.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        let at = self
            .by_name
            .binary_search_by(|i| (*self.tensors[*i as usize].name).cmp(name));
        at.ok().map(|at| &self.tensors[self.by_name[at] as usize])
    }

    fn expect_tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| {
            Error::BadModel(format!(
                "tensor {}: expected in {}, found none of that name",
                quoted(name.as_bytes()),
                self.path().display()
            ))
        })
    }

    /// The tensor called `name`, by reference into the file.
    ///
    /// # Errors
    /// [`Error::BadModel`] if there is none, [`Error::Unsupported`] if its type is no [`DType`].
    pub fn load(&self, name: &str) -> Result<Tensor> {
        let info = self.expect_tensor(name)?;
        let Some(dtype) = info.dtype.dtype() else {
            let names: Vec<_> = DType::ALL.iter().map(|t| t.name()).collect();
            return Err(Error::Unsupported {
                kind: "tensor type",
                found: format!(
                    "{} (tensor {})",
                    info.dtype,
                    quoted(name.as_bytes()).trim_matches('`')
                ),
                supported: names.join(", "),
            });
        };
        Ok(Tensor {
            name: info.name.clone(),
            dtype,
            shape: info.shape,
            data: self.bytes_of(info),
        })
    }

    /// The bytes of the tensor called `name`, of whatever type.
    ///
    /// # Errors
    /// [`Error::BadModel`] if there is none.
    pub fn raw(&self, name: &str) -> Result<Bytes> {
        self.expect_tensor(name).map(|info| self.bytes_of(info))
    }

    fn bytes_of(&self, info: &TensorInfo) -> Bytes {
        let source = self.parts[info.part].source.clone();
        if let Source::Absent = *source {
            return Bytes::new(source, 0..0);
        }
        let start = info.offset as usize; // in the map, so below the address space
        let range = start..start + info.bytes;
        match *source {
            Source::Map(..) => Bytes::paged(source, range),
            _ => Bytes::new(source, range),
        }
    }

    /// Tells the operating system how the tensor called `name` will be read. Whole pages: neighbours share the first
    /// and the last. Nothing happens on systems without such advice and for models in memory.
    ///
    /// # Errors
    /// [`Error::BadModel`] if there is no such tensor, [`Error::Io`] if the operating system refuses.
    pub fn advise(&self, name: &str, advice: Advice) -> Result<()> {
        let info = self.expect_tensor(name)?;
        let (part, start) = (&self.parts[info.part], info.offset as usize);
        if let Source::Absent = *part.source {
            return Ok(());
        }
        part.source
            .advise(start..start + info.bytes, advice)
            .map_err(|e| Error::io(part.path(), e))
    }

    /// Tells the operating system how all tensors will be read.
    ///
    /// # Errors
    /// [`Error::Io`] if the operating system refuses.
    pub fn advise_all(&self, advice: Advice) -> Result<()> {
        for part in &self.parts {
            let len = (*part.source).as_ref().len();
            part.source
                .advise(len.min(part.data_start as usize)..len, advice)
                .map_err(|e| Error::io(part.path(), e))?;
        }
        Ok(())
    }

    /// Reads the tensors called `names` into memory, in this order, on a thread of its own. What is not in the file is
    /// left out, and so is what the system refuses: reading ahead is a favour.
    pub fn read_ahead<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> ReadAhead {
        let tensors = names.into_iter().filter_map(|name| self.tensor(name));
        let place = |t: &TensorInfo| (t.part, t.offset as usize..t.offset as usize + t.bytes);
        let places: Vec<_> = tensors.map(place).collect();
        let sources: Vec<_> = self.parts.iter().map(|p| p.source.clone()).collect();
        let wanted = Arc::new(());
        let still = Arc::downgrade(&wanted);
        let read = move || {
            for (part, bytes) in places {
                for start in bytes.clone().step_by(READ_AHEAD) {
                    if still.strong_count() == 0 {
                        return;
                    }
                    let piece = start..bytes.end.min(start + READ_AHEAD);
                    let _ = sources[part].advise(piece, Advice::Populate);
                }
            }
        };
        let builder = std::thread::Builder::new().name("kinglet-read".into());
        let _ = builder.spawn(read); // without a thread pages come when they are used
        ReadAhead { _wanted: wanted }
    }

    /// The value of `general.architecture`: `lfm2`, `llama`.
    ///
    /// # Errors
    /// [`Error::BadModel`] if there is none.
    pub fn architecture(&self) -> Result<&str> {
        self.metadata.str("general.architecture")
    }

    /// What is odd about a file that can be opened nevertheless; one line each.
    pub fn problems(&self) -> Vec<String> {
        let mut out = Vec::new();
        for key in ["general.architecture", "tokenizer.ggml.model"] {
            match self.metadata.get(key) {
                None => out.push(format!("metadata key `{key}` is missing")),
                Some(v) if v.as_str().is_none() => {
                    out.push(format!("metadata key `{key}` is {v}, not text"));
                }
                Some(_) => {}
            }
        }
        if self.metadata.get("tokenizer.ggml.tokens").is_none() {
            out.push("metadata key `tokenizer.ggml.tokens` is missing: no vocabulary".into());
        }
        for (key, value) in self.metadata.iter() {
            if value.as_bytes().is_some() && value.as_str().is_none() {
                let key = quoted(key.as_bytes());
                out.push(format!("metadata key {key} is text that is not UTF-8"));
            }
        }
        if self.tensors.is_empty() {
            out.push("no tensors".into());
        }
        let mut foreign = BTreeMap::new();
        for t in self.tensors.iter().filter(|t| t.dtype.dtype().is_none()) {
            *foreign.entry(t.dtype.id()).or_insert(0) += 1;
        }
        for (id, n) in foreign {
            let dtype = TensorType::from_id(id);
            out.push(format!(
                "{n} of the tensors have the unsupported type {dtype}"
            ));
        }
        if self.parts.len() == 1 && split::PartName::of(self.path()).is_some_and(|n| n.count > 1) {
            out.push("named as a part of several, but the file is whole".into());
        }
        let mut tensors: Vec<_> = self.tensors.iter().collect();
        tensors.sort_unstable_by_key(|t| (t.part, t.offset));
        for tensors in tensors.chunk_by(|a, b| a.part == b.part) {
            layout_problems(&self.parts[tensors[0].part], tensors, &mut out);
        }
        if out.len() > MAX_PROBLEMS {
            let more = out.len() - MAX_PROBLEMS;
            out.truncate(MAX_PROBLEMS);
            out.push(format!("and {more} more problems"));
        }
        out
    }
}

/// Tensors that are being read into memory. The reading ends with this.
pub struct ReadAhead {
    _wanted: Arc<()>,
}

/// Bytes read before a look whether they are still wanted.
const READ_AHEAD: usize = 4 << 20;

/// Lines of [`Gguf::problems`], which a file could otherwise make as long as it likes.
const MAX_PROBLEMS: usize = 100;

/// Gaps between the tensors of `part`, which are sorted by offset, and bytes after them.
fn layout_problems(part: &Part, tensors: &[&TensorInfo], out: &mut Vec<String>) {
    let name = part.path().display();
    let (mut end, mut gaps, mut gap_bytes) = (part.data_start, 0usize, 0u64);
    for t in tensors {
        gaps += usize::from(t.offset > end);
        gap_bytes += t.offset - end;
        // No further than the next tensor, which is aligned and does not overlap this one.
        end = (t.offset + t.bytes as u64).next_multiple_of(part.alignment);
    }
    if gaps > 0 {
        out.push(format!(
            "{name}: {gap_bytes} unused bytes in {gaps} places before tensors"
        ));
    }
    if part.file_bytes > end {
        let n = part.file_bytes - end;
        out.push(format!("{name}: {n} bytes after the last tensor"));
    } else if part.file_bytes < end {
        let alignment = part.alignment;
        out.push(format!(
            "{name}: the last tensor is not padded to {alignment} bytes"
        ));
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path())
            .field("parts", &self.parts.len())
            .field("keys", &self.metadata.len())
            .field("tensors", &self.tensors.len())
            .finish()
    }
}
