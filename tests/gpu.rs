//! The GPU backend against the CPU: operations, whole models, what sessions do. Needs an adapter; a software driver will
//! do (`.ci/lavapipe`). Without one every test says that it was skipped.

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
use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::gpu::{self, Gpu};
use kinglet::backend::{
    Activation, Attention, Backend, GatedFfnOf, LinearOf, Rope, RopePairs, Step,
};
use kinglet::quant::{self, Bytes, DType, Tensor};
use kinglet::{BackendKind, KvType, KvTypes, LoadOptions, Model, Session, SessionOptions};

use self::blocks::{Fill, random_blocks};
use self::common::{Random, assert_near};

/// Whether there is an adapter; says so if not.
fn adapter() -> bool {
    let found = !gpu::adapters().is_empty();
    if !found {
        assert!(
            std::env::var_os("KINGLET_REQUIRE_GPU").is_none(),
            "no adapter"
        );
        println!("skipped: no adapter");
    }
    found
}

fn load(path: &str, backend: BackendKind) -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let options = LoadOptions {
        threads: 2,
        backend,
        ..LoadOptions::default()
    };
    Model::load(&path, &options).expect("the model loads")
}

fn session(model: &Model, kv: KvType, batch: usize) -> Session {
    let options = SessionOptions {
        n_ctx: 512,
        kv: kv.into(),
        batch,
        ..SessionOptions::default()
    };
    Session::new(model, &options).expect("a session")
}

fn prefill(session: &mut Session, tokens: &[u32]) {
    session
        .prefill(tokens, &mut |_, _| ControlFlow::Continue(()))
        .expect("prefill");
}

/// Largest difference, relative to the largest logit.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / scale
}

#[test]
fn tiny_models_are_those_of_the_cpu() {
    if !adapter() {
        return;
    }
    for name in ["lfm2", "lfm2moe", "smallthinker"] {
        let path = format!("tests/data/{name}-tiny-random.gguf");
        let (cpu, gpu) = (load(&path, BackendKind::Cpu), load(&path, BackendKind::Gpu));
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % 320).collect();
        let [mut a, mut b] = [&cpu, &gpu].map(|model| session(model, KvType::F32, 16));
        for s in [&mut a, &mut b] {
            prefill(s, &tokens);
        }
        let d = distance(b.logits(), a.logits());
        println!("{name}: prefill {d:e}");
        assert!(d < 1e-4, "{name}: prefill {d:e}");
        for token in [3, 50, 200] {
            a.decode(token).expect("decode");
            b.decode(token).expect("decode");
            let d = distance(b.logits(), a.logits());
            println!("{name}: decode {d:e}");
            assert!(d < 1e-4, "{name}: decode {d:e}");
        }
    }
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

#[test]
fn attention_of_every_shape() {
    if !adapter() {
        return;
    }
    fn run<B: Backend>(b: &mut B, case: Case, step: Step) -> Vec<f32> {
        let mut random = Random::new(600);
        let Attention {
            n_heads,
            n_kv_heads,
            head_dim: d,
            ..
        } = case.shape;
        let mut kv = b.kv(&case.shape, &case.kv.into());
        let gain = b.vector(random.floats(d, 1.0));
        let rope = Rope::new(10_000.0, d, case.pairs.unwrap_or(RopePairs::Halves));
        let mut out = Vec::new();
        for (start, n, step) in [
            (0, case.n_past, Step::Prefill),
            (case.n_past, case.n_tokens, step),
        ] {
            b.kv_reserve(&mut kv, start..start + n).expect("memory");
            let [q, k, v] =
                [n_heads, n_kv_heads, n_kv_heads].map(|h| random.floats(n * h * d, 2.0));
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
    ] {
        for step in [Step::Decode, Step::Prefill] {
            let what = format!("{case:?} {step:?}");
            // Keys are rounded to half floats after a rotation that may differ in its last bit.
            both!(|b: &mut _| run(b, case, step), 3e-3, &what);
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
