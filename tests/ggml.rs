//! Our backend against ggml: every operation, every weight format, whole models. With the feature `ggml` alone.
//!
//! Both round activations to 8 bits, but each in its own way, so the bounds are those of two roundings.

#[path = "kernels/blocks.rs"]
#[expect(dead_code, reason = "shared with the kernel tests")]
mod blocks;
#[path = "kernels/common.rs"]
#[expect(dead_code, reason = "shared with the kernel tests")]
mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use kinglet::backend::cpu::Cpu;
use kinglet::backend::cpu::acts::Q8_LEN;
use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::cpu::table::{self, ActFormat};
use kinglet::backend::ggml::Ggml;
use kinglet::backend::{Activation, Attention, Backend, LinearOf, Rope, RopePairs, Step};
use kinglet::quant::{self, Bytes, DType, Tensor};
use kinglet::tokenizer::Special;
use kinglet::{BackendKind, Error, KvType, KvTypes, LoadOptions, Model, Session, SessionOptions};

use self::blocks::{Fill, random_blocks};
use self::common::{Random, assert_near};

fn cpu() -> Cpu {
    Cpu::new(Arc::new(Pool::new(2).expect("two threads")))
}

fn ggml() -> Ggml {
    Ggml::new(2).expect("two threads")
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

/// Rows of floats as activations of a backend: embeddings of a table that holds them.
fn upload<B: Backend>(b: &mut B, x: &[f32], n_cols: usize) -> B::Tensor {
    let n = x.len() / n_cols;
    let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let table = b.matrix(&tensor(DType::F32, n_cols, n, bytes));
    let tokens: Vec<u32> = (0..n as u32).collect();
    b.embed(&table.expect("floats"), &tokens, 1.0)
}

/// The step that has so many tokens.
fn step(n_tokens: usize) -> Step {
    match n_tokens {
        1 => Step::Decode,
        _ => Step::Prefill,
    }
}

fn read<B: Backend>(b: &mut B, x: &B::Tensor) -> Vec<f32> {
    let mut out = Vec::new();
    b.read(x, &mut out).expect("it runs");
    out
}

/// Compares `ours` with `theirs`, number by number.
#[track_caller]
fn compare(ours: &[f32], theirs: &[f32], tolerance: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        let at = format!("{what}, output {i}");
        assert_near(*ours, f64::from(*theirs), tolerance(i), &at);
    }
}

/// The largest magnitude.
fn largest(x: &[f32]) -> f64 {
    f64::from(x.iter().fold(0.0f32, |max, x| max.max(x.abs())))
}

#[test]
fn embeddings_of_every_format() {
    for &dtype in DType::ALL {
        let mut random = Random::new(100 + dtype as u64);
        let n_in = 3 * dtype.block_len().max(32);
        let n_blocks = 9 * n_in / dtype.block_len();
        let data = random_blocks(dtype, n_blocks, Fill::Random, &mut random);
        let table = tensor(dtype, n_in, 9, data);
        fn rows<B: Backend>(b: &mut B, table: &Tensor) -> Vec<f32> {
            let table = b.matrix(table).expect("a known format");
            let x = b.embed(&table, &[8, 0, 3, 3], 1.5);
            read(b, &x)
        }
        let (ours, theirs) = (rows(&mut cpu(), &table), rows(&mut ggml(), &table));
        // The same few products and a sum, in another order: scale and minimum may cancel.
        let block = |i: usize| i / dtype.block_len() * dtype.block_len();
        let bound = |i: usize| {
            let block = &theirs[block(i)..][..dtype.block_len()];
            8.0 * f64::from(f32::EPSILON) * largest(block)
        };
        compare(&ours, &theirs, bound, &format!("embed {dtype}"));
    }
}

/// Values that ggml quantizes together to multiply them with weights of a format, or the relative error of its floats.
enum Rounding {
    Blocks(usize),
    Floats(f64),
}

fn rounding(dtype: DType) -> Rounding {
    match dtype {
        DType::F32 => Rounding::Floats(0.0),
        DType::F16 => Rounding::Floats(1.0 / 2048.0),
        DType::BF16 => Rounding::Floats(1.0 / 256.0),
        _ => Rounding::Blocks(dtype.block_len()),
    }
}

/// The greatest error of each of `x` rounded to 8 bits in blocks of `n`.
fn steps(x: &[f32], n: usize) -> impl Iterator<Item = f64> {
    let block = move |block: &[f32]| vec![largest(block) / 127.0 / 2.0; block.len()];
    x.chunks(n).flat_map(block)
}

#[test]
fn linear_layers_of_every_format() {
    linear_layers("ggml", ggml());
}

#[test]
fn linear_layers_of_every_format_repacked() {
    linear_layers("ggml-repack", Ggml::repacking(2).expect("two threads"));
}

fn linear_layers(name: &str, mut backend: Ggml) {
    for &dtype in DType::ALL {
        let mut random = Random::new(200 + dtype as u64);
        let (n_out, n_tokens) = (64, 40); // whole tiles of every layout
        // Sums of squares of the differences, and what independent roundings make of them.
        let (mut found, mut expected) = (0.0, 0.0);
        for n_in in [256, 768] {
            let n_blocks = n_out * n_in / dtype.block_len();
            let data = random_blocks(dtype, n_blocks, Fill::Random, &mut random);
            let mut weights = vec![0.0; n_out * n_in];
            quant::dequantize(dtype, &data, &mut weights);
            let weight = tensor(dtype, n_in, n_out, data);
            let bias = random.floats(n_out, 1.0);
            let x = random.floats(n_tokens * n_in, 3.0);
            // One token, and many: GEMV and GEMM.
            for x in [&x[..n_in], &x] {
                let ours = linear(&mut cpu(), &weight, &bias, x);
                let theirs = linear(&mut backend, &weight, &bias, x);
                let what = format!(
                    "{name}: linear {dtype} n_in {n_in} tokens {}",
                    x.len() / n_in
                );
                assert_eq!(
                    (ours.len(), theirs.len()),
                    (x.len() / n_in * n_out, ours.len())
                );
                let outputs = x
                    .chunks_exact(n_in)
                    .flat_map(|x| weights.chunks_exact(n_in).map(move |w| (x, w)));
                for (i, (x, w)) in outputs.enumerate() {
                    let error = errors(dtype, x, w);
                    assert_near(ours[i], f64::from(theirs[i]), error.largest, &what);
                    found += f64::from(ours[i] - theirs[i]).powi(2) / error.largest.powi(2);
                    expected += error.variance / error.largest.powi(2);
                }
            }
        }
        let ratio = (found / expected).sqrt();
        println!("{name} {dtype}: differences are {ratio:.2} of what rounding makes of them");
        assert!(ratio < 2.0, "{name} {dtype}: {ratio:.2}");
    }
}

fn linear<B: Backend>(b: &mut B, weight: &Tensor, bias: &[f32], x: &[f32]) -> Vec<f32> {
    let layer = LinearOf {
        name: "with bias".into(),
        weight: b.matrix(weight).expect("a known format"),
        bias: Some(b.vector(bias.to_vec())),
    };
    let other = LinearOf {
        name: "without".into(),
        weight: b.matrix(weight).expect("a known format"),
        bias: None,
    };
    b.begin(step(x.len() / weight.n_in()));
    let x = upload(b, x, weight.n_in());
    let [_, y] = b.linear(&x, [&other, &layer]);
    read(b, &y)
}

struct Errors {
    /// Of the difference between the two backends.
    largest: f64,
    variance: f64,
}

/// What roundings do to the product of `x` and `w`: activations to 8 bits in blocks of 32 (ours) and of the format's
/// length (ggml's) or to short floats, block scales and sums to half floats, sums in any order. Where our matrix unit
/// rounds both sides to bf16 instead, it is no coarser.
fn errors(dtype: DType, x: &[f32], w: &[f32]) -> Errors {
    let q8 = table::gemv(dtype).expect("a row").acts() == ActFormat::Q8;
    let ours: Vec<f64> = match q8 {
        true => steps(x, Q8_LEN).collect(),
        false => vec![0.0; x.len()],
    };
    let theirs: Vec<f64> = match rounding(dtype) {
        Rounding::Blocks(n) => steps(x, n).collect(),
        Rounding::Floats(relative) => x.iter().map(|x| f64::from(x.abs()) * relative).collect(),
    };
    let size: f64 = w
        .chunks(Q8_LEN)
        .zip(x.chunks(Q8_LEN))
        .map(|(w, x)| 2.0 * largest(w) * x.iter().map(|x| f64::from(x.abs())).sum::<f64>())
        .sum();
    let half = match rounding(dtype) {
        Rounding::Blocks(_) => 1.0 / 2048.0,
        Rounding::Floats(_) => 0.0,
    };
    let sums = size * f64::from(f32::EPSILON) / 2.0 * (x.len() + 48) as f64;
    let terms = || w.iter().zip(ours.iter().zip(&theirs));
    let largest: f64 = terms()
        .map(|(w, (a, b))| f64::from(w.abs()) * (a + b))
        .sum();
    // A rounding error is uniform in its range: a third of the square of half a step.
    let variance: f64 = terms()
        .map(|(w, (a, b))| f64::from(*w).powi(2) * (a * a + b * b) / 3.0)
        .sum();
    Errors {
        largest: largest + half * size + sums,
        variance: variance + sums.powi(2) / 16.0,
    }
}

#[test]
fn norms_over_rows_and_heads() {
    let mut random = Random::new(300);
    for (n_cols, n_gain) in [(64, 64), (576, 576), (576, 64), (96, 24)] {
        for n_tokens in [1, 3, 20] {
            let x = random.floats(n_tokens * n_cols, 4.0);
            let gain = random.floats(n_gain, 2.0);
            fn norm<B: Backend>(b: &mut B, x: &[f32], n_cols: usize, gain: &[f32]) -> Vec<f32> {
                let gain = b.vector(gain.to_vec());
                let x = upload(b, x, n_cols);
                let y = b.rms_norm(&x, &gain, 1e-5);
                read(b, &y)
            }
            let ours = norm(&mut cpu(), &x, n_cols, &gain);
            let theirs = norm(&mut ggml(), &x, n_cols, &gain);
            let what = format!("rms_norm {n_cols} by {n_gain}");
            compare(
                &ours,
                &theirs,
                |i| 1e-6 * f64::from(theirs[i].abs()) + 1e-9,
                &what,
            );
        }
    }
}

#[test]
fn rotary_embeddings() {
    let mut random = Random::new(301);
    for pairs in [RopePairs::Halves, RopePairs::Neighbours] {
        for (head_dim, n_rot) in [(64, 64), (64, 32), (128, 128)] {
            let mut rope = Rope::new(10_000.0, n_rot, pairs);
            rope.inv_freq
                .iter_mut()
                .skip(8)
                .for_each(|freq| *freq /= 3.0); // as Llama 3's factors do
            for start in [0, 7, 5000] {
                let x = random.floats(5 * 3 * head_dim, 1.0);
                fn rotate<B: Backend>(
                    b: &mut B,
                    x: &[f32],
                    head_dim: usize,
                    rope: &Rope,
                    start: usize,
                ) -> Vec<f32> {
                    let mut x = upload(b, x, 3 * head_dim);
                    let angles = b.rope_angles(rope, start, 5);
                    b.rope(&mut x, head_dim, rope.pairs, &angles);
                    read(b, &x)
                }
                let ours = rotate(&mut cpu(), &x, head_dim, &rope, start);
                let theirs = rotate(&mut ggml(), &x, head_dim, &rope, start);
                // An angle is a product or a quotient of floats: one rounding of up to 5005 radians.
                let angle = (start + 5) as f64 * f64::from(f32::EPSILON);
                let what = format!("rope {pairs:?} {n_rot} of {head_dim} from {start}");
                compare(&ours, &theirs, |_| 2.0 * angle + 1e-6, &what);
            }
        }
    }
}

#[test]
fn gated_units() {
    let mut random = Random::new(302);
    for (activation, tolerance) in [
        (Activation::Silu, 1e-6),
        // ggml looks it up in a table of half floats.
        (Activation::GeluTanh, 1e-3),
        (Activation::Relu, 1e-7),
    ] {
        for n_tokens in [1, 12] {
            let (gate, up) = (
                random.floats(n_tokens * 100, 12.0),
                random.floats(n_tokens * 100, 2.0),
            );
            fn glu<B: Backend>(b: &mut B, gate: &[f32], up: &[f32], a: Activation) -> Vec<f32> {
                let (gate, up) = (upload(b, gate, 100), upload(b, up, 100));
                let y = b.glu(gate, &up, a);
                read(b, &y)
            }
            let ours = glu(&mut cpu(), &gate, &up, activation);
            let theirs = glu(&mut ggml(), &gate, &up, activation);
            let size = |i: usize| f64::from((gate[i] * up[i]).abs());
            let bound = |i: usize| tolerance * size(i) + 1e-9;
            compare(&ours, &theirs, bound, &format!("glu {activation:?}"));
        }
    }
}

#[test]
fn sums_and_rows() {
    let mut random = Random::new(303);
    let (x, y) = (random.floats(7 * 64, 1.0), random.floats(7 * 64, 1.0));
    fn run<B: Backend>(b: &mut B, x: &[f32], y: &[f32]) -> Vec<f32> {
        let (mut x, y) = (upload(b, x, 64), upload(b, y, 64));
        b.add(&mut x, &y);
        b.add(&mut x, &y);
        let x = b.rows_from(x, 4);
        read(b, &x)
    }
    let (ours, theirs) = (run(&mut cpu(), &x, &y), run(&mut ggml(), &x, &y));
    assert_eq!(ours.len(), 3 * 64);
    assert_eq!(ours, theirs);
}

/// Fills a cache in the given steps and attends from each of them; the outputs of all.
fn attend<B: Backend>(
    b: &mut B,
    shape: &Attention,
    kind: KvType,
    steps: &[usize],
    [q, k, v]: [&[f32]; 3],
) -> Vec<f32> {
    let (n_q, n_kv) = (
        shape.n_heads * shape.head_dim,
        shape.n_kv_heads * shape.head_dim,
    );
    let mut kv = b.kv(shape, &KvTypes::from(kind).into());
    let mut out = Vec::new();
    let mut start = 0;
    for n in steps {
        let end = start + n;
        b.kv_reserve(&mut kv, start..end).expect("memory");
        b.begin(step(*n));
        let q = upload(b, &q[start * n_q..end * n_q], n_q);
        let k = upload(b, &k[start * n_kv..end * n_kv], n_kv);
        let v = upload(b, &v[start * n_kv..end * n_kv], n_kv);
        b.kv_write(&mut kv, &k, &v, start);
        let y = b.attention(&q, &kv, start, shape);
        out.extend(read(b, &y));
        start = end;
    }
    out
}

#[test]
fn attention_in_steps_with_and_without_a_window() {
    let mut random = Random::new(304);
    let steps = [1, 5, 100, 1, 64, 1, 260, 1, 1, 90]; // 524: the caches grow twice
    let n: usize = steps.iter().sum();
    for (n_heads, n_kv_heads, head_dim) in [(4, 2, 64), (6, 2, 32), (3, 3, 80)] {
        for window in [None, Some(40)] {
            let shape = Attention {
                n_heads,
                n_kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window,
            };
            let q = random.floats(n * n_heads * head_dim, 3.0);
            let k = random.floats(n * n_kv_heads * head_dim, 1.0);
            let v = random.floats(n * n_kv_heads * head_dim, 1.0);
            for (kind, tolerance) in [
                (KvType::F32, 2e-6),
                // ggml rounds queries to half floats, and adds up values in half floats.
                (KvType::F16, 4e-3),
            ] {
                let inputs = [&q[..], &k, &v];
                let ours = attend(&mut cpu(), &shape, kind, &steps, inputs);
                let theirs = attend(&mut ggml(), &shape, kind, &steps, inputs);
                let what = format!("attention {shape:?} {kind:?}");
                compare(&ours, &theirs, |_| tolerance, &what);
            }
        }
    }
}

#[test]
fn short_convolutions_in_steps() {
    let mut random = Random::new(305);
    for (n_channels, n_taps) in [(64, 3), (20, 1), (33, 7)] {
        let steps = [1, 2, 30, 1, 1, 5];
        let n: usize = steps.iter().sum();
        let bcx = random.floats(n * 3 * n_channels, 2.0);
        let taps = random.floats(n_taps * n_channels, 1.0);
        fn convolve<B: Backend>(
            b: &mut B,
            n_channels: usize,
            steps: &[usize],
            bcx: &[f32],
            taps: &[f32],
        ) -> Vec<f32> {
            let n_rows = taps.len() / n_channels - 1;
            let taps = b.vector(taps.to_vec());
            let mut conv = b.conv(n_rows, n_channels);
            let mut out = Vec::new();
            // Twice: a reset forgets the first round.
            for _ in 0..2 {
                b.conv_reset(&mut conv);
                let mut rest = bcx;
                for n in steps {
                    let (step, after) = rest.split_at(n * 3 * n_channels);
                    let x = upload(b, step, 3 * n_channels);
                    let y = b.short_conv(&x, &taps, &mut conv);
                    out.extend(read(b, &y));
                    rest = after;
                }
            }
            out
        }
        let ours = convolve(&mut cpu(), n_channels, &steps, &bcx, &taps);
        let theirs = convolve(&mut ggml(), n_channels, &steps, &bcx, &taps);
        let (first, second) = theirs.split_at(theirs.len() / 2);
        assert_eq!(first, second, "after a reset");
        let what = format!("short_conv {n_taps} taps");
        compare(&ours, &theirs, |_| n_taps as f64 * 4e-6, &what);
    }
}

#[test]
fn what_cannot_be_is_an_error() {
    assert!(matches!(Ggml::new(0), Err(Error::Invalid(_))));
    assert!(matches!(Ggml::new(100_000), Err(Error::Invalid(_))));
    let short = tensor(DType::Q4_0, 64, 4, vec![0; 5]);
    assert!(matches!(ggml().matrix(&short), Err(Error::BadModel(_))));
}

#[test]
#[should_panic(expected = "another pass")]
fn a_tensor_ends_with_its_pass() {
    let mut b = ggml();
    let mut x = upload(&mut b, &[1.0; 8], 8);
    let y = upload(&mut b, &[1.0; 8], 8);
    b.flush().expect("it runs");
    b.add(&mut x, &y);
}

fn load(path: &str, backend: BackendKind) -> Model {
    let options = LoadOptions {
        threads: 1, // ggml's wait by spinning, and crawl beside other processes
        backend,
        ..LoadOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    Model::load(&path, &options).expect("the model loads")
}

/// Below this lead of the best token kernels with 8-bit activations may rightly prefer another.
const CLEAR_MARGIN: f32 = 0.5;

/// Replies of ggml, token by token: ours are the same, but where ggml itself is in two minds.
fn replies_agree(path: &str) {
    let models = [BackendKind::Ggml, BackendKind::Cpu].map(|kind| load(path, kind));
    let tokenizer = models[0].tokenizer().expect("a vocabulary");
    for prompt in [
        "The capital of France is",
        "Once upon a time there was a fox who",
        "def fibonacci(n):\n",
    ] {
        let tokens = tokenizer.encode_with_bos(prompt, Special::Text);
        let options = SessionOptions::default();
        let [mut theirs, mut ours] = models
            .each_ref()
            .map(|model| Session::new(model, &options).expect("a session"));
        for session in [&mut theirs, &mut ours] {
            session
                .prefill(&tokens, &mut |_, _| ControlFlow::Continue(()))
                .expect("it fits");
        }
        let mut n_ties = 0;
        for step in 0..64 {
            let (token, margin) = best(theirs.logits());
            let found = best(ours.logits()).0;
            assert!(
                found == token || margin < CLEAR_MARGIN,
                "{prompt:?}, step {step}: {found}, not {token}; margin {margin}"
            );
            n_ties += usize::from(found != token);
            theirs.decode(token).expect("it fits");
            ours.decode(token).expect("it fits");
        }
        println!("{path}, {prompt:?}: {n_ties} of 64 tokens differ, at near-ties");
        assert!(n_ties <= 6, "{prompt:?}: {n_ties} of 64 tokens differ");
    }
}

/// The best token, and its lead.
fn best(logits: &[f32]) -> (u32, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    let mut second = f32::NEG_INFINITY;
    for (i, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            second = best.1;
            best = (i as u32, *logit);
        } else if *logit > second {
            second = *logit;
        }
    }
    (best.0, best.1 - second)
}

#[test]
fn the_chat_model_replies_alike() {
    replies_agree("models/lfm2-smol-Q4_0.gguf");
}

#[test]
fn smollm2_replies_alike() {
    let path = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    if !Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists() {
        assert!(
            std::env::var_os("KINGLET_REQUIRE_MODELS").is_none(),
            "{path} is missing: models/get-smollm2.sh"
        );
        println!("skipped: {path} is missing; models/get-smollm2.sh gets it");
        return;
    }
    replies_agree(path);
}
