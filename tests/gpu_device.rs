//! The device as a whole: sessions go on where it fails at any submission, in every way that one can; a budget of its memory
//! is kept; steady decode makes nothing on it, and is encoded ahead. In a process of its own, since all sessions of one share the device. Needs an
//! adapter, as `gpu.rs`.

#[path = "common/on_gpu.rs"]
mod on_gpu;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use kinglet::backend::gpu;
use kinglet::backend::select::Chunking;
use kinglet::session::{Extra, GpuPlan, Plan, StateFile};
use kinglet::sparsity::{Heads, Policy, Sparsity};
use kinglet::{BackendKind, DeviceFault, KvType, LoadOptions, Model, Session, SessionOptions};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use self::on_gpu::{adapter, argmax, distance, load, new_session, prefill, sparse_session};

/// A policy that chooses keys on the device.
fn dhsa() -> Sparsity {
    let policy = Policy::Dhsa {
        chunking: Chunking::Fixed(8),
        heads: Heads::Best,
    };
    Sparsity {
        local: 40,
        ..Sparsity::new(policy, 100)
    }
}

/// One test at a time: they share a device.
static DEVICE: Mutex<()> = Mutex::new(());

/// A prompt in several steps and a reply, past where the cache grows, with a mark between; the tokens, and the logits after
/// the last.
fn reply(session: &mut Session) -> (Vec<u32>, Vec<f32>) {
    reply_of(session, 0)
}

/// The same of the `k` largest logits, 0: all.
fn reply_of(session: &mut Session, k: usize) -> (Vec<u32>, Vec<f32>) {
    let tokens: Vec<u32> = (0..253).map(|i| (i * 37 + 11) % 320).collect();
    prefill(session, &tokens);
    session.mark().expect("a mark");
    let mut reply = Vec::new();
    for _ in 0..6 {
        reply.push(largest(session));
        session
            .decode_top(reply[reply.len() - 1], k)
            .expect("decode");
    }
    reply.push(largest(session));
    (reply, session.logits().to_vec())
}

fn largest(session: &Session) -> u32 {
    session
        .top()
        .first()
        .map_or_else(|| argmax(session.logits()), |pair| pair.0)
}

#[test]
fn a_session_whose_gpu_fails_at_any_submission_goes_on_on_the_cpu() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let path = "tests/data/lfm2-tiny-random.gguf";
    let open = |backend| new_session(&load(path, backend), KvType::F32, 128);
    let (tokens, logits) = reply(&mut open(BackendKind::Cpu));
    let gap = |logits: &[f32]| {
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[0] - sorted[1]
    };
    println!("the last choice is clear by {}", gap(&logits));
    // Of the largest logits alone the next pass begins before they are known.
    for (fault, k) in [
        (DeviceFault::Lost, 0),
        (DeviceFault::OutOfMemory, 0),
        (DeviceFault::Refused, 0),
        (DeviceFault::Lost, 1),
        (DeviceFault::OutOfMemory, 1),
        (DeviceFault::Refused, 1),
    ] {
        let mut n = 0;
        let mut model = load(path, BackendKind::Gpu);
        loop {
            let mut session = new_session(&model, KvType::F32, 128);
            let device = gpu::shared(None).expect("the same device");
            device.fail_after(n, fault);
            let found = reply_of(&mut session, k);
            if k == 0 {
                let d = distance(&found.1, &logits);
                assert!(d < 1e-3, "{fault} at submission {n}: {d:e}");
            }
            assert_eq!(found.0, tokens, "{fault} at submission {n}");
            let told = session.device_fault();
            if !device.has_failed() {
                assert_eq!(told, None);
                break;
            }
            let told = told.expect("it has left the GPU");
            assert!(told.contains(&fault.to_string()), "{told}");
            // Forks, files and what is taken back are those of a session on the CPU.
            let mut fork = session.fork().expect("a fork");
            fork.truncate(200).expect("replay");
            prefill(&mut fork, &[1, 2, 3]);
            assert_eq!(fork.device_fault(), session.device_fault());
            n += 1;
            if fault == DeviceFault::Lost {
                model = load(path, BackendKind::Gpu);
            }
        }
        println!("{fault}, {k} logits: {n} submissions");
        assert!(n > 14, "{n}: every step submits something");
    }
}

#[test]
fn what_a_session_held_survives_its_gpu() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let mut session = new_session(&model, KvType::F32, 128);
    let (_, logits) = reply(&mut session);
    let snapshot = session.snapshot().expect("a snapshot");
    gpu::shared(None).expect("the same device").lose();
    let file = std::env::temp_dir().join(format!("kinglet-lost-{}.state", std::process::id()));
    session.save(&file, &Extra::default()).expect("from tokens");
    let mut fork = session.fork().expect("from tokens");
    let mut late = Session::new(&model, &session.options()).expect("on the CPU");
    session.truncate(20).expect("from tokens");
    session.restore(&snapshot).expect("from tokens");
    late.restore(&snapshot).expect("from tokens");
    let found = StateFile::open(&file).and_then(|file| file.load(&model, &session.options()));
    let (mut found, _) = found.expect("what was saved");
    std::fs::remove_file(file).expect("a file");
    let last = argmax(&logits);
    let cpu = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Cpu);
    let mut expected = new_session(&cpu, KvType::F32, 128);
    reply(&mut expected);
    expected.decode(last).expect("decode");
    for (what, session) in [
        ("session", &mut session),
        ("fork", &mut fork),
        ("new", &mut late),
        ("file", &mut found),
    ] {
        session.decode(last).expect("decode");
        assert!(session.device_fault().is_some(), "{what}");
        assert_eq!(session.logits(), expected.logits(), "{what}");
    }
}

#[test]
fn a_budget_of_the_gpu_is_planned_and_kept() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let dense = Sparsity::default();
    for (file, n_ctx, batch, sparsity) in [
        ("tests/data/lfm2moe-tiny-random.gguf", 700, 256, dense),
        ("tests/data/lfm2moe-tiny-random.gguf", 700, 256, dhsa()),
        ("models/lfm2-smol-Q4_0.gguf", 300, 32, dense),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let options = SessionOptions {
            n_ctx,
            batch,
            sparsity,
            ..SessionOptions::default()
        };
        let plan = |load: &LoadOptions| {
            let model = Model::outline(&path, load).expect("a header");
            let plan = Plan::new(&model, &options, 1).expect("a plan");
            GpuPlan::new(&model, &plan, load).expect("a plan")
        };
        let mut load = LoadOptions {
            threads: 2,
            backend: BackendKind::Gpu,
            ..LoadOptions::default()
        };
        let whole = plan(&load);
        assert_eq!(whole.layers, whole.n_layers);
        load.gpu_memory = Some(whole.total());
        assert_eq!(plan(&load), whole, "all of it fits");
        load.gpu_memory = Some(whole.total() - 1);
        let less = plan(&load);
        assert!(
            less.layers < whole.layers && less.total() < whole.total(),
            "{less:?}"
        );
        load.gpu_memory = Some(1000);
        assert_eq!(plan(&load).layers, 0);
        // What is planned suffices.
        for plan in [whole, less] {
            load.gpu_memory = Some(plan.total());
            load.gpu_layers = Some(plan.layers);
            let model = Model::load(&path, &load).expect("it fits");
            let mut session = Session::new(&model, &options).expect("it fits");
            let (kv, conv) = {
                let memory = session.memory();
                (memory.kv as u64, memory.conv as u64)
            };
            prefill(&mut session, &vec![5; 2 * batch + 7]);
            session.decode(6).expect("decode");
            assert_eq!(session.device_fault(), None, "{file}: {plan:?}");
            if plan.layers == plan.n_layers {
                assert_eq!((plan.kv, plan.conv), (kv, conv), "{file}");
            }
            let device = gpu::shared(None).expect("the same device");
            println!("{file}: {} of {} bytes", device.held_bytes(), plan.total());
            drop((session, model));
            device.set_budget(u64::MAX);
        }
    }
}

#[test]
fn models_in_several_bindings_say_the_same_to_the_bit() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = gpu::shared(None).expect("an adapter");
    // Experts and what else is large of the first two, of the third its table, which is its head too.
    for (file, bytes) in [
        ("tests/data/lfm2moe-tiny-random.gguf", 40_000),
        ("tests/data/smallthinker-tiny-random.gguf", 40_000),
        ("models/lfm2-smol-Q4_0.gguf", 500_000),
    ] {
        let [whole, split] = [u64::MAX, bytes].map(|bytes| {
            device.limit_parts(bytes);
            let before = [device.n_made(), device.held_bytes()];
            let model = load(file, BackendKind::Gpu);
            let n_made = device.n_made() - before[0];
            let n_bytes = device.held_bytes() - before[1];
            let mut session = new_session(&model, KvType::F16, 128);
            (n_made, n_bytes, reply(&mut session))
        });
        device.limit_parts(u64::MAX);
        assert!(split.0 > whole.0 + 24, "{file}: {} of {}", split.0, whole.0);
        // What is planned is what whole matrices take.
        assert!(
            split.1 <= whole.1 + whole.1 / 100,
            "{file}: {} and {} bytes",
            split.1,
            whole.1
        );
        assert_eq!(split.2, whole.2, "{file}");
    }
}

#[test]
fn steady_decode_makes_nothing_on_the_device() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let dense = Sparsity::default();
    let window = Sparsity::new(Policy::Window, 100);
    for (file, kv, sparsity) in [
        ("models/lfm2-smol-Q4_0.gguf", KvType::Q8_0, dense),
        ("models/lfm2-smol-Q4_0.gguf", KvType::F16, window),
        ("models/lfm2-smol-Q4_0.gguf", KvType::F16, dhsa()),
        ("tests/data/lfm2moe-tiny-random.gguf", KvType::F16, dense),
        (
            "tests/data/smallthinker-tiny-random.gguf",
            KvType::F16,
            dense,
        ),
    ] {
        let model = load(file, BackendKind::Gpu);
        let mut session = sparse_session(&model, kv, 512, sparsity);
        let device = gpu::shared(None).expect("the same device");
        prefill(&mut session, &(10..140).collect::<Vec<u32>>());
        for k in [0, 40] {
            let mut decode = |n: u32| {
                for token in 0..n {
                    session.decode_top(token, k).expect("decode");
                }
                device.n_made()
            };
            let first = decode(6);
            let [submitted, ahead, _] = device.n_submitted();
            assert_eq!(decode(12), first, "{file}, {sparsity}, {k} logits");
            let [submitted, ahead] = {
                let now = device.n_submitted();
                [now[0] - submitted, now[1] - ahead]
            };
            // All, but where attention over more tokens takes another workgroup.
            assert!(
                12 * ahead >= 10 * submitted,
                "{file}, {sparsity}: {ahead} of {submitted}"
            );
        }
        // Each the largest: a pass is submitted while the one before runs.
        let mut next = 9;
        let mut chain = |n: usize| {
            for _ in 0..n {
                session.decode_top(next, 1).expect("decode");
                next = session.top()[0].0;
            }
            device.n_made()
        };
        let first = chain(6);
        let before = device.n_submitted();
        assert_eq!(chain(12), first, "{file}, {sparsity}, greedy");
        let now = device.n_submitted();
        let [submitted, _, while_running] = [0, 1, 2].map(|i| now[i] - before[i]);
        assert_eq!(while_running, submitted, "{file}, {sparsity}");
        assert!((12..=24).contains(&submitted), "{submitted} of 12 tokens");
    }
}

#[test]
fn pipelines_are_kept_for_the_next_process() {
    if !adapter() {
        return;
    }
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = std::env::temp_dir().join(format!("kinglet-kept-{}", std::process::id()));
    let options = LoadOptions {
        threads: 2,
        backend: BackendKind::Gpu,
        gpu_cache: Some(folder.join("made")),
        ..LoadOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lfm2-tiny-random.gguf");
    // A device is closed with its last user, so that each run opens it as a process would.
    let run = || {
        let model = Model::load(&path, &options).expect("the model loads");
        let mut session = new_session(&model, KvType::F16, 64);
        prefill(&mut session, &[1, 2, 3]);
        session.decode(4).expect("decode");
        session.logits().to_vec()
    };
    let expected = run();
    let Ok(mut files) = std::fs::read_dir(folder.join("made")) else {
        println!("skipped: this driver does not give its pipelines away");
        return;
    };
    let file = files.next().expect("a file").expect("its name").path();
    assert!(files.next().is_none(), "one file, and no temporary one");
    let whole = std::fs::read(&file).expect("what was kept");
    assert_eq!(run(), expected, "with what was kept");
    // What wgpu calls the key of the adapter, after our 16 bytes and 17 of its own; the checksum fits again.
    let mut foreign = whole.clone();
    foreign[33] ^= 1;
    let seed = xxh3_64(env!("CARGO_PKG_VERSION").as_bytes());
    let sum = xxh3_64_with_seed(&foreign[16..], seed);
    foreign[8..16].copy_from_slice(&sum.to_le_bytes());
    let mut flipped = whole.clone();
    *flipped.last_mut().expect("some bytes") ^= 1;
    for (what, bytes) in [
        ("another device's", &foreign[..]),
        ("a flipped bit", &flipped),
        ("the first half", &whole[..whole.len() / 2]),
        ("nothing", &[]),
        ("a text", b"not pipelines at all"),
    ] {
        std::fs::write(&file, bytes).expect("room for a file");
        assert_eq!(run(), expected, "{what}");
        let again = std::fs::read(&file).expect("what was kept");
        assert_eq!(again.len(), whole.len(), "{what} is replaced");
        assert_ne!(again, bytes, "{what} is replaced");
    }
    std::fs::remove_dir_all(folder).expect("it was made");
}
