//! Real files, real threads: every alignment, and files that change while they are in use.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use kinglet::Error;
use kinglet::experts::{Class, ExpertStore, IoMode, Options};

use crate::common::{Random, Shape, ones, slots};

fn write(name: &str, image: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("experts-{name}.bin"));
    let _ = fs::remove_file(&path);
    fs::write(&path, image).expect("a file");
    // So that a write in the same tick of the system's clock shows, as it does a moment after a model was loaded.
    let file = File::options().write(true).open(&path).expect("a file");
    let before = SystemTime::now() - Duration::from_secs(10);
    file.set_modified(before).expect("a time");
    path
}

fn open(path: &PathBuf, shape: &Shape, options: &Options) -> ExpertStore {
    ExpertStore::open(std::slice::from_ref(path), shape.layout(), options).expect("a store")
}

/// The ways to read that this system has.
fn ways() -> Vec<IoMode> {
    let mut ways = vec![IoMode::Buffered, IoMode::Auto];
    let shape = small();
    let path = write("ways", &shape.image());
    let options = Options {
        io: IoMode::Uring,
        ..slots(8)
    };
    match ExpertStore::open(&[path], shape.layout(), &options) {
        Ok(store) => {
            assert_eq!(store.stats().disk, "io_uring");
            ways.push(IoMode::Uring);
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
    ways
}

#[test]
fn every_alignment_gives_the_bytes_of_the_file() {
    // The tensors of layer l begin at 32 l modulo 4096, as GGUF aligns them; the file ends where the last expert ends.
    let shape = Shape {
        n_layers: 128,
        n_experts: 3,
        n_used: 1,
        parts: vec![4096 + 32, 12_288, 6_112],
        residue: 0,
        step: 32,
    };
    let image = shape.image();
    assert_ne!(image.len() % 4096, 0);
    let path = write("aligned", &image);
    let mut names = Vec::new();
    for io in ways() {
        for io_threads in [1, 4] {
            for n_slots in [3, 200] {
                let options = Options {
                    io,
                    io_threads,
                    ..slots(n_slots)
                };
                let store = open(&path, &shape, &options);
                for layer in (0..128).rev() {
                    let ids = [2, 0];
                    let request = store.begin(layer, &ids, &ones(&ids), Class::Exact);
                    shape.check(&image, &request.expect("room"));
                }
                let stats = store.stats();
                assert_eq!(stats.total.errors, 0);
                names.push(stats.disk);
            }
        }
    }
    assert!(names[..4].iter().all(|name| *name == "buffered"));
    if names[4..8].contains(&"buffered") {
        eprintln!("skipped: this file system has no direct reads");
    }
}

#[test]
fn large_parts_are_read_in_pieces() {
    let shape = Shape {
        n_layers: 1,
        n_experts: 4,
        n_used: 1,
        parts: vec![663_552, 1_300_032],
        residue: 1184,
        step: 0,
    };
    let image = shape.image();
    let path = write("pieces", &image);
    for io in ways() {
        let options = Options { io, ..slots(3) };
        let store = open(&path, &shape, &options);
        for id in [3, 0, 1, 2, 3] {
            let request = store.begin(0, &[id], &[1.0], Class::Demand);
            shape.check(&image, &request.expect("room"));
        }
        assert!(store.stats().total.reads >= 5 * (2 + 3));
    }
}

fn small() -> Shape {
    Shape {
        n_layers: 4,
        n_experts: 16,
        n_used: 2,
        parts: vec![20_000, 20_000, 24_000],
        residue: 32,
        step: 32,
    }
}

/// Reads two experts, lets `change` happen to the file, and looks what becomes of those and of others.
fn change(name: &str, io: IoMode, change: impl FnOnce(&PathBuf)) -> Result<(), Error> {
    let shape = small();
    let image = shape.image();
    let path = write(name, &image);
    let options = Options { io, ..slots(14) };
    let store = open(&path, &shape, &options);
    let request = store
        .begin(0, &[1, 2], &[1.0; 2], Class::Exact)
        .expect("room");
    shape.check(&image, &request);
    change(&path);
    shape.check(&image, &request);
    drop(request);
    let mut outcomes = Vec::new();
    for id in 3..9 {
        let request = store.begin(3, &[id], &[1.0], Class::Exact).expect("room");
        outcomes.push(request.wait(0, 0).map(|bytes| {
            assert!(bytes == shape.expert(&image, 3, id, 0));
        }));
    }
    // What was there is there, whatever became of the file.
    let request = store
        .begin(0, &[2, 1], &[1.0; 2], Class::Exact)
        .expect("room");
    assert!(request.is_hit(0) && request.is_hit(1));
    shape.check(&image, &request);
    drop(request);
    store.settle();
    store.check();
    let all_the_same = outcomes
        .iter()
        .all(|outcome| outcome.is_ok() == outcomes[0].is_ok());
    assert!(all_the_same, "{outcomes:?}");
    outcomes.pop().expect("six")
}

#[test]
fn a_file_that_changes_gives_errors_and_never_other_bytes() {
    for (n, io) in ways().into_iter().enumerate() {
        let name = |what: &str| format!("{what}-{n}");
        let cut = change(&name("cut"), io, |path| {
            let file = OpenOptions::new().write(true).open(path).expect("a file");
            file.set_len(100_000).expect("shorter");
        });
        let error = cut.expect_err("the file ends before").to_string();
        assert!(error.contains("truncated while in use"), "{error}");

        let written = change(&name("written"), io, |path| {
            let mut file = OpenOptions::new().write(true).open(path).expect("a file");
            file.seek(SeekFrom::Start(500_000)).expect("a place");
            file.write_all(&[7; 100_000]).expect("written");
            file.sync_all().expect("written");
        });
        let error = written.expect_err("other bytes").to_string();
        assert!(error.contains("written to while in use"), "{error}");

        // One that is put in its place by name is another file: ours is still there.
        let replaced = change(&name("replaced"), io, |path| {
            let other = path.with_extension("other");
            fs::write(&other, vec![9; 100]).expect("a file");
            fs::rename(&other, path).expect("renamed");
        });
        replaced.expect("the file that was opened");
        let removed = change(&name("removed"), io, |path| {
            fs::remove_file(path).expect("removed");
        });
        removed.expect("the file that was opened");
    }
}

#[test]
fn files_that_change_at_any_moment_under_threads() {
    let shape = small();
    let image = shape.image();
    let mut n_errors = 0;
    let ways = ways();
    for round in 0..30 {
        let path = write("moment", &image);
        let options = Options {
            io: ways[round / 4 % ways.len()],
            ..slots(8)
        };
        let store = open(&path, &shape, &options);
        let changed = AtomicBool::new(false);
        let first = store.begin(0, &[0], &[1.0], Class::Exact).expect("room");
        shape.check(&image, &first);
        let (mut right, mut failed) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(150 * round as u64));
                let file = OpenOptions::new().write(true).open(&path).expect("a file");
                if round % 4 < 2 {
                    file.set_len(0).expect("shorter");
                } else {
                    let mut file = file;
                    file.write_all(&vec![7; image.len()]).expect("written");
                }
                changed.store(true, Ordering::Release);
            });
            let mut random = Random(round as u64);
            let mut after = 0;
            while after < 50 {
                after += i32::from(changed.load(Ordering::Acquire));
                let ids = random.choose(2, 16, 1.0);
                let request = store.begin(random.below(4), &ids, &ones(&ids), Class::Exact);
                let request = request.expect("room");
                for part in 0..3 {
                    let expected =
                        |j| shape.expert(&image, request.layer(), request.expert(j), part);
                    for j in 0..2 {
                        match request.wait(j, part) {
                            Ok(bytes) => {
                                assert!(bytes == expected(j), "bytes of a changed file");
                                right += 1;
                            }
                            Err(Error::BadFile { .. }) => failed += 1,
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            }
        });
        assert!(failed > 0, "round {round}: {right} right");
        n_errors += failed;
        shape.check(&image, &first);
        drop(first);
        store.settle();
        store.check();
    }
    assert!(n_errors > 1000, "{n_errors}");
}

#[test]
fn files_are_compared_with_their_header() {
    let shape = small();
    let image = shape.image();
    let path = write("header", &image[..image.len() - 1]);
    let open = |paths: &[PathBuf]| ExpertStore::open(paths, shape.layout(), &slots(8)).err();
    let error = open(std::slice::from_ref(&path))
        .expect("one byte less")
        .to_string();
    assert!(error.contains("bytes of its header, found"), "{error}");
    let error = open(&[]).expect("no file").to_string();
    assert!(error.contains("expected 1 files, found 0"), "{error}");
    let error = open(&[path.with_extension("none")]).expect("no such file");
    assert!(matches!(error, Error::Io { .. }), "{error}");
}
