//! Models that are a range of an open file, as an asset in an app's package is: the same tokens as from a path.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};

use kinglet::experts::IoMode;
use kinglet::gguf::Gguf;
use kinglet::session::{ExpertOptions, Plan};
use kinglet::{Error, LoadOptions, Model, Result, Session, SessionOptions};

const LFM2: &str = "tests/data/lfm2-tiny-random.gguf";
const SMALLTHINKER: &str = "tests/data/smallthinker-tiny-random.gguf";

/// A model in the middle of a file.
struct Package {
    path: PathBuf,
    bytes: Range<u64>,
}

impl Package {
    fn new(test: &str, model: &str, start: usize) -> Self {
        let model = std::fs::read(root(model)).expect("a model of the repository");
        // What lies around it is no zeros: who reads too far reads something.
        let mut all: Vec<u8> = (0..start).map(|i| i as u8 | 1).collect();
        all.extend(&model);
        all.extend([0xee; 10_000]);
        let path = std::env::temp_dir().join(format!("kinglet-{}-{test}", std::process::id()));
        std::fs::write(&path, all).expect("a place for temporary files");
        Self {
            path,
            bytes: start as u64..(start + model.len()) as u64,
        }
    }

    fn file(&self) -> File {
        File::open(&self.path).expect("it was just written")
    }

    fn load(&self, options: &LoadOptions) -> Result<Model> {
        Model::load_file(self.file(), self.bytes.clone(), options)
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn options() -> LoadOptions {
    LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    }
}

/// Bits of logits after a prompt and some tokens.
fn logits(model: &Model) -> Vec<u32> {
    let options = SessionOptions {
        n_ctx: 64,
        ..SessionOptions::default()
    };
    let mut session = Session::new(model, &options).expect("room for it");
    let mut out = Vec::new();
    let mut keep = |session: &Session| out.extend(session.logits().iter().map(|x| x.to_bits()));
    let tokens: Vec<u32> = (0..20).map(|i| i * 7 % 90).collect();
    let all = &mut |_, _| ControlFlow::Continue(());
    session.prefill(&tokens, all).expect("it fits");
    keep(&session);
    for token in [1, 17, 33] {
        session.decode(token).expect("it fits");
        keep(&session);
    }
    out
}

#[test]
fn a_model_within_a_file_computes_the_same() {
    for (model, name) in [(LFM2, "lfm2"), (SMALLTHINKER, "smallthinker")] {
        let expected = logits(&Model::load(&root(model), &options()).expect("a model"));
        for start in [0, 4, 4096, 2_097_152 + 4092] {
            let package = Package::new(&format!("same-{name}-{start}"), model, start);
            let mut file = package.file();
            // Shared with ours: neither side may move it.
            file.seek(SeekFrom::Start(7)).expect("a position");
            let given = file.try_clone().expect("a descriptor");
            let found = Model::load_file(given, package.bytes.clone(), &options());
            let found = found.expect("the same model");
            assert!(logits(&found) == expected, "{name} at {start}");
            assert_eq!(file.stream_position().expect("a position"), 7);
            file.read_exact(&mut [0; 4]).expect("bytes");
            let plan = Plan::new(&found, &SessionOptions::default(), 1).expect("a plan");
            let outline = Model::outline_file(file, package.bytes.clone(), &options());
            let outline = outline.expect("the same header");
            let planned = Plan::new(&outline, &SessionOptions::default(), 1).expect("a plan");
            assert_eq!(plan.footprint.weights, planned.footprint.weights);
        }
    }
}

#[test]
fn experts_and_weights_of_it_are_read_when_they_are_used() {
    let package = Package::new("experts", SMALLTHINKER, 4100);
    let expected = logits(&package.load(&options()).expect("a model"));
    let cached = |io| LoadOptions {
        experts: ExpertOptions {
            cache: Some(1 << 20),
            io,
            ..ExpertOptions::default()
        },
        ..options()
    };
    for io in [IoMode::Auto, IoMode::Buffered] {
        let model = package.load(&cached(io)).expect("a model");
        assert!(logits(&model) == expected, "{io:?}");
        let stats = model.experts().expect("a store").stats();
        assert!(stats.total.misses() > 0, "{stats:?}");
    }
    let direct = package.load(&cached(IoMode::Direct)).err();
    let direct = direct.expect("an error").to_string();
    assert!(direct.contains("open file"), "{direct}");

    // A budget, for which weights are dropped and the header is read again.
    let package = Package::new("budget", LFM2, 4100);
    let expected = logits(&package.load(&options()).expect("a model"));
    let budget = LoadOptions {
        memory: Some(1 << 30),
        ..options()
    };
    let model = package.load(&budget).expect("a model");
    assert!(logits(&model) == expected);
}

#[test]
fn what_is_no_range_with_a_model_in_it_is_refused() {
    let package = Package::new("refused", LFM2, 4096);
    let Range { start, end } = package.bytes;
    let load = |bytes| Gguf::open_file(package.file(), bytes).map(drop);
    let invalid = |bytes: Range<u64>| match load(bytes.clone()) {
        Err(Error::Invalid(what)) => assert!(what.contains("open file"), "{what}"),
        other => panic!("{bytes:?}: {other:?}"),
    };
    invalid(start + 1..end);
    invalid(start + 2..end);
    #[allow(clippy::reversed_empty_ranges, reason = "it is what is refused")]
    invalid(end..start);
    invalid(start..end + 10_001);
    invalid(start..u64::MAX);
    invalid(u64::MAX..u64::MAX);
    for bytes in [
        start..start,
        start..end - 1,
        start..start + 100,
        0..end,
        end..end + 10_000,
    ] {
        match load(bytes.clone()) {
            Err(Error::BadFile { .. }) => {}
            other => panic!("{bytes:?}: {other:?}"),
        }
    }
    assert!(load(start..end).is_ok());
    assert!(
        load(start..end + 10_000).is_ok(),
        "bytes after the last tensor are none of it"
    );
    let folder = File::open(root("tests")).expect("a folder");
    assert!(matches!(
        Gguf::open_file(folder, 0..100),
        Err(Error::BadFile { .. })
    ));
}
