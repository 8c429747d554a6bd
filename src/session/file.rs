//! State files: a session on disk, to go on with in another process as if it had never ended.
//!
//! | Bytes | What (little-endian) |
//! |---|---|
//! | 8 | `\x8fKSTATE\n` |
//! | 4, 4 | version, positions of a page of keys and values |
//! | 16, 16 | hashes of the model and of its tokenizer |
//! | 1, 1, 2 | types of keys and of values, which keys are attended to: 0 for all, else a hash of the policy |
//! | 4, 8 | tokens, tokens that fitted into the session |
//! | 7 × 16 | sections: bytes, XXH3 of them |
//! | 8 | XXH3 of all before |
//!
//! Sections follow without gaps, in this order; where they say "or none" they may be empty:
//!
//! 1. tokens, 4 bytes each;
//! 2. the step of each token: 0 prefill, 1 decode;
//! 3. keys and values as they are cached, and what queries left beside them, layer by layer, see
//!    [`Backend::kv_save`](crate::backend::Backend::kv_save);
//! 4. what the convolutions remember, floats, or none: they are rebuilt then;
//! 5. logits after the last token, floats, or none;
//! 6. seed and state of the sampler's generator, or none;
//! 7. what the application adds: for a chat, its messages.
//!
//! The model's hash is XXH3-128 over the header of each part, metadata and tensor table, over its size, and over a sample
//! of each tensor: it does not read gigabytes, tells fine-tunes and quantizations of one model apart, and would miss a
//! file in which somebody changed single weights elsewhere. Everything is compared with what the model needs, and with
//! the size of the file, before anything is allocated for it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::replace::{self, Os};
use super::timeline::Timeline;
use super::{Model, Session, SessionOptions};
use crate::backend::notes::NoteShape;
use crate::backend::{Attention, KV_PAGE, KvType, KvTypes, Step};
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::config::Config;

const MAGIC: &[u8; 8] = b"\x8fKSTATE\n";
const VERSION: u32 = 1;

/// Sections of a file.
const N_SECTIONS: usize = 7;
const TOKENS: usize = 0;
const STEPS: usize = 1;
const KV: usize = 2;
const CONVS: usize = 3;
const LOGITS: usize = 4;
const GENERATOR: usize = 5;
const NOTE: usize = 6;
const NAMES: [&str; N_SECTIONS] = [
    "tokens",
    "steps",
    "keys and values",
    "convolutions",
    "logits",
    "generator",
    "note",
];

const HEADER_BYTES: usize = 8 + 4 + 4 + 16 + 16 + 4 + 4 + 8 + N_SECTIONS * 16 + 8;

/// Tokens that no session can have.
const MAX_TOKENS: usize = 1 << 24;

/// Bytes that an application may add.
pub const MAX_NOTE_BYTES: usize = 64 << 20;

/// Bytes at each end of a tensor that its sample has.
const SAMPLE: usize = 64;

/// What a state file holds beside the session.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Extra {
    /// Seed and state of the generator, see [`Sampler::generator`](crate::sampler::Sampler::generator).
    pub generator: Option<[u64; 2]>,
    /// Bytes of the application, at most [`MAX_NOTE_BYTES`].
    pub note: Vec<u8>,
}

/// Of the sizes and headers of all files.
fn headers(gguf: &Gguf) -> Xxh3 {
    let mut hash = Xxh3::new();
    for part in gguf.parts() {
        hash.update(&part.file_bytes().to_le_bytes());
        hash.update(part.header());
    }
    hash
}

/// What tells files apart that differ in more than the values of weights, of which it reads none.
pub(super) fn header_hash(gguf: &Gguf) -> u64 {
    headers(gguf).digest()
}

/// What tells models apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hashes {
    pub(super) model: u128,
    tokenizer: u128,
}

impl Hashes {
    pub(super) fn of(gguf: &Gguf) -> Result<Self> {
        let mut model = headers(gguf);
        for info in gguf.tensors() {
            let bytes = gguf.raw(&info.name)?;
            let sample = SAMPLE.min(bytes.len());
            model.update(&bytes[..sample]);
            model.update(&bytes[bytes.len() / 2..][..sample.min(bytes.len() - bytes.len() / 2)]);
            model.update(&bytes[bytes.len() - sample..]);
        }
        let mut tokenizer = Xxh3::new();
        let mut value = Vec::new();
        for (key, of) in gguf.metadata().iter() {
            if key.starts_with("tokenizer.") {
                value.clear();
                of.write(&mut value);
                tokenizer.update(&(key.len() as u64).to_le_bytes());
                tokenizer.update(key.as_bytes());
                tokenizer.update(&value);
            }
        }
        Ok(Self {
            model: model.digest128(),
            tokenizer: tokenizer.digest128(),
        })
    }
}

/// Size and checksum of a section.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Section {
    bytes: u64,
    hash: u64,
}

/// The fixed part of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Header {
    hashes: Hashes,
    kv: [u8; 2],
    sparsity: u16,
    n_tokens: u32,
    n_ctx: u64,
    sections: [Section; N_SECTIONS],
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((KV_PAGE as u32).to_le_bytes());
        out.extend(self.hashes.model.to_le_bytes());
        out.extend(self.hashes.tokenizer.to_le_bytes());
        out.extend(self.kv);
        out.extend(self.sparsity.to_le_bytes());
        out.extend(self.n_tokens.to_le_bytes());
        out.extend(self.n_ctx.to_le_bytes());
        for section in &self.sections {
            out.extend(section.bytes.to_le_bytes());
            out.extend(section.hash.to_le_bytes());
        }
        out.extend(hash_of(&out).to_le_bytes());
        out
    }

    /// What is wrong is told as "expected, found".
    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, String> {
        let mut rest = &bytes[..];
        if take(&mut rest) != *MAGIC {
            return Err("expected a state file, found another".into());
        }
        let version = u32::from_le_bytes(take(&mut rest));
        if version != VERSION {
            return Err(format!("version: expected {VERSION}, found {version}"));
        }
        let (checked, hash) = bytes.split_at(HEADER_BYTES - 8);
        if hash != hash_of(checked).to_le_bytes() {
            return Err("header: expected to match its checksum, found it damaged".into());
        }
        let page = u32::from_le_bytes(take(&mut rest));
        if page as usize != KV_PAGE {
            return Err(format!("page: expected {KV_PAGE} positions, found {page}"));
        }
        let hashes = Hashes {
            model: u128::from_le_bytes(take(&mut rest)),
            tokenizer: u128::from_le_bytes(take(&mut rest)),
        };
        let kv = take(&mut rest);
        Ok(Self {
            hashes,
            kv,
            sparsity: u16::from_le_bytes(take(&mut rest)),
            n_tokens: u32::from_le_bytes(take(&mut rest)),
            n_ctx: u64::from_le_bytes(take(&mut rest)),
            sections: std::array::from_fn(|_| Section {
                bytes: u64::from_le_bytes(take(&mut rest)),
                hash: u64::from_le_bytes(take(&mut rest)),
            }),
        })
    }
}

/// The next bytes of a header.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_first_chunk().expect("a whole header");
    *rest = tail;
    *head
}

fn hash_of(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}

/// A state file, opened: its header is sound, its size is what the header says, the rest is not read yet.
pub struct StateFile {
    path: PathBuf,
    file: File,
    header: Header,
    /// The section that comes next.
    next: usize,
}

impl StateFile {
    /// Opens the file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::BadFile`] if it is no state file, of another version, damaged or cut off.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let bad = |what: String| Error::BadFile {
            path: path.into(),
            what,
        };
        // Asked before opening: a pipe would make `open` wait for a writer.
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(bad(
                "expected a state file, found a folder, pipe or device".into()
            ));
        }
        let mut file = File::open(path).map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact(&mut bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                bad(format!("expected a state file, found {found} bytes"))
            }
            _ => io(e),
        })?;
        let header = Header::decode(&bytes).map_err(&bad)?;
        let mut sizes = header.sections.iter().map(|section| section.bytes);
        let expected = sizes.try_fold(HEADER_BYTES as u64, u64::checked_add);
        if expected != Some(found) {
            let expected = expected.map_or("more than fit".into(), |n| n.to_string());
            return Err(bad(format!("expected {expected} bytes, found {found}")));
        }
        Ok(Self {
            path: path.into(),
            file,
            header,
            next: 0,
        })
    }

    /// Whether the file at `path` begins as one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn recognizes(path: &Path) -> Result<bool> {
        let io = |e| Error::io(path, e);
        let mut magic = [0; MAGIC.len()];
        let is_file = fs::metadata(path).map_err(io)?.is_file();
        match is_file.then(|| File::open(path)?.read_exact(&mut magic)) {
            Some(Ok(())) => Ok(magic == *MAGIC),
            Some(Err(e)) if e.kind() != io::ErrorKind::UnexpectedEof => Err(io(e)),
            _ => Ok(false),
        }
    }

    /// Tokens of the session.
    pub fn n_tokens(&self) -> usize {
        self.header.n_tokens as usize
    }

    /// Whether `model` can go on with it, with the cache types of `options` and the keys that they attend to.
    ///
    /// # Errors
    /// [`Error::Mismatch`], which tells why not.
    pub fn fits(&self, model: &Model, options: &SessionOptions) -> Result<()> {
        let kv = options.kv;
        let hashes = model.hashes()?;
        let other = |what: String| {
            Err(Error::Mismatch {
                path: self.path.clone(),
                what,
            })
        };
        if self.header.hashes != *hashes {
            return other(if self.header.hashes.tokenizer == hashes.tokenizer {
                "made with another model of the same vocabulary".into()
            } else {
                "made with another model".into()
            });
        }
        if self.header.kv != codes(kv) {
            let name = |code: u8| {
                KvType::ALL
                    .get(usize::from(code))
                    .map_or("unknown", |k| k.name())
            };
            let [keys, values] = self.header.kv;
            return other(format!(
                "cache types: expected {} keys and {} values, found {} and {}",
                kv.keys.name(),
                kv.values.name(),
                name(keys),
                name(values)
            ));
        }
        if self.header.sparsity != attention_hash(options) {
            let found = match self.header.sparsity {
                0 => "dense",
                _ => "another policy, or another budget",
            };
            let expected = options.attention();
            return other(format!("attention: expected {expected}, found {found}"));
        }
        Ok(())
    }

    /// What it holds beside the session, which is skipped.
    ///
    /// # Errors
    /// As [`StateFile::load`], without comparisons with a model.
    pub fn extra(mut self) -> Result<Extra> {
        use io::{Seek, SeekFrom};
        let sessions = &self.header.sections[self.next..GENERATOR];
        let bytes = sessions.iter().map(|section| section.bytes).sum::<u64>();
        let bytes = i64::try_from(bytes).expect("below the size of a file");
        let skipped = self.file.seek(SeekFrom::Current(bytes));
        skipped.map_err(|e| Error::io(&self.path, e))?;
        self.next = GENERATOR;
        self.read_extra()
    }

    /// Makes the session that was saved.
    ///
    /// # Errors
    /// [`Error::BadFile`] if what it holds is damaged or not what `model` needs, [`Error::Mismatch`] as
    /// [`StateFile::fits`], [`Error::ContextFull`] if it has more tokens than `options` allow, [`Error::Io`],
    /// [`Error::OutOfMemory`].
    pub fn load(mut self, model: &Model, options: &SessionOptions) -> Result<(Session, Extra)> {
        self.fits(model, options)?;
        let mut session = Session::new(model, options)?;
        let config = &model.info().config;
        let n = self.n_tokens();
        if n > session.n_ctx {
            return Err(Error::ContextFull {
                needed: n,
                n_ctx: session.n_ctx,
            });
        }
        let heads: usize = config.n_kv_heads.iter().sum();
        let position_bytes = heads * options.kv.row_bytes(config.head_dim);
        let noted = noted_bytes(config, options, n)?;
        let conv_bytes = size_of_val(&*session.engine.conv_rows()?);
        self.expect(TOKENS, &[n * size_of::<u32>()])?;
        self.expect(STEPS, &[n])?;
        self.expect(KV, &[n * position_bytes + noted])?;
        self.expect(CONVS, &[0, conv_bytes])?;
        self.expect(LOGITS, &[0, config.n_vocab * size_of::<f32>()])?;

        let tokens = self.section(TOKENS)?;
        let tokens = tokens
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u32::from_le_bytes(*bytes));
        let tokens: Vec<u32> = tokens.collect();
        if let Some(token) = tokens
            .iter()
            .find(|token| **token as usize >= config.n_vocab)
        {
            let n_vocab = config.n_vocab;
            return Err(self.bad(format!(
                "token: expected one below {n_vocab}, found {token}"
            )));
        }
        let steps = self.section(STEPS)?.into_iter().map(|step| match step {
            0 => Ok(Step::Prefill),
            1 => Ok(Step::Decode),
            _ => Err(self.bad(format!("step: expected 0 or 1, found {step}"))),
        });
        let steps = steps.collect::<Result<Vec<_>>>()?;
        let mut hash = Xxh3::new();
        let (file, path) = (&mut self.file, &self.path);
        session.engine.load(n, &mut |bytes| {
            file.read_exact(bytes).map_err(|e| Error::io(path, e))?;
            hash.update(bytes);
            Ok(())
        })?;
        self.pass(KV, hash.digest())?;
        let convs = self.floats(CONVS)?;
        let exact = !convs.is_empty() || conv_bytes == 0;
        if exact {
            session.engine.set_conv_rows(&convs);
        }
        let logits = self.floats(LOGITS)?;
        session.line = Timeline::resumed(tokens, steps, logits, exact);
        Ok((session, self.read_extra()?))
    }

    fn read_extra(mut self) -> Result<Extra> {
        self.expect(GENERATOR, &[0, 16])?;
        let found = self.header.sections[NOTE].bytes;
        if found > MAX_NOTE_BYTES as u64 {
            return Err(self.bad(format!(
                "note: expected at most {MAX_NOTE_BYTES} bytes, found {found}"
            )));
        }
        let generator = self.section(GENERATOR)?;
        let mut words = generator
            .as_chunks()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes));
        Ok(Extra {
            generator: words
                .next()
                .zip(words.next())
                .map(|(seed, state)| [seed, state]),
            note: self.section(NOTE)?,
        })
    }

    fn bad(&self, what: String) -> Error {
        Error::BadFile {
            path: self.path.clone(),
            what,
        }
    }

    /// That a section has one of these sizes.
    fn expect(&self, which: usize, sizes: &[usize]) -> Result<()> {
        let found = self.header.sections[which].bytes;
        if sizes.iter().any(|size| *size as u64 == found) {
            return Ok(());
        }
        let sizes: Vec<_> = sizes.iter().map(usize::to_string).collect();
        Err(self.bad(format!(
            "{}: expected {} bytes, found {found}",
            NAMES[which],
            sizes.join(" or ")
        )))
    }

    /// Ends the section that comes next, whose bytes have `hash`.
    fn pass(&mut self, which: usize, hash: u64) -> Result<()> {
        assert_eq!(self.next, which, "sections are read in order");
        self.next += 1;
        if self.header.sections[which].hash == hash {
            return Ok(());
        }
        Err(self.bad(format!(
            "{}: expected to match their checksum, found them damaged",
            NAMES[which]
        )))
    }

    /// The bytes of the next section, whose size was found to be right.
    fn section(&mut self, which: usize) -> Result<Vec<u8>> {
        let bytes = self.header.sections[which].bytes as usize; // of a file, or of what a model needs
        let mut out = Vec::new();
        let no_memory = |_| Error::OutOfMemory {
            what: NAMES[which].into(),
            bytes,
        };
        out.try_reserve_exact(bytes).map_err(no_memory)?;
        out.resize(bytes, 0);
        let read = self.file.read_exact(&mut out);
        read.map_err(|e| Error::io(&self.path, e))?;
        self.pass(which, hash_of(&out))?;
        Ok(out)
    }

    fn floats(&mut self, which: usize) -> Result<Vec<f32>> {
        let bytes = self.section(which)?;
        let floats = bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes));
        Ok(floats.collect())
    }
}

/// How the file names the types of keys and of values: by their place in [`KvType::ALL`].
fn codes(kv: KvTypes) -> [u8; 2] {
    [kv.keys, kv.values].map(|kind| kind as u8)
}

/// 0 for dense attention. What is read with some keys left out is no beginning for a session that reads them all, nor the
/// other way round: the first would tell as exact what is not.
fn attention_hash(options: &SessionOptions) -> u16 {
    if options.sparsity.is_dense() && options.delta.is_none() {
        return 0;
    }
    (hash_of(options.attention().as_bytes()) as u16).max(1)
}

/// Bytes of what the queries of `n` tokens left beside keys and values.
fn noted_bytes(config: &Config, options: &SessionOptions, n: usize) -> Result<usize> {
    let kv = options.kv_options()?;
    let of_layer = |(layer, n_kv_heads): (usize, &usize)| {
        let attention = Attention {
            n_heads: config.n_heads,
            n_kv_heads: *n_kv_heads,
            head_dim: config.head_dim,
            scale: 1.0,
            window: None,
        };
        let select = kv.of_layer(layer).select;
        let notes = NoteShape::all(select.as_deref(), &attention);
        notes.map(|shape| shape.bytes(n)).into_iter().sum::<usize>()
    };
    let layers = config.n_kv_heads.iter().enumerate();
    let attending = layers.filter(|(_, n_kv_heads)| **n_kv_heads > 0);
    Ok(attending.map(of_layer).sum())
}

impl Session {
    /// Writes the session to `path`. A file of that name is replaced when the new one is complete and safe, and stays
    /// as it is if that fails.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] if the note is too long.
    pub fn save(&self, path: &Path, extra: &Extra) -> Result<()> {
        match self.save_on(&Os, path, extra) {
            // What the GPU held is computed once more: an app that goes to the background saves when it is refused.
            Err(Error::Device { .. }) => {
                let mut fork = self.fork()?;
                fork.rebuild()?;
                fork.save_on(&Os, path, extra)
            }
            done => done,
        }
    }

    /// The session in the file at `path`, see [`StateFile`].
    ///
    /// # Errors
    /// As [`StateFile::open`] and [`StateFile::load`].
    pub fn load(model: &Model, path: &Path, options: &SessionOptions) -> Result<Self> {
        let (session, _) = StateFile::open(path)?.load(model, options)?;
        Ok(session)
    }

    fn save_on(&self, disk: &dyn replace::Disk, path: &Path, extra: &Extra) -> Result<()> {
        let Extra { generator, note } = extra;
        if note.len() > MAX_NOTE_BYTES {
            let n = note.len();
            return Err(Error::Invalid(format!(
                "note: expected at most {MAX_NOTE_BYTES} bytes, found {n}"
            )));
        }
        self.check_behind()?;
        let line = &self.line;
        let n = line.tokens.len();
        assert!(n <= MAX_TOKENS, "below the largest context");
        let tokens: Vec<u8> = line.tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
        let steps: Vec<u8> = line
            .steps
            .iter()
            .map(|step| u8::from(*step == Step::Decode))
            .collect();
        let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let convs = match line.exact_from {
            Some(_) => floats(&self.engine.conv_rows()?),
            None => Vec::new(),
        };
        let logits = floats(&line.logits);
        let generator: Vec<u8> = generator
            .iter()
            .flatten()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let held: [&[u8]; N_SECTIONS] = [&tokens, &steps, &[], &convs, &logits, &generator, note];
        let mut sections = held.map(|bytes| Section {
            bytes: bytes.len() as u64,
            hash: hash_of(bytes),
        });
        // Once for the checksum, which stands before them, and once to write: reading memory is cheap.
        let mut hash = Xxh3::new();
        self.engine.save(n, &mut |bytes| {
            sections[KV].bytes += bytes.len() as u64;
            hash.update(bytes);
            Ok(())
        })?;
        sections[KV].hash = hash.digest();
        let header = Header {
            hashes: *self.model.hashes()?,
            kv: codes(self.kv),
            sparsity: attention_hash(&self.options()),
            n_tokens: n as u32,
            n_ctx: self.n_ctx as u64,
            sections,
        };
        replace::replace(disk, path, &mut |out: &mut dyn Write| {
            out.write_all(&header.encode())?;
            for (which, bytes) in held.into_iter().enumerate() {
                out.write_all(bytes)?;
                if which == KV {
                    let mut sink =
                        |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io(path, e));
                    self.engine.save(n, &mut sink).map_err(|e| match e {
                        Error::Io { source, .. } => source,
                        e => io::Error::other(e),
                    })?;
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::ops::ControlFlow;

    use super::replace::Disk;
    use super::*;
    use crate::session::LoadOptions;

    /// What happens at an operation of the disk.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Fault {
        /// It fails; what comes after works.
        Fails,
        /// It is the first that does not happen any more, as when the process is killed.
        Dies,
        /// It is done in part, and is the last.
        DiesInside,
    }

    /// A disk at whose operation number `at` something happens.
    struct Faulty {
        at: usize,
        fault: Fault,
        n: Cell<usize>,
    }

    impl Faulty {
        fn new(at: usize, fault: Fault) -> Self {
            let n = Cell::new(0);
            Self { at, fault, n }
        }

        /// Counts an operation; an error if it does not happen, `true` if it happens in part.
        fn step(&self) -> io::Result<bool> {
            let n = self.n.replace(self.n.get() + 1);
            let error = || Err(io::ErrorKind::StorageFull.into());
            match self.fault {
                Fault::Fails if n == self.at => error(),
                Fault::Dies if n >= self.at => error(),
                Fault::DiesInside if n > self.at => error(),
                Fault::DiesInside if n == self.at => Ok(true),
                _ => Ok(false),
            }
        }
    }

    impl Disk for Faulty {
        fn create(&self, path: &Path) -> io::Result<File> {
            self.step()?;
            Os.create(path)
        }

        fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
            let most = bytes.len().min(16 << 10); // many operations
            let n = if self.step()? { most / 2 } else { most };
            Os.write(file, &bytes[..n])
        }

        fn sync(&self, file: &File) -> io::Result<()> {
            self.step()?;
            Os.sync(file)
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step()?;
            Os.rename(from, to)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.step()?;
            Os.remove(path)
        }
    }

    fn tiny() -> Model {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lfm2-tiny-random.gguf");
        let options = LoadOptions {
            threads: 1,
            ..LoadOptions::default()
        };
        Model::load(&path, &options).unwrap()
    }

    /// A session of `n` tokens from `first` on, the last of them decoded.
    fn session(model: &Model, first: u32, n: u32) -> Session {
        let options = SessionOptions {
            n_ctx: 600,
            ..SessionOptions::default()
        };
        let mut session = Session::new(model, &options).unwrap();
        let tokens: Vec<u32> = (first..first + n).map(|t| t * 7 % 320).collect();
        let go = &mut |_, _| ControlFlow::Continue(());
        session.prefill(&tokens[..tokens.len() - 1], go).unwrap();
        session.decode(tokens[tokens.len() - 1]).unwrap();
        session
    }

    fn extra() -> Extra {
        Extra {
            generator: Some([7, 8]),
            note: b"a note".to_vec(),
        }
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kinglet-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    fn load(model: &Model, path: &Path) -> Result<(Session, Extra)> {
        let options = SessionOptions {
            n_ctx: 600,
            ..SessionOptions::default()
        };
        StateFile::open(path)?.load(model, &options)
    }

    #[test]
    fn whatever_fails_the_old_file_or_the_new_one_is_there() {
        let model = tiny();
        let (old, new) = (session(&model, 1, 300), session(&model, 5, 280));
        let folder = folder("faults");
        let path = folder.join("it.state");
        for fault in [Fault::Fails, Fault::Dies, Fault::DiesInside] {
            let mut at = 0;
            loop {
                old.save(&path, &extra()).unwrap();
                let before = fs::read_dir(&folder).unwrap().count();
                assert_eq!(
                    before, 1,
                    "{fault:?} at {at}: a temporary was left for the next"
                );
                let disk = Faulty::new(at, fault);
                let saved = new.save_on(&disk, &path, &extra());
                let (found, _) = load(&model, &path).unwrap();
                let is_new = found.tokens() == new.tokens();
                assert!(is_new || found.tokens() == old.tokens());
                let expected = if is_new { &new } else { &old };
                assert_eq!(found.logits(), expected.logits());
                if saved.is_ok() {
                    assert!(is_new, "{fault:?} at {at}");
                }
                let left = fs::read_dir(&folder).unwrap().count();
                if fault == Fault::Fails {
                    assert_eq!(left, 1, "at {at}: a temporary stays after a failure");
                }
                at += 1;
                if disk.n.get() < at {
                    break;
                }
            }
            println!("{fault:?}: {at} operations");
            assert!(at > 8, "only {at} operations");
        }
        // What is still written by somebody is not stale.
        let busy = folder.join(".it.state.1-1.tmp");
        let file = File::create(&busy).unwrap();
        file.lock().unwrap();
        old.save(&path, &extra()).unwrap();
        assert!(busy.exists());
        drop(file);
        old.save(&path, &extra()).unwrap();
        assert!(!busy.exists());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn every_flipped_bit_of_a_header_and_every_cut_is_an_error() {
        let model = tiny();
        let folder = folder("damage");
        let path = folder.join("it.state");
        session(&model, 1, 40).save(&path, &extra()).unwrap();
        let sound = fs::read(&path).unwrap();
        let header = Header::decode(sound.first_chunk().unwrap()).unwrap();
        let refused = |bytes: &[u8], what: &str| {
            fs::write(&path, bytes).unwrap();
            let error = load(&model, &path)
                .err()
                .unwrap_or_else(|| panic!("{what}"));
            let told = matches!(error, Error::BadFile { .. } | Error::Mismatch { .. });
            assert!(told, "{what}: {error}");
        };
        for bit in 0..8 * HEADER_BYTES {
            let mut bytes = sound.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            refused(&bytes, &format!("bit {bit} of the header"));
        }
        let mut start = HEADER_BYTES;
        for (which, section) in header.sections.iter().enumerate() {
            let end = start + section.bytes as usize;
            let name = NAMES[which];
            assert!(end > start, "{name}: empty, so nothing is tested");
            // Cut off in it and before it; damaged at its ends and inside; a byte lost, the header none the wiser.
            for len in [start, start + 1, (start + end) / 2, end - 1] {
                refused(&sound[..len], &format!("{name} cut at {len}"));
            }
            for at in [start, (start + end) / 2, end - 1] {
                let mut bytes = sound.clone();
                bytes[at] ^= 0x10;
                refused(&bytes, &format!("{name} damaged at {at}"));
                bytes.remove(at);
                refused(&bytes, &format!("{name} without byte {at}"));
            }
            // A header that is sound by itself, and claims another size.
            for bytes in [0, section.bytes - 1, section.bytes + 1, u64::MAX, 1 << 40] {
                let mut other = header.clone();
                other.sections[which].bytes = bytes;
                if which >= CONVS && bytes == 0 {
                    continue; // may be empty; then the size of the file is wrong, which was tested
                }
                let mut file = other.encode();
                file.extend(&sound[HEADER_BYTES..]);
                refused(&file, &format!("{name} of {bytes} bytes"));
                file.resize(HEADER_BYTES + (sound.len() - HEADER_BYTES) * 2, 0);
                refused(&file, &format!("{name} of {bytes} bytes in a longer file"));
            }
            start = end;
        }
        assert_eq!(start, sound.len());
        for (what, change) in [
            ("tokens", (|h| h.n_tokens = u32::MAX) as fn(&mut Header)),
            ("no tokens", |h| h.n_tokens = 0),
            ("type of keys", |h| h.kv[0] = 200),
            ("model", |h| h.hashes.model ^= 1),
            ("tokenizer", |h| h.hashes.tokenizer ^= 1),
        ] {
            let mut other = header.clone();
            change(&mut other);
            let mut file = other.encode();
            file.extend(&sound[HEADER_BYTES..]);
            fs::write(&path, &file).unwrap();
            assert!(load(&model, &path).is_err(), "{what}");
        }
        refused(&[], "an empty file");
        refused(b"GGUF", "another file");
        refused(&vec![0; 4096], "zeros");
        assert!(StateFile::open(&folder).is_err(), "a folder");
        fs::write(&path, &sound).unwrap();
        let (loaded, found) = load(&model, &path).unwrap();
        assert_eq!((loaded.tokens().len(), found), (40, extra()));
        let found = StateFile::open(&path).unwrap().extra().unwrap();
        assert_eq!(found, extra());
        fs::remove_dir_all(&folder).unwrap();
    }
}
