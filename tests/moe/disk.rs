//! Whole models on a drive in imagined time, whose reads end in random order and fail when told to.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kinglet::experts::disk::{FakeDisk, Fault, Pace};
use kinglet::experts::{Class, Mode, Prefetch};
use kinglet::quant::DType;
use kinglet::sampler::Rng;
use kinglet::session::ExpertOptions;
use kinglet::{Error, LoadOptions, Model};

use super::oracle::{self, Net};
use super::{
    Down, Experts, Folder, N_EXPERTS, N_USED, decoded, prefilled, session, slot_bytes, tokens,
};

/// Reads take up to as long again as a layer computes, on `lanes` at once.
fn pace(seed: u64, lanes: usize) -> Pace {
    Pace {
        lanes,
        latency: Duration::from_micros(20),
        bytes_per_second: 2e9,
        jitter: Duration::from_micros(400),
        tick: Duration::from_micros(3),
        seed,
    }
}

/// The model at `path`, its experts on a drive that is kept.
fn load(path: &Path, n_slots: usize, prefetch: Prefetch, pace: Pace) -> (Model, Arc<FakeDisk>) {
    let image = std::fs::read(path).expect("the model");
    let disk = Arc::new(FakeDisk::new(vec![image], Some(pace)));
    let options = LoadOptions {
        threads: 2,
        experts: ExpertOptions {
            cache: Some(n_slots as u64 * slot_bytes(path)),
            prefetch,
            ..ExpertOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Model::load_with_disk(path, &options, Box::new(Arc::clone(&disk)));
    (model.expect("a model"), disk)
}

#[test]
fn no_order_of_reads_changes_a_number() {
    let folder = Folder::new("fake");
    let tokens = tokens(32);
    let n_layers = 5;
    let resident = folder.model(n_layers, Experts::As(DType::Q4_0), Down::ByOutput, 2);
    let expected = (
        prefilled(&resident, 256, &tokens),
        decoded(&resident, &tokens),
    );
    let path = folder.0.join("model.gguf");
    let cycle = n_layers * N_USED;
    for (n_slots, mode) in [
        (n_layers * N_EXPERTS, Mode::Resident),
        (cycle + 2 * N_USED, Mode::Cached),
        (cycle - 1, Mode::Admission),
        (3 * N_USED, Mode::Admission),
    ] {
        for seed in 0..3 {
            for prefetch in Prefetch::ALL {
                let lanes = 1 + 3 * (seed as usize % 2);
                let (model, disk) = load(&path, n_slots, prefetch, pace(seed, lanes));
                let how = format!("{n_slots} slots, seed {seed}, {prefetch:?}");
                assert!(prefilled(&model, 256, &tokens) == expected.0, "{how}");
                assert!(prefilled(&model, 7, &tokens) == expected.0, "{how}");
                assert!(decoded(&model, &tokens) == expected.1, "{how}");
                let store = model.experts().expect("a store");
                store.check();
                assert_eq!(store.stats().mode, mode, "{how}");
                assert_eq!((store.stats().disk, disk.n_faults()), ("fake", 0), "{how}");
            }
        }
    }
}

/// A router after the mixer: what it would have chosen before is read, and what it does choose is computed.
#[test]
fn guesses_change_no_number() {
    let tokens = tokens(48);
    for kind in [oracle::lfm2moe(), oracle::qwen3moe()] {
        let folder = Folder::new(&format!("guess-{}", kind.architecture()));
        let path = folder.0.join("model.gguf");
        let cycle = kind.n_moe_layers() * oracle::N_USED;
        Net::random(kind).write(&path);
        let resident = Model::load(&path, &LoadOptions::default()).expect("a model");
        let expected = decoded(&resident, &tokens);
        for n_slots in [3 * oracle::N_USED, cycle + 2 * oracle::N_USED] {
            for prefetch in Prefetch::ALL {
                let (model, _) = load(&path, n_slots, prefetch, pace(5, 4));
                assert!(
                    decoded(&model, &tokens) == expected,
                    "{n_slots} slots, {prefetch:?}"
                );
                let total = model.experts().expect("a store").stats().total;
                if prefetch == Prefetch::Speculative {
                    assert!(total.guesses_used > 0, "{total:?}");
                    assert!(total.guesses_used + total.guesses_wasted <= total.guesses);
                } else {
                    assert_eq!(total.guesses, 0, "{prefetch:?}");
                }
            }
        }
    }
}

/// A read that fails is an error of the token that needed it, and of no other: the next try computes what it would have.
#[test]
fn a_thousand_failed_reads_are_errors_of_their_tokens() {
    const N_ERRORS: u64 = 1000;
    let tokens = tokens(40);
    let kinds = [oracle::smallthinker(), oracle::lfm2moe()];
    let per_run = N_ERRORS / (2 * kinds.len() as u64);
    for kind in kinds {
        let folder = Folder::new(&format!("faults-{}", kind.architecture()));
        let path = folder.0.join("model.gguf");
        let cycle = kind.n_moe_layers() * oracle::N_USED;
        Net::random(kind).write(&path);
        let resident = Model::load(&path, &LoadOptions::default()).expect("a model");
        let expected = decoded(&resident, &tokens);
        let n_vocab = expected.len() / tokens.len();
        for (n_slots, prefetch) in [
            (3 * oracle::N_USED, Prefetch::Exact),
            (cycle + 2 * oracle::N_USED, Prefetch::Off),
        ] {
            let (model, disk) = load(&path, n_slots, prefetch, pace(n_slots as u64, 4));
            let store = model.experts().expect("a store");
            let mut random = Rng::new(n_slots as u64);
            let mut line = session(&model, 16);
            let mut n_errors = 0;
            // Two that fail in one token are one error.
            while n_errors < per_run {
                let at = line.tokens().len();
                if at == tokens.len() {
                    line = session(&model, 16);
                    continue;
                }
                if random.next_f64() < 0.5 {
                    disk.fail_next(match random.next_u64() % 3 {
                        0 => Fault::Os(std::io::ErrorKind::Other, None),
                        1 => Fault::Short(4096),
                        _ => Fault::Changed,
                    });
                }
                let before = disk.n_faults();
                let outcome = line.decode(tokens[at]);
                let failed = disk.n_faults() > before;
                match outcome {
                    Ok(()) => {
                        assert!(!failed, "token {at}: a failed read must be told");
                        let row = &expected[at * n_vocab..][..n_vocab];
                        assert!(line.logits() == row, "token {at}");
                    }
                    Err(Error::Io { .. } | Error::BadFile { .. }) => {
                        assert!(failed, "token {at}: an error for no reason");
                        n_errors += 1;
                        // What this token had asked for still comes; it is not to fail in the next one's name.
                        store.settle();
                    }
                    Err(other) => panic!("token {at}: {other}"),
                }
                store.check();
            }
            drop(line);
            // Whoever holds a slot without being asked to keeps these from having all of them.
            store.settle();
            let ids: Vec<u32> = (0..oracle::N_USED as u32).collect();
            let held: Vec<_> = (0..3)
                .map(|layer| {
                    let request = store.begin(layer, &ids, &[0.0; oracle::N_USED], Class::Demand);
                    let request = request.expect("room for all");
                    for j in 0..ids.len() {
                        request.wait(j, 2).expect("no fault any more");
                    }
                    request
                })
                .collect();
            drop(held);
            store.check();
            let stats = store.stats();
            assert!(stats.n_held <= n_slots, "{stats:?}");
            assert!(stats.total.errors >= per_run, "{stats:?}");
        }
    }
}
