//! The GPU backend against the CPU: operations, whole models, what sessions do. Needs an adapter; a software driver will
//! do (`.ci/lavapipe`). Without one every test says that it was skipped.

#[path = "gpu/ahead.rs"]
mod ahead;
#[path = "kernels/blocks.rs"]
#[expect(dead_code, reason = "shared with the kernel tests")]
mod blocks;
#[path = "kernels/common.rs"]
#[expect(dead_code, reason = "shared with the kernel tests")]
mod common;
#[path = "gpu/experts.rs"]
mod experts;
#[path = "common/on_gpu.rs"]
mod on_gpu;
#[path = "common/replies.rs"]
mod replies;
#[path = "gpu/sparse.rs"]
mod sparse;

use std::path::Path;
use std::sync::Arc;

use kinglet::backend::cpu::Cpu;
use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::gpu::{self, Device, Gpu};
use kinglet::backend::select::KvOptions;
use kinglet::backend::{
    Activation, Attention, Backend, GatedFfnOf, LinearOf, Rope, RopePairs, Step,
};
use kinglet::quant::{self, Bytes, DType, Tensor};
use kinglet::session::{Extra, StateFile};
use kinglet::tokenizer::Special;
use kinglet::{
    BackendKind, DeviceFault, Error, KvType, KvTypes, LoadOptions, Model, Session, SessionOptions,
    Sparsity,
};
use serde_json::Value;

use self::blocks::{Fill, random_blocks};
use self::common::{Random, assert_near};
use self::on_gpu::{adapter, argmax, distance, load, new_session, prefill, sparse_session};

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/golden")
        .join(name);
    serde_json::from_str(&std::fs::read_to_string(path).expect("golden file")).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().expect("ids").iter();
    ids.map(|id| id.as_u64().expect("id") as u32).collect()
}

#[test]
fn tiny_models_match_the_references() {
    if !adapter() {
        return;
    }
    for name in ["lfm2", "lfm2moe", "smallthinker"] {
        let model = load(
            &format!("tests/data/{name}-tiny-random.gguf"),
            BackendKind::Gpu,
        );
        let golden = golden(&format!("{name}-tiny-random.json"));
        for sequence in golden["sequences"].as_array().expect("sequences") {
            let tokens = ids(&sequence["tokens"]);
            let logits = sequence["last_logits"].as_array().expect("logits").iter();
            let expected: Vec<f32> = logits.map(|x| x.as_f64().expect("logit") as f32).collect();
            let check = |session: &Session, how: &str| {
                let d = distance(session.logits(), &expected);
                assert!(d < 1e-4, "{name}, {} tokens, {how}: {d:e}", tokens.len());
            };
            for batch in [512, 3] {
                let mut whole = new_session(&model, KvType::F32, batch);
                prefill(&mut whole, &tokens);
                check(&whole, &format!("chunks of {batch}"));
            }
            let mut stepped = new_session(&model, KvType::F32, 512);
            let step = |token: &u32| {
                stepped.decode(*token).expect("decode");
                argmax(stepped.logits())
            };
            let argmaxes: Vec<u32> = tokens.iter().map(step).collect();
            check(&stepped, "token by token");
            assert_eq!(argmaxes, ids(&sequence["argmax"]), "{name}");
        }
    }
}

#[test]
fn sessions_go_back_part_and_come_back_from_files() {
    if !adapter() {
        return;
    }
    for name in ["lfm2", "lfm2moe"] {
        let name = format!("tests/data/{name}-tiny-random.gguf");
        go_back_part_and_come_back(&name, Sparsity::default());
    }
}

fn go_back_part_and_come_back(name: &str, sparsity: Sparsity) {
    let model = load(name, BackendKind::Gpu);
    let tokens: Vec<u32> = (0..300).map(|i| (i * 37 + 11) % 320).collect();
    let tail = [7, 70, 200];
    let mut long = sparse_session(&model, KvType::F16, 64, sparsity);
    prefill(&mut long, &tokens);
    for token in [5, 6, 9] {
        long.decode(token).expect("decode");
    }
    for cut in [302, 299, 250, 17, 1] {
        long.truncate(cut).expect("truncate");
        let mut fork = long.fork().expect("a fork");
        prefill(&mut fork, &tail);
        let mut fresh = sparse_session(&model, KvType::F16, 64, sparsity);
        prefill(&mut fresh, &tokens[..cut.min(300)]);
        for token in [5, 6, 9].iter().take(cut.saturating_sub(300)) {
            fresh.decode(*token).expect("decode");
        }
        prefill(&mut fresh, &tail);
        assert_eq!(
            fork.logits(),
            fresh.logits(),
            "{name}, {sparsity}, cut at {cut}"
        );
    }

    prefill(&mut long, &tokens[..290]);
    // Other tests of this process save theirs at the same time.
    let thread = format!("{:?}", std::thread::current().id());
    let file = format!("kinglet-gpu-{}-{thread}.state", std::process::id());
    let file = std::env::temp_dir().join(file);
    long.save(&file, &Extra::default()).expect("room");
    let cpu = load(name, BackendKind::Cpu);
    long.decode(3).expect("decode");
    for model in [&model, &cpu] {
        let found = StateFile::open(&file).and_then(|file| file.load(model, &long.options()));
        let (mut found, _) = found.expect("what was saved");
        found.decode(3).expect("decode");
        let d = distance(found.logits(), long.logits());
        let bound = if model.backend() == BackendKind::Gpu {
            0.0
        } else {
            1e-3
        };
        assert!(
            d <= bound,
            "{name}, {sparsity}, {}: {d:e}",
            model.backend().name()
        );
    }
    std::fs::remove_file(file).expect("a file");
}

/// As in `golden.rs`: activations are 8-bit here and floats in the reference.
const TOLERANCE_TO_FLOATS: f32 = 0.4;
const CLEAR_MARGIN: f64 = 0.5;

#[test]
fn the_chat_model_agrees_with_the_reference_wherever_the_reference_is_clear() {
    if !adapter() {
        return;
    }
    let model = load("models/lfm2-smol-Q4_0.gguf", BackendKind::Gpu);
    let golden = golden("lfm2-smol.json");
    let prompt = &golden["prompts"][0];
    let mut session = new_session(&model, KvType::F16, 512);
    prefill(&mut session, &ids(&prompt["tokens"]));
    let mut worst = 0.0f32;
    for pair in prompt["top20"].as_array().expect("top20") {
        let id = pair[0].as_u64().expect("id") as usize;
        let logit = pair[1].as_f64().expect("logit") as f32;
        worst = worst.max((session.logits()[id] - logit).abs());
    }
    println!("top-20 logits within {worst:.3}");
    assert!(worst < TOLERANCE_TO_FLOATS, "{worst} from the reference");
    let margins = prompt["greedy_margin"].as_array().expect("margins");
    let steps = ids(&prompt["greedy32"]).into_iter().zip(margins);
    for (step, (token, margin)) in steps.take(8).enumerate() {
        let found = argmax(session.logits());
        let margin = margin.as_f64().expect("margin");
        assert!(
            found == token || margin < CLEAR_MARGIN,
            "step {step}: {found}, not {token}; margin {margin}"
        );
        session.decode(token).expect("decode");
    }
}

#[test]
fn what_the_gpu_cannot_do_and_a_lost_device_are_errors() {
    if !adapter() {
        return;
    }
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let quantized = SessionOptions {
        kv: KvType::Q4_0.into(),
        ..SessionOptions::default()
    };
    assert!(Session::new(&model, &quantized).is_err());
    let nowhere = LoadOptions {
        backend: BackendKind::Gpu,
        device: Some(1000),
        ..LoadOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lfm2-tiny-random.gguf");
    let error = Model::load(&path, &nowhere)
        .map(drop)
        .expect_err("no such device");
    assert!(error.to_string().contains("1000"), "{error}");

    let device = Arc::new(Device::open(None).expect("an adapter"));
    let mut gpu = Gpu::new(Arc::clone(&device)).expect("memory");
    gpu.begin(Step::Decode);
    let x = upload(&mut gpu, &[1.0; 64], 64);
    device.lose();
    let mut out = Vec::new();
    let error = gpu.read(&x, &mut out).expect_err("the device is gone");
    println!("{error}");
    let lost =
        |error: &Error| matches!(error, Error::Device { fault, .. } if *fault == DeviceFault::Lost);
    assert!(lost(&error), "{error}");
    assert!(gpu.flush().is_err_and(|error| lost(&error)));
}

/// The tokens of the best logits after a prompt, and by how much each is ahead of the next best.
fn greedy(session: &mut Session, prompt: &[u32], n: usize) -> Vec<(u32, f32)> {
    prefill(session, prompt);
    let mut reply = Vec::new();
    for _ in 0..n {
        let logits = session.logits();
        let best = argmax(logits);
        let others = (0..logits.len()).filter(|i| *i != best as usize);
        let next = others.fold(f32::NEG_INFINITY, |max, i| max.max(logits[i]));
        reply.push((best, logits[best as usize] - next));
        session.decode(best).expect("decode");
    }
    reply
}

#[test]
fn layers_and_experts_stay_on_the_cpu() {
    if !adapter() {
        return;
    }
    for name in ["lfm2", "lfm2moe", "smallthinker"] {
        let file = format!("tests/data/{name}-tiny-random.gguf");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&file);
        let cpu = load(&file, BackendKind::Cpu);
        let n_layers = cpu.info().config.n_layers;
        let prompt: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 320).collect();
        let run = |session: &mut Session| {
            let reply = greedy(session, &prompt, 6);
            session.truncate(43).expect("back");
            let mut fork = session.fork().expect("a fork");
            prefill(&mut fork, &[1, 2, 3]);
            session.truncate(41).expect("back");
            prefill(session, &[4, 5]);
            let logits = [fork.logits(), session.logits()].concat();
            (
                reply
                    .into_iter()
                    .map(|(token, _)| token)
                    .collect::<Vec<_>>(),
                logits,
            )
        };
        let expected = run(&mut new_session(&cpu, KvType::F32, 16));
        for cpu_moe in [false, true] {
            for n in 0..=n_layers + 1 {
                if cpu_moe && ![1, n_layers].contains(&n) {
                    continue;
                }
                let options = LoadOptions {
                    threads: 2,
                    backend: BackendKind::Gpu,
                    gpu_layers: Some(n),
                    cpu_moe,
                    ..LoadOptions::default()
                };
                let model = Model::load(&path, &options).expect("the model loads");
                let mut session = new_session(&model, KvType::F32, 16);
                let found = run(&mut session);
                let what =
                    format!("{name}, {n} of {n_layers} layers, experts on the CPU: {cpu_moe}");
                assert_eq!(found.0, expected.0, "{what}");
                let d = distance(&found.1, &expected.1);
                assert!(d < 1e-3, "{what}: {d:e}");
                assert_eq!(session.device_fault(), None, "{what}");
                // A file of one is a file of all.
                if n == 1 {
                    let file = format!("kinglet-split-{}-{name}.state", std::process::id());
                    let file = std::env::temp_dir().join(file);
                    session.save(&file, &Extra::default()).expect("room");
                    for model in [&cpu, &model] {
                        let found = StateFile::open(&file)
                            .and_then(|file| file.load(model, &session.options()));
                        let (mut found, _) = found.expect("what was saved");
                        found.decode(9).expect("decode");
                        let mut fork = session.fork().expect("a fork");
                        fork.decode(9).expect("decode");
                        let d = distance(found.logits(), fork.logits());
                        assert!(d < 1e-3, "{what}: {d:e}");
                    }
                    std::fs::remove_file(file).expect("a file");
                }
            }
        }
    }
}

#[test]
fn caches_of_eight_bits_are_those_of_files() {
    if !adapter() {
        return;
    }
    // Heads of the tiny models are no whole blocks.
    let file = "models/lfm2-smol-Q4_0.gguf";
    let (gpu, cpu) = (load(file, BackendKind::Gpu), load(file, BackendKind::Cpu));
    let tokens: Vec<u32> = (100..370).collect();
    let mut session = new_session(&gpu, KvType::Q8_0, 128);
    prefill(&mut session, &tokens);
    let file = std::env::temp_dir().join(format!("kinglet-q8-{}.state", std::process::id()));
    session.save(&file, &Extra::default()).expect("room");
    session.decode(7).expect("decode");
    for model in [&gpu, &cpu] {
        let found = StateFile::open(&file).and_then(|file| file.load(model, &session.options()));
        let (mut found, _) = found.expect("what was saved");
        found.decode(7).expect("decode");
        let d = distance(found.logits(), session.logits());
        // The same bits are read; activations are rounded to eight bits on both sides, not to the same.
        let bound = if model.backend() == BackendKind::Gpu {
            0.0
        } else {
            3e-2
        };
        println!("{}: {d:e}", model.backend().name());
        assert!(d <= bound, "{}: {d:e}", model.backend().name());
    }
    std::fs::remove_file(file).expect("a file");
}

/// Greedy tokens of both backends, up to where they part: there the two best were near each other on the CPU.
#[test]
fn greedy_tokens_part_at_near_ties_alone() {
    if !adapter() {
        return;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR"));
    let smol = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    let named = std::env::var("KINGLET_GPU_MODEL").ok();
    let mut files = vec!["models/lfm2-smol-Q4_0.gguf".to_owned()];
    match &named {
        Some(named) => files = vec![named.clone()],
        None if path.join(smol).exists() => files.push(smol.to_owned()),
        None => {
            let required = std::env::var_os("KINGLET_REQUIRE_MODELS").is_some();
            assert!(!required, "{smol} is missing");
            println!("skipped: {smol} is missing");
        }
    }
    let n = if named.is_some() { 64 } else { 24 };
    for file in files {
        let run = |backend| {
            let model = load(&file, backend);
            let tokenizer = model.tokenizer().expect("a vocabulary");
            let prompt = "The capital of France is Paris. The capital of Italy is";
            let prompt = tokenizer.encode_with_bos(prompt, Special::Text);
            let mut session = new_session(&model, KvType::F16, 512);
            (greedy(&mut session, &prompt, n), session.logits().to_vec())
        };
        let ((expected, _), (found, _)) = (run(BackendKind::Cpu), run(BackendKind::Gpu));
        let parts = expected.iter().zip(&found).position(|(a, b)| a.0 != b.0);
        match parts {
            None => println!("{file}: {n} tokens are the same"),
            Some(at) => {
                let (gap, other) = (expected[at].1, found[at].1);
                println!("{file}: {at} tokens are the same, then gaps of {gap:.3} and {other:.3}");
                assert!(
                    gap < NEAR,
                    "{file}: token {at} is ahead by {gap} on the CPU"
                );
            }
        }
    }
}

/// Logits that two roundings of activations to eight bits may take for each other.
const NEAR: f32 = 0.3;

#[test]
fn the_largest_of_a_row_are_those_that_sorting_finds() {
    if !adapter() {
        return;
    }
    let mut gpu = gpu();
    for (n, k) in [
        (8, 1),
        (1000, 1),
        (70_000, 1),
        (1024, 2),
        (4100, 40),
        (70_000, 200),
    ] {
        let mut random = Random::new(n as u64);
        for special in [None, Some(f32::NAN), Some(f32::NEG_INFINITY), Some(0.0)] {
            // Some thousand numbers, so that many are equal.
            let mut row: Vec<f32> = random.floats(n, 1000.0).iter().map(|x| x.round()).collect();
            if let Some(special) = special {
                (row[n / 3], row[n - 1]) = (special, -special);
                if special == 0.0 {
                    row.iter_mut().for_each(|x| *x = x.min(-0.0));
                }
            }
            gpu.begin(Step::Decode);
            let x = upload(&mut gpu, &row, n);
            let mut found = Vec::new();
            assert!(gpu.read_top(&x, k, &mut found).expect("it runs"));
            let mut order: Vec<usize> = (0..n).collect();
            let key = |i: usize| match row[i] {
                x if x.is_nan() => f32::INFINITY,
                x if k == 1 => x + 0.0,
                x => x,
            };
            order.sort_by(|&a, &b| key(b).total_cmp(&key(a)).then(a.cmp(&b)));
            let expected = order[..k].iter().map(|&i| (i as u32, row[i]));
            for (found, expected) in found.iter().zip(expected) {
                let same = found.1 == expected.1 || (found.1.is_nan() && expected.1.is_nan());
                assert!(
                    same && found.0 == expected.0,
                    "{n}, {k}, {special:?}: {found:?}, not {expected:?}"
                );
            }
            assert_eq!(found.len(), k);
        }
    }
}

#[test]
fn the_largest_logits_choose_the_tokens_that_all_of_them_would() {
    if !adapter() {
        return;
    }
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let prompt: Vec<u32> = (0..20).map(|i| (i * 37 + 11) % 320).collect();
    replies::are_the_same(|| new_session(&model, KvType::F16, 512), &prompt, 320);
}

fn cpu() -> Cpu {
    Cpu::new(Arc::new(Pool::new(2).expect("two threads")))
}

fn gpu() -> Gpu {
    Gpu::new(gpu::shared(None).expect("an adapter")).expect("memory")
}

/// A weight matrix as a file holds it.
fn tensor(dtype: DType, n_in: usize, n_out: usize, data: Vec<u8>) -> Tensor {
    let len = data.len();
    Tensor {
        name: format!("random {dtype}"),
        dtype,
        shape: [n_in, n_out, 1, 1],
        data: Bytes::new(Arc::new(data), 0..len),
    }
}

fn random_tensor(dtype: DType, n_in: usize, n_out: usize, random: &mut Random) -> Tensor {
    let n_blocks = n_out * n_in / dtype.block_len();
    tensor(
        dtype,
        n_in,
        n_out,
        random_blocks(dtype, n_blocks, Fill::Random, random),
    )
}

/// Rows of floats as activations: embeddings of a table that holds them.
fn upload<B: Backend>(b: &mut B, x: &[f32], n_cols: usize) -> B::Tensor {
    let n = x.len() / n_cols;
    let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let table = b
        .matrix(&tensor(DType::F32, n_cols, n, bytes))
        .expect("floats");
    let tokens: Vec<u32> = (0..n as u32).collect();
    b.embed(&table, &tokens, 1.0)
}

fn read<B: Backend>(b: &mut B, x: &B::Tensor) -> Vec<f32> {
    let mut out = Vec::new();
    b.read(x, &mut out).expect("it runs");
    out
}

fn largest(x: &[f32]) -> f64 {
    f64::from(x.iter().fold(0.0f32, |max, x| max.max(x.abs())))
}

/// All within `share` of the largest of `expected`.
#[track_caller]
fn near(found: &[f32], expected: &[f32], share: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let bound = share * largest(expected);
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert_near(*a, f64::from(*b), bound, &format!("{what}, output {i}"));
    }
}

#[test]
fn tables_of_every_format() {
    if !adapter() {
        return;
    }
    let mut gpu = gpu();
    for &dtype in DType::ALL {
        let mut random = Random::new(300 + dtype as u64);
        let n_in = 3 * dtype.block_len().max(32);
        let table = random_tensor(dtype, n_in, 9, &mut random);
        let mut weights = vec![0.0; 9 * n_in];
        quant::dequantize(dtype, &table.data, &mut weights);
        let matrix = gpu.matrix(&table).expect("a known format");
        gpu.begin(Step::Prefill);
        let x = gpu.embed(&matrix, &[8, 0, 3, 3], 1.5);
        let found = read(&mut gpu, &x);
        let rows = [8, 0, 3, 3].map(|row| &weights[row * n_in..][..n_in]);
        let block_len = dtype.block_len();
        for (i, found) in found.iter().enumerate() {
            let row = rows[i / n_in];
            let at = i % n_in;
            // Scale times code and minimum may cancel, and subnormals may be taken for 0.
            let block = &row[at / block_len * block_len..][..block_len];
            let bound = 16.0 * f64::from(f32::EPSILON) * largest(block) + 1e-6;
            let expected = 1.5 * f64::from(row[at]);
            assert_near(*found, expected, bound, &format!("{dtype}, output {i}"));
        }
    }
}

/// The error of a product whose input is rounded to 8 bits per 32, or of one whose sides are half floats.
fn bound(dtype: DType, step: Step, x: &[f32], w: &[f32]) -> f64 {
    let products = x.iter().zip(w).map(|(x, w)| f64::from(x * w).abs());
    let of_floats = 4.0 * f64::from(f32::EPSILON) * products.clone().sum::<f64>();
    let is_float = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    match step {
        Step::Decode if !is_float => {
            let blocks = x.chunks(32).zip(w.chunks(32));
            let of_block = |(x, w): (&[f32], &[f32])| {
                let sum: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                largest(x) / 127.0 * 0.5001 * sum
            };
            blocks.map(of_block).sum::<f64>() + 4.0 * of_floats
        }
        Step::Prefill if dtype != DType::F32 => products.sum::<f64>() / 1000.0 + 1e-6,
        _ => 8.0 * of_floats,
    }
}

#[test]
fn linear_layers_of_every_format() {
    if !adapter() {
        return;
    }
    let mut gpu = gpu();
    for &dtype in DType::ALL {
        let mut random = Random::new(400 + dtype as u64);
        for (n_in, n_out, n_tokens) in [(256, 70, 3), (768, 33, 21)] {
            let table = random_tensor(dtype, n_in, n_out, &mut random);
            let mut weights = vec![0.0; n_in * n_out];
            quant::dequantize(dtype, &table.data, &mut weights);
            // What half floats cannot hold is not compared: no model has such weights.
            let scale = largest(&weights).max(1e-3);
            let x = random.floats(n_tokens * n_in, 3.0);
            let bias = random.floats(n_out, 1.0);
            let layer = LinearOf {
                name: "with bias".into(),
                weight: gpu.matrix(&table).expect("a known format"),
                bias: Some(gpu.vector(bias.clone())),
            };
            for step in [Step::Decode, Step::Prefill] {
                if step == Step::Prefill && scale > 60000.0 {
                    continue;
                }
                gpu.begin(step);
                let input = upload(&mut gpu, &x, n_in);
                let [y] = gpu.linear(&input, [&layer]);
                let found = read(&mut gpu, &y);
                let outputs = x
                    .chunks_exact(n_in)
                    .flat_map(|x| weights.chunks_exact(n_in).map(move |w| (x, w)));
                for (i, (x, w)) in outputs.enumerate() {
                    let exact: f64 = x
                        .iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum();
                    let expected = exact + f64::from(bias[i % n_out]);
                    let bound = bound(dtype, step, x, w) + 1e-5;
                    let what = format!("{dtype} {step:?} {n_in} x {n_out}, output {i}");
                    assert_near(found[i], expected, bound, &what);
                }
            }
        }
    }
}

/// Runs the same on both backends.
macro_rules! both {
    ($run:expr, $share:expr, $what:expr) => {{
        let expected = $run(&mut cpu());
        let found = $run(&mut gpu());
        near(&found, &expected, $share, $what);
    }};
}

#[test]
fn norms_units_sums_and_residuals() {
    if !adapter() {
        return;
    }
    fn run<B: Backend>(b: &mut B, step: Step, activation: Activation) -> Vec<f32> {
        let (n, n_ffn, n_tokens) = (96, 160, 5);
        let mut random = Random::new(500);
        let mut linear = |n_in, n_out| LinearOf {
            name: "random".into(),
            weight: b
                .matrix(&random_tensor(DType::F32, n_in, n_out, &mut random))
                .expect("floats"),
            bias: None,
        };
        let ffn = GatedFfnOf {
            gate: linear(n, n_ffn),
            up: linear(n, n_ffn),
            down: linear(n_ffn, n),
            activation,
        };
        let gain = b.vector(random.floats(n, 1.0));
        b.begin(step);
        let x = random.floats(n_tokens * n, 2.0);
        let mut x = upload(b, &x, n);
        let h = b.rms_norm(&x, &gain, 1e-5);
        let h = b.gated_ffn(&h, &ffn);
        // A norm after, as Gemma has it; then the plain sum, then a norm that nobody joins.
        let h = b.rms_norm(&h, &gain, 1e-5);
        b.add(&mut x, &h);
        let h = b.rms_norm(&x, &gain, 1e-5);
        let [h] = b.linear(&h, [&ffn.gate]);
        let [h] = b.linear(&h, [&ffn.down]);
        b.add(&mut x, &h);
        let y = upload(b, &[0.5; 96 * 5], n);
        b.add(&mut x, &y);
        let x = b.rms_norm(&x, &gain, 1e-5);
        let x = b.rows_from(x, 1);
        read(b, &x)
    }
    for step in [Step::Decode, Step::Prefill] {
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Relu] {
            let what = format!("{step:?} {activation:?}");
            both!(|b: &mut _| run(b, step, activation), 1e-4, &what);
        }
    }
}

/// Attention over `n_past` keys and then `n_tokens` more; sizes, and what is done to heads before.
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Attention,
    n_past: usize,
    n_tokens: usize,
    kv: KvTypes,
    pairs: Option<RopePairs>,
    normed: bool,
}

/// What the last of two passes makes of random tokens.
fn attend<B: Backend>(b: &mut B, case: Case, options: &KvOptions, step: Step) -> Vec<f32> {
    let mut random = Random::new(600);
    let Attention {
        n_heads,
        n_kv_heads,
        head_dim: d,
        ..
    } = case.shape;
    let mut kv = b.kv(&case.shape, options);
    let gain = b.vector(random.floats(d, 1.0));
    let rope = Rope::new(10_000.0, d, case.pairs.unwrap_or(RopePairs::Halves));
    let mut out = Vec::new();
    for (start, n, step) in [
        (0, case.n_past, Step::Prefill),
        (case.n_past, case.n_tokens, step),
    ] {
        b.kv_reserve(&mut kv, start..start + n).expect("memory");
        let [q, k, v] = [n_heads, n_kv_heads, n_kv_heads].map(|h| random.floats(n * h * d, 2.0));
        if n == 0 {
            continue;
        }
        b.begin(step);
        let angles = b.rope_angles(&rope, start, n);
        let mut q = upload(b, &q, n_heads * d);
        let mut k = upload(b, &k, n_kv_heads * d);
        let v = upload(b, &v, n_kv_heads * d);
        if case.normed {
            q = b.rms_norm(&q, &gain, 1e-6);
            k = b.rms_norm(&k, &gain, 1e-6);
        }
        if let Some(pairs) = case.pairs {
            b.rope(&mut q, d, pairs, &angles);
            b.rope(&mut k, d, pairs, &angles);
        }
        b.kv_write(&mut kv, &k, &v, start);
        let y = b.attention(&q, &kv, start, &case.shape);
        out = read(b, &y);
    }
    out
}

#[test]
fn attention_of_every_shape() {
    if !adapter() {
        return;
    }
    let shape = |n_heads, n_kv_heads, head_dim, window| Attention {
        n_heads,
        n_kv_heads,
        head_dim,
        scale: 0.3,
        window,
    };
    let case = |shape, n_past, n_tokens, kv: KvType, pairs, normed| Case {
        shape,
        n_past,
        n_tokens,
        kv: kv.into(),
        pairs,
        normed,
    };
    let (halves, neighbours) = (Some(RopePairs::Halves), Some(RopePairs::Neighbours));
    for case in [
        case(shape(4, 2, 16, None), 0, 1, KvType::F32, halves, true),
        case(shape(4, 2, 16, None), 20, 7, KvType::F32, neighbours, false),
        case(
            shape(9, 3, 64, None),
            130,
            1,
            KvType::F16,
            neighbours,
            false,
        ),
        case(shape(8, 1, 64, None), 700, 2, KvType::F16, halves, true),
        case(shape(4, 1, 256, Some(40)), 60, 3, KvType::F16, halves, true),
        case(shape(2, 2, 80, Some(300)), 500, 1, KvType::F16, None, false),
        case(shape(4, 2, 32, None), 70, 5, KvType::Q8_0, halves, true),
        case(
            shape(9, 3, 64, None),
            400,
            1,
            KvType::Q8_0,
            neighbours,
            false,
        ),
        case(
            shape(4, 1, 256, Some(40)),
            60,
            3,
            KvType::Q8_0,
            halves,
            true,
        ),
    ] {
        // The tiles of AMX, which read prompts, round more than the GPU does.
        let options = case.kv.into();
        let expected = attend(&mut cpu(), case, &options, Step::Decode);
        for step in [Step::Decode, Step::Prefill] {
            let what = format!("{case:?} {step:?}");
            // Keys are rounded to half floats after a rotation that may differ in its last bit.
            // Of eight bits a code may be the next one then: half a per cent of the largest of its block.
            let share = if case.kv.is_quantized() { 1e-2 } else { 3e-3 };
            let found = attend(&mut gpu(), case, &options, step);
            near(&found, &expected, share, &what);
        }
    }
}

#[test]
fn convolutions_remember_rewind_and_come_back() {
    if !adapter() {
        return;
    }
    fn run<B: Backend>(b: &mut B, n_taps: usize) -> Vec<f32> {
        let n = 96;
        let mut random = Random::new(700);
        let taps = b.vector(random.floats(n_taps * n, 1.0));
        let mut conv = b.conv(n_taps - 1, n);
        let mut out = Vec::new();
        for n_tokens in [1, 1, 5, 40, 1, 2, 1] {
            b.begin(Step::Prefill);
            let x = random.floats(n_tokens * 3 * n, 2.0);
            let x = upload(b, &x, 3 * n);
            let y = b.short_conv(&x, &taps, &mut conv);
            out.extend(read(b, &y));
        }
        assert!(b.conv_rewind(&mut conv, 3));
        b.conv_rows(&conv, &mut out);
        let mut rows = Vec::new();
        b.conv_rows(&conv, &mut rows);
        let mut again = b.conv(n_taps - 1, n);
        b.conv_set(&mut again, &rows);
        b.begin(Step::Decode);
        let x = random.floats(3 * n, 2.0);
        for conv in [&mut conv, &mut again] {
            let x = upload(b, &x, 3 * n);
            let y = b.short_conv(&x, &taps, conv);
            out.extend(read(b, &y));
            b.begin(Step::Decode);
        }
        out
    }
    for n_taps in [1, 3, 7] {
        both!(|b: &mut _| run(b, n_taps), 1e-6, &format!("{n_taps} taps"));
    }
}
