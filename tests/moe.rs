//! Mixture of experts in quantized formats: against floats, in every way that the same tokens can be computed.

#[path = "moe/disk.rs"]
mod disk;
#[path = "moe/oracle.rs"]
mod oracle;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kinglet::experts::{IoMode, Prefetch};
use kinglet::gguf::{Metadata, TensorSpec, Writer};
use kinglet::quant::{self, DType};
use kinglet::sampler::Rng;
use kinglet::session::ExpertOptions;
use kinglet::{Error, KvType, LoadOptions, Model, Session, SessionOptions};

const HIDDEN: usize = 256;
const N_FFN: usize = 512;
const N_EXPERTS: usize = 5;
const N_USED: usize = 3;
const N_VOCAB: usize = 96;

/// How the matrix behind the neurons is stored.
#[derive(Clone, Copy, PartialEq)]
enum Down {
    ByOutput,
    ByNeuron,
}

/// How the experts are stored.
#[derive(Clone, Copy)]
enum Experts {
    /// In a format.
    As(DType),
    /// As the floats that a format has made of them.
    FloatsOf(DType),
}

fn random(rng: &mut Rng, n: usize, scale: f64) -> Vec<f32> {
    // A sum of uniform numbers is normal enough.
    let normal = |rng: &mut Rng| (0..4).map(|_| rng.next_f64() - 0.5).sum::<f64>() * 1.732;
    (0..n).map(|_| (normal(rng) * scale) as f32).collect()
}

/// `(n_experts, n_out, n_in)` to `(n_experts, n_in, n_out)`.
fn transposed(x: &[f32], n_out: usize, n_in: usize) -> Vec<f32> {
    let expert = |x: &[f32]| -> Vec<f32> {
        let at = |i: usize| x[i % n_out * n_in + i / n_out];
        (0..n_out * n_in).map(at).collect()
    };
    x.chunks_exact(n_out * n_in).flat_map(expert).collect()
}

/// Writes a SmallThinker model of `n_layers`, the same for the same arguments on every machine.
fn write(path: &Path, n_layers: usize, experts: Experts, down: Down) {
    let mut m = Metadata::new();
    m.set("general.architecture", "smallthinker");
    for (name, value) in [
        ("block_count", n_layers),
        ("context_length", 512),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", N_FFN),
        ("expert_feed_forward_length", N_FFN),
        ("expert_count", N_EXPERTS),
        ("expert_used_count", N_USED),
        ("expert_gating_func", 2),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 64),
        ("attention.value_length", 64),
    ] {
        m.set(&format!("smallthinker.{name}"), value as u32);
    }
    m.set("smallthinker.attention.layer_norm_rms_epsilon", 1e-6f32);
    m.set("smallthinker.rope.freq_base", 1.5e6f32);
    m.set("tokenizer.ggml.model", "none");

    let mut rng = Rng::new(7);
    let mut tensors: Vec<(TensorSpec, Vec<u8>)> = Vec::new();
    let floats = |tensors: &mut Vec<_>, name: &str, shape: &[usize], x: &[f32]| {
        let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((TensorSpec::new(name, DType::F32, shape), bytes));
    };
    let scale = |n_in: usize| 1.0 / (n_in as f64).sqrt();
    for (name, scale) in [("token_embd", 1.0), ("output", scale(HIDDEN))] {
        let x = random(&mut rng, HIDDEN * N_VOCAB, scale);
        floats(
            &mut tensors,
            &format!("{name}.weight"),
            &[HIDDEN, N_VOCAB],
            &x,
        );
    }
    floats(
        &mut tensors,
        "output_norm.weight",
        &[HIDDEN],
        &[1.0; HIDDEN],
    );
    for i in 0..n_layers {
        let name = |part: &str| format!("blk.{i}.{part}.weight");
        for part in ["attn_norm", "ffn_norm"] {
            floats(&mut tensors, &name(part), &[HIDDEN], &[1.0; HIDDEN]);
        }
        for (part, n_out) in [
            ("attn_q", 256),
            ("attn_k", 128),
            ("attn_v", 128),
            ("attn_output", 256),
            ("ffn_gate_inp", N_EXPERTS),
        ] {
            let x = random(&mut rng, HIDDEN * n_out, scale(HIDDEN));
            floats(&mut tensors, &name(part), &[HIDDEN, n_out], &x);
        }
        for (part, n_in, n_out) in [
            ("ffn_gate_exps", HIDDEN, N_FFN),
            ("ffn_up_exps", HIDDEN, N_FFN),
            ("ffn_down_exps", N_FFN, HIDDEN),
        ] {
            let x = random(&mut rng, N_EXPERTS * n_in * n_out, scale(n_in));
            let (x, shape) = match part == "ffn_down_exps" && down == Down::ByNeuron {
                true => (transposed(&x, n_out, n_in), [n_out, n_in, N_EXPERTS]),
                false => (x, [n_in, n_out, N_EXPERTS]),
            };
            let (Experts::As(dtype) | Experts::FloatsOf(dtype)) = experts;
            let spec = TensorSpec::new(name(part), dtype, shape);
            let mut bytes = vec![0; spec.bytes().expect("whole blocks")];
            quant::quantize(dtype, &x, &mut bytes);
            match experts {
                Experts::As(_) => tensors.push((spec, bytes)),
                Experts::FloatsOf(_) => {
                    let mut rounded = vec![0.0; x.len()];
                    quant::dequantize(dtype, &bytes, &mut rounded);
                    floats(&mut tensors, &name(part), &shape, &rounded);
                }
            }
        }
    }
    let specs: Vec<_> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut writer = Writer::create(path, &m, &specs).expect("a new file");
    for (_, bytes) in &tensors {
        writer.tensor(bytes).expect("room on the disk");
    }
    writer.finish().expect("written");
}

/// A folder for one model, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("kinglet-moe-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        Self(folder)
    }

    fn model(&self, n_layers: usize, experts: Experts, down: Down, n_threads: usize) -> Model {
        let path = self.0.join("model.gguf");
        write(&path, n_layers, experts, down);
        let options = LoadOptions {
            threads: n_threads,
            ..LoadOptions::default()
        };
        Model::load(&path, &options).expect("a model")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn session(model: &Model, batch: usize) -> Session {
    let options = SessionOptions {
        n_ctx: 256,
        kv: KvType::F32.into(),
        batch,
        ..SessionOptions::default()
    };
    Session::new(model, &options).expect("a session")
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n)
        .map(|i| (i * i * 7 + i * 3 + 1) as u32 % N_VOCAB as u32)
        .collect()
}

fn prefilled(model: &Model, batch: usize, tokens: &[u32]) -> Vec<f32> {
    let mut session = session(model, batch);
    session
        .prefill(tokens, &mut |_, _| ControlFlow::Continue(()))
        .expect("prefill");
    session.logits().to_vec()
}

/// The logits after each token, all computed as a prompt is.
fn scored(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut logits = Vec::new();
    session(model, 256)
        .score(tokens, &mut |_, row| {
            logits.extend_from_slice(row);
            ControlFlow::Continue(())
        })
        .expect("score");
    logits
}

/// The logits after each token, computed one by one.
fn decoded(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut session = session(model, 256);
    let mut logits = Vec::new();
    for token in tokens {
        session.decode(*token).expect("decode");
        logits.extend_from_slice(session.logits());
    }
    logits
}

/// Root of the mean squared difference, relative to that of `b`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// One layer, whose router reads embeddings: both choose the same experts, and what is left is the rounding of
/// activations to 8 bits, or to bf16.
#[test]
fn quantized_experts_are_near_the_same_in_floats() {
    let (quantized, floats) = (Folder::new("quantized"), Folder::new("floats"));
    let tokens = tokens(61);
    for dtype in DType::ALL
        .iter()
        .copied()
        .filter(|dtype| dtype.can_quantize())
    {
        let is_common = [DType::F16, DType::Q4_0, DType::Q6_K].contains(&dtype);
        for down in [Down::ByOutput, Down::ByNeuron] {
            if down == Down::ByNeuron && !is_common {
                continue;
            }
            let a = quantized.model(1, Experts::As(dtype), down, 2);
            let b = floats.model(1, Experts::FloatsOf(dtype), down, 2);
            let expected = decoded(&b, &tokens);
            for (how, found) in [
                ("decoded", decoded(&a, &tokens)),
                ("scored", scored(&a, &tokens)),
                ("floats scored", scored(&b, &tokens)),
            ] {
                let distance = distance(&found, &expected);
                let most = if how == "floats scored" { 1e-5 } else { 0.012 };
                assert!(distance < most, "{dtype}, {how}: {distance:e}");
            }
        }
    }
}

#[test]
fn both_ways_to_store_down_are_one_model() {
    let folders = (Folder::new("by-output"), Folder::new("by-neuron"));
    let by_output = folders
        .0
        .model(5, Experts::As(DType::F32), Down::ByOutput, 2);
    let by_neuron = folders
        .1
        .model(5, Experts::As(DType::F32), Down::ByNeuron, 2);
    let tokens = tokens(40);
    let expected = decoded(&by_output, &tokens);
    assert!(distance(&decoded(&by_neuron, &tokens), &expected) < 1e-5);
    assert!(distance(&scored(&by_neuron, &tokens), &expected) < 1e-5);
}

/// What a token leaves behind depends neither on the tokens beside it nor on who computes it.
#[test]
fn batches_and_threads_change_nothing() {
    let folder = Folder::new("batches");
    let tokens = tokens(70);
    for (dtype, down) in [
        (DType::Q4_0, Down::ByOutput),
        (DType::Q6_K, Down::ByOutput),
        (DType::F16, Down::ByOutput),
        (DType::Q8_0, Down::ByNeuron),
    ] {
        let one = folder.model(3, Experts::As(dtype), down, 1);
        let expected = prefilled(&one, 256, &tokens);
        let steps = decoded(&one, &tokens);
        for n_threads in [1, 2, 3] {
            let model = folder.model(3, Experts::As(dtype), down, n_threads);
            for batch in [1, 3, 32, 33, 64] {
                let found = prefilled(&model, batch, &tokens);
                assert!(
                    found == expected,
                    "{dtype}, {n_threads} threads, steps of {batch}"
                );
            }
            assert!(
                decoded(&model, &tokens) == steps,
                "{dtype}, {n_threads} threads, decoded"
            );
        }
    }
}

/// About half of random gates are below 0: their neurons are skipped, and counted.
#[test]
fn skipped_neurons_are_counted() {
    let folder = Folder::new("skipped");
    let model = folder.model(2, Experts::As(DType::Q4_0), Down::ByOutput, 1);
    let mut session = session(&model, 256);
    let tokens = tokens(30);
    for token in &tokens {
        session.decode(*token).expect("decode");
    }
    let work = session.work();
    assert_eq!(work.neurons as usize, tokens.len() * 2 * N_USED * N_FFN);
    let share = work.skipped_neurons as f64 / work.neurons as f64;
    assert!((0.4..0.6).contains(&share), "{share}");
}

/// Whatever is in memory and however it came there: the same numbers.
#[test]
fn experts_that_are_read_when_used_change_nothing() {
    let folder = Folder::new("read");
    let tokens = tokens(48);
    let resident = folder.model(5, Experts::As(DType::Q4_0), Down::ByOutput, 2);
    let expected = (
        prefilled(&resident, 256, &tokens),
        decoded(&resident, &tokens),
    );
    let path = folder.0.join("model.gguf");
    let all = 5 * N_EXPERTS;
    for (n_slots, io, io_threads, prefetch) in [
        (3 * N_USED, IoMode::Auto, 4, Prefetch::Exact),
        (3 * N_USED, IoMode::Buffered, 1, Prefetch::Off),
        (5 * N_USED - 1, IoMode::Auto, 1, Prefetch::Exact),
        (5 * N_USED + 2 * N_USED, IoMode::Auto, 4, Prefetch::Exact),
        (
            5 * N_USED + 2 * N_USED,
            IoMode::Buffered,
            4,
            Prefetch::Speculative,
        ),
        (3 * N_USED, IoMode::Uring, 4, Prefetch::Off),
        (5 * N_USED + 2 * N_USED, IoMode::Uring, 1, Prefetch::Exact),
        (all, IoMode::Auto, 4, Prefetch::Exact),
    ] {
        let slot_bytes = slot_bytes(&path);
        let options = LoadOptions {
            threads: 2,
            experts: ExpertOptions {
                cache: Some(n_slots as u64 * slot_bytes),
                prefetch,
                io,
                io_threads,
                ..ExpertOptions::default()
            },
            ..LoadOptions::default()
        };
        let model = match Model::load(&path, &options) {
            Err(error) if io == IoMode::Uring => {
                eprintln!("skipped: {error}");
                continue;
            }
            model => model.expect("a model"),
        };
        let how = format!("{n_slots} slots, {io:?}, {io_threads} threads, {prefetch:?}");
        for batch in [256, 7] {
            assert!(
                prefilled(&model, batch, &tokens) == expected.0,
                "{how}, steps of {batch}"
            );
        }
        assert!(decoded(&model, &tokens) == expected.1, "{how}");
        let stats = model.experts().expect("a store").stats();
        assert_eq!(stats.n_slots, n_slots, "{how}");
    }
}

/// A model whose experts are read when they are used, with room for `n_slots` of them.
fn reading(path: &Path, n_slots: usize) -> Model {
    let options = LoadOptions {
        threads: 2,
        experts: ExpertOptions {
            cache: Some(n_slots as u64 * slot_bytes(path)),
            ..ExpertOptions::default()
        },
        ..LoadOptions::default()
    };
    Model::load(path, &options).expect("a model")
}

/// A file that is cut short, or of which another has taken the place, or to which somebody has written: an error as long
/// as that is so, and the right tokens after it.
#[test]
fn a_file_that_changes_is_an_error_of_that_token() {
    let folder = Folder::new("cut");
    let resident = folder.model(5, Experts::As(DType::Q4_0), Down::ByOutput, 1);
    let tokens = tokens(40);
    let expected = decoded(&resident, &tokens);
    drop(resident);
    let path = folder.0.join("model.gguf");
    let (bytes, time) = (
        std::fs::read(&path).expect("the model"),
        std::fs::metadata(&path)
            .and_then(|m| m.modified())
            .expect("a time"),
    );
    let model = reading(&path, 3 * N_USED);
    let mut session = session(&model, 16);
    for (i, token) in tokens.iter().enumerate() {
        if i % 4 == 3 {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .expect("the model");
            // The table at its start stays.
            file.set_len(bytes.len() as u64 / 2).expect("cut");
            let before = session.tokens().len();
            match session.decode(*token) {
                Err(Error::BadFile { path: named, .. } | Error::Io { path: named, .. }) => {
                    assert_eq!(named, path);
                }
                // All that it uses may be in memory.
                other => other.expect("no other error"),
            }
            std::fs::write(&path, &bytes).expect("the whole file");
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .expect("the model");
            file.set_modified(time).expect("its time");
            if session.tokens().len() > before {
                continue;
            }
        }
        session.decode(*token).expect("decode");
        let n = expected.len() / tokens.len();
        assert!(
            session.logits() == &expected[i * n..(i + 1) * n],
            "token {i}"
        );
    }
    let stats = model.experts().expect("a store").stats();
    assert!(stats.total.errors > 0, "{stats:?}");
}

/// What is given back is read again.
#[test]
fn trimming_changes_no_number() {
    let folder = Folder::new("trim");
    let resident = folder.model(5, Experts::As(DType::Q4_0), Down::ByOutput, 1);
    let tokens = tokens(32);
    let expected = decoded(&resident, &tokens);
    let path = folder.0.join("model.gguf");
    let model = reading(&path, 5 * N_EXPERTS);
    let mut session = session(&model, 16);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            let mut given = 0;
            for _ in 0..20 {
                given += model.trim(slot_bytes(&path));
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            given
        });
        for (i, token) in tokens.iter().enumerate() {
            session.decode(*token).expect("decode");
            let n = expected.len() / tokens.len();
            assert!(
                session.logits() == &expected[i * n..(i + 1) * n],
                "token {i}"
            );
        }
        assert!(other.join().expect("no panic") > 0);
    });
    let store = model.experts().expect("a store");
    assert!(store.stats().n_slots < 5 * N_EXPERTS);
    store.check();
}

/// Less memory between two tokens, too little, more again; a session that ends leaves its part to the experts.
#[test]
fn the_budget_may_change_and_changes_no_number() {
    let folder = Folder::new("budget");
    let resident = folder.model(5, Experts::As(DType::Q4_0), Down::ByOutput, 1);
    let tokens = tokens(32);
    let expected = decoded(&resident, &tokens);
    let path = folder.0.join("model.gguf");
    let refused = resident.set_memory(1 << 40).expect_err("no budget");
    assert!(matches!(refused, kinglet::Error::Invalid(_)), "{refused}");
    let (all, slot_bytes) = (5 * N_EXPERTS, slot_bytes(&path));
    let options = LoadOptions {
        memory: Some(1 << 40),
        threads: 1,
        experts: ExpertOptions {
            cache: Some(all as u64 * slot_bytes),
            ..ExpertOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Model::load(&path, &options).expect("a model");
    let store = model.experts().expect("a store");
    let n_slots = || store.stats().n_slots;
    let mut session = session(&model, 16);
    assert_eq!(n_slots(), all);
    let Err(kinglet::Error::OverBudget { needed, memory, .. }) = model.set_memory(1) else {
        panic!("nothing fits in a byte");
    };
    assert_eq!((memory, n_slots()), (1, all));
    let least = needed + needed / 90; // and what is left alone
    let n = expected.len() / tokens.len();
    for (i, token) in tokens.iter().enumerate() {
        match i {
            8 => {
                model.set_memory(least).expect("the least");
                assert!((3 * N_USED..all / 2).contains(&n_slots()), "{}", n_slots());
                assert!(model.set_memory(needed / 2).is_err());
            }
            16 => {
                let other = session.memory();
                let other = (other.kv + other.conv + other.scratch) as u64;
                model
                    .set_memory(least + other + 8 * slot_bytes)
                    .expect("more");
                let before = n_slots();
                let fork = session.fork().expect("room");
                let beside = n_slots();
                assert!(beside < before, "{beside} of {before}");
                drop(fork);
                assert_eq!(n_slots(), before);
                // What the system took stays away until the budget is set.
                model.trim(slot_bytes);
                drop(session.fork().expect("room"));
                assert_eq!(n_slots(), before - 1);
            }
            24 => {
                model.set_memory(1 << 40).expect("all");
                assert_eq!(n_slots(), all);
            }
            _ => (),
        }
        session.decode(*token).expect("decode");
        assert!(
            session.logits() == &expected[i * n..(i + 1) * n],
            "token {i}"
        );
    }
    store.check();
}

/// A bound on experts holds also where all of them would fit.
#[test]
fn a_cache_of_experts_is_not_more_than_asked_for() {
    let folder = Folder::new("cache");
    folder.model(5, Experts::As(DType::Q4_0), Down::ByOutput, 1);
    let path = folder.0.join("model.gguf");
    let n_slots = 4 * N_USED;
    let options = LoadOptions {
        memory: Some(1 << 40),
        experts: ExpertOptions {
            cache: Some(n_slots as u64 * slot_bytes(&path)),
            ..ExpertOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Model::load(&path, &options).expect("a model");
    let _session = session(&model, 16);
    let stats = model.experts().expect("a store").stats();
    assert_eq!(stats.n_slots, n_slots);
}

/// Bytes of an expert in memory.
fn slot_bytes(path: &Path) -> u64 {
    let options = LoadOptions {
        experts: ExpertOptions {
            cache: Some(u64::MAX),
            ..ExpertOptions::default()
        },
        ..LoadOptions::default()
    };
    let model = Model::load(path, &options).expect("a model");
    model.experts().expect("a store").layout().slot_bytes() as u64
}
