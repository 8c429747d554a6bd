//! Files from files: which tensor gets which format, with which bytes, and what is refused.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use kinglet::Error;
use kinglet::gguf::{Gguf, Metadata, TensorSpec, TensorType, Writer};
use kinglet::model::quantize::{
    Candidate, Mix, Options, Progress, Summary, Traits, choose, quantize_file,
};
use kinglet::quant::{self, DType};

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kinglet-quantize-{}-{n}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

fn to(to: Mix) -> Options {
    Options {
        to,
        threads: 2,
        allow_requantize: false,
    }
}

fn quantize(input: &Path, output: &Path, options: &Options) -> Result<Summary, Error> {
    quantize_file(input, output, options, &mut |_| ControlFlow::Continue(()))
}

/// A model of one layer with these tensors.
fn write(path: &Path, tensors: &[(&str, &[usize], Vec<f32>)]) {
    let mut metadata = Metadata::new();
    metadata.set("general.architecture", "llama");
    metadata.set("llama.block_count", 1_u32);
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, shape, _)| TensorSpec::new(*name, DType::F32, *shape))
        .collect();
    let mut writer = Writer::create(path, &metadata, &specs).unwrap();
    for (_, _, x) in tensors {
        writer.tensor(bytemuck::cast_slice(x)).unwrap();
    }
    writer.finish().unwrap();
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
}

#[test]
fn tiny_model() {
    let scratch = Scratch::new();
    let input = Gguf::open(&data("lfm2-tiny-random.gguf")).unwrap();
    for mix in [Mix::Q4_0, Mix::Q4_K_M, Mix::Q8_0, Mix::F16, Mix::Q3_K_S] {
        let path = scratch.path(mix.name());
        let summary = quantize(input.path(), &path, &to(mix)).unwrap();
        let output = Gguf::open(&path).unwrap();
        assert_eq!(output.tensors().len(), input.tensors().len());
        let (mut bytes_in, mut bytes_out) = (0, 0);
        for from in input.tensors() {
            let (old, new) = (
                input.load(&from.name).unwrap(),
                output.load(&from.name).unwrap(),
            );
            bytes_in += old.data.len() as u64;
            bytes_out += new.data.len() as u64;
            assert_eq!(old.shape, new.shape, "{mix} {}", from.name);
            let kept = from.shape[1] == 1 || from.name.contains("shortconv.conv");
            assert_eq!(old.dtype == new.dtype, kept, "{mix} {}", from.name);
            let mut expected = vec![0; new.data.len()];
            quant::quantize(new.dtype, &old.to_f32(), &mut expected);
            assert!(*new.data == expected[..], "{mix} {}", from.name);
        }
        let head = output.load("token_embd.weight").unwrap().dtype;
        let is_k = input.tensor("token_embd.weight").unwrap().shape[0].is_multiple_of(256);
        match mix {
            Mix::F16 => assert_eq!(head, DType::F16),
            Mix::Q8_0 => assert_eq!(head, DType::Q8_0),
            _ if is_k => assert_eq!(head, DType::Q6_K),
            _ => assert_eq!(head, DType::Q8_0),
        }
        assert_eq!(summary.tensors, input.tensors().len());
        assert_eq!((summary.bytes_in, summary.bytes_out), (bytes_in, bytes_out));

        let metadata = output.metadata();
        assert_eq!(metadata.u32("general.file_type").unwrap(), mix.file_type());
        assert_eq!(metadata.u32("general.quantization_version").unwrap(), 2);
        for (key, value) in input.metadata().iter() {
            if key != "general.file_type" && key != "general.quantization_version" {
                assert_eq!(metadata.get(key), Some(value), "{mix} {key}");
            }
        }
    }
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let scratch = Scratch::new();
    let input = data("lfm2-tiny-random.gguf");
    let [one, many] = [1, 5].map(|threads| {
        let path = scratch.path(&threads.to_string());
        let options = Options {
            threads,
            ..to(Mix::Q4_K_M)
        };
        quantize(&input, &path, &options).unwrap();
        fs::read(path).unwrap()
    });
    assert!(one == many);
}

/// More than one piece and more than one task, and a length that neither divides.
#[test]
fn large_tensors_come_in_pieces() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in"), scratch.path("out"));
    let n = 256 * 17_001;
    let x = ramp(n);
    let tensors: [(&str, &[usize], _); 2] = [
        ("blk.0.ffn_up.weight", &[256, 17_001], x.clone()),
        ("output_norm.weight", &[256], ramp(256)),
    ];
    write(&input, &tensors);
    let mut seen = Vec::new();
    quantize_file(&input, &output, &to(Mix::Q8_0), &mut |p: Progress| {
        assert_eq!(p.total_bytes, 4 * (n as u64 + 256));
        seen.push((p.tensor.to_owned(), p.done_bytes));
        ControlFlow::Continue(())
    })
    .unwrap();
    assert!(seen.len() > 2 && seen.is_sorted_by_key(|s| s.1), "{seen:?}");
    let mut expected = vec![0; DType::Q8_0.row_bytes(n).unwrap()];
    quant::quantize(DType::Q8_0, &x, &mut expected);
    let made = Gguf::open(&output).unwrap();
    let made = made.load("blk.0.ffn_up.weight").unwrap();
    assert_eq!(made.dtype, DType::Q8_0);
    assert!(*made.data == expected[..]);
}

#[test]
fn quantizes_again_only_if_allowed() {
    let scratch = Scratch::new();
    let (q8, q4) = (scratch.path("q8"), scratch.path("q4"));
    quantize(&data("lfm2-tiny-random.gguf"), &q8, &to(Mix::Q8_0)).unwrap();
    let error = quantize(&q8, &q4, &to(Mix::Q4_0)).unwrap_err();
    assert!(
        matches!(&error, Error::Invalid(what) if what.contains("found Q8_0")),
        "{error}"
    );
    let options = Options {
        allow_requantize: true,
        ..to(Mix::Q4_0)
    };
    quantize(&q8, &q4, &options).unwrap();
    let (from, made) = (Gguf::open(&q8).unwrap(), Gguf::open(&q4).unwrap());
    let name = "blk.0.ffn_up.weight";
    let made = made.load(name).unwrap();
    let mut expected = vec![0; made.data.len()];
    quant::quantize(
        DType::Q4_0,
        &from.load(name).unwrap().to_f32(),
        &mut expected,
    );
    assert!(*made.data == expected[..]);
    // The same format again is a copy, and that needs no leave.
    quantize(&q8, &q4, &to(Mix::Q8_0)).unwrap();
    assert!(fs::read(&q8).unwrap() == fs::read(&q4).unwrap());
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in"), scratch.path("out"));
    for (name, shape) in [
        ("blk.0.ffn_up.weight", [256, 300]),
        ("blk.0.attn_norm.weight", [76_800, 1]),
    ] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = ramp(256 * 300);
            x[70_000] = bad;
            write(&input, &[(name, &shape, x)]);
            let error = quantize(&input, &output, &to(Mix::Q4_0)).unwrap_err();
            let expected =
                format!("tensor {name}: weight 70000: expected a finite number, found {bad}");
            assert!(
                matches!(&error, Error::BadModel(what) if *what == expected),
                "{error}"
            );
            assert_eq!(scratch.names(), ["in"]);
        }
    }
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in"), scratch.path("out"));
    let mut x = ramp(512);
    x[300] = 1e6;
    write(&input, &[("blk.0.ffn_up.weight", &[256, 2], x)]);
    let error = quantize(&input, &output, &to(Mix::F16))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "tensor blk.0.ffn_up.weight: weight 300: expected a number within the range of F16, found 1000000"
    );
    let error = quantize(&input, &output, &to(Mix::Q4_0))
        .unwrap_err()
        .to_string();
    assert!(error.contains("within the range of Q4_0"), "{error}");
    quantize(&input, &output, &to(Mix::BF16)).unwrap();
}

#[test]
fn the_input_is_not_overwritten() {
    let scratch = Scratch::new();
    let input = scratch.path("in");
    write(&input, &[("blk.0.ffn_up.weight", &[32, 2], ramp(64))]);
    let before = fs::read(&input).unwrap();
    let twisted = scratch.path("sub/../in");
    fs::create_dir(scratch.path("sub")).unwrap();
    for output in [&input, &twisted] {
        let error = quantize(&input, output, &to(Mix::Q4_0)).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{error}");
    }
    assert!(fs::read(&input).unwrap() == before);
}

#[test]
fn a_broken_run_leaves_the_old_file() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in"), scratch.path("out"));
    let tensors: [(&str, &[usize], _); 2] = [
        ("blk.0.ffn_down.weight", &[32, 2], ramp(64)),
        ("blk.0.ffn_up.weight", &[32, 2], ramp(64)),
    ];
    write(&input, &tensors);
    fs::write(&output, "old").unwrap();
    let mut calls = 0;
    let error = quantize_file(&input, &output, &to(Mix::Q4_0), &mut |_| {
        calls += 1;
        match calls {
            1 => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        }
    });
    assert!(matches!(error, Err(Error::Cancelled)));
    assert_eq!(scratch.names(), ["in", "out"]);
    assert_eq!(fs::read_to_string(&output).unwrap(), "old");
    quantize(&input, &output, &to(Mix::Q4_0)).unwrap();
    assert_eq!(Gguf::open(&output).unwrap().tensors().len(), 2);

    let nowhere = scratch.path("missing/out");
    let error = quantize(&input, &nowhere, &to(Mix::Q4_0)).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn names_of_mixtures() {
    for mix in Mix::ALL.iter().copied() {
        assert_eq!(Mix::from_name(mix.name()), Some(mix));
        assert_eq!(Mix::from_name(&mix.name().to_lowercase()), Some(mix));
        assert!(mix.base().can_quantize());
    }
    assert_eq!(Mix::from_name("q4_k"), Some(Mix::Q4_K_M));
    assert_eq!(Mix::from_name("Q3_K"), Some(Mix::Q3_K_M));
    for name in ["", "Q4", "Q6_K_M", "Q4_K_", "IQ4_NL", "ß_0"] {
        assert_eq!(Mix::from_name(name), None, "{name}");
    }
}

/// A model of `mixes.txt`.
struct Model {
    traits: Traits,
    /// Names and shapes.
    tensors: Vec<(String, [usize; 4])>,
}

impl Model {
    fn parse(line: &str) -> Self {
        let field = |key: &str| -> usize {
            let value = line
                .split(' ')
                .find_map(|f| f.strip_prefix(key)?.strip_prefix('='));
            value
                .unwrap_or_else(|| panic!("{line}: {key}"))
                .parse()
                .unwrap()
        };
        let (hidden, ffn, n_layers) = (field("hidden"), field("ffn"), field("layers"));
        let (n_heads, n_kv_heads, n_experts) =
            (field("heads"), field("kv_heads"), field("experts"));
        let kv = hidden / n_heads * n_kv_heads;
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), [hidden, 32, 1, 1]),
            ("output_norm.weight".to_owned(), [hidden, 1, 1, 1]),
        ];
        if field("tied") == 0 {
            tensors.push(("output.weight".into(), [hidden, 32, 1, 1]));
        }
        let (exps, n_stacked) = if n_experts > 0 {
            ("_exps", n_experts)
        } else {
            ("", 1)
        };
        for i in 0..n_layers {
            let mut add =
                |name: String, shape| tensors.push((format!("blk.{i}.{name}.weight"), shape));
            add("attn_norm".into(), [hidden, 1, 1, 1]);
            add("attn_q".into(), [hidden, hidden, 1, 1]);
            add("attn_k".into(), [hidden, kv, 1, 1]);
            add("attn_v".into(), [hidden, kv, 1, 1]);
            add("attn_output".into(), [hidden, hidden, 1, 1]);
            add("ffn_norm".into(), [hidden, 1, 1, 1]);
            if n_experts > 0 {
                add("ffn_gate_inp".into(), [hidden, n_experts, 1, 1]);
            }
            add(format!("ffn_gate{exps}"), [hidden, ffn, n_stacked, 1]);
            add(format!("ffn_up{exps}"), [hidden, ffn, n_stacked, 1]);
            add(format!("ffn_down{exps}"), [ffn, hidden, n_stacked, 1]);
        }
        Self {
            traits: Traits {
                n_layers,
                n_experts,
                n_gqa: n_heads / n_kv_heads,
                is_70b: n_layers == 80,
            },
            tensors,
        }
    }

    /// What `choose` gives the tensors called `stem` in all layers, in the way of `mixes.txt`.
    fn runs(&self, chosen: &[DType], stem: &str) -> Vec<(DType, usize)> {
        let mut runs: Vec<(DType, usize)> = Vec::new();
        for ((name, _), dtype) in self.tensors.iter().zip(chosen) {
            let rest = name.strip_prefix("blk.").and_then(|n| n.split_once('.'));
            if rest.map_or(&**name, |(_, rest)| rest) != stem {
                continue;
            }
            match runs.last_mut() {
                Some((last, n)) if last == dtype => *n += 1,
                _ => runs.push((*dtype, 1)),
            }
        }
        runs
    }
}

/// Each mixture of each model of `mixes.txt` against llama.cpp's tool.
#[test]
fn formats_are_chosen_as_by_llama_cpp() {
    let text = fs::read_to_string(data("quant/mixes.txt")).unwrap();
    let mut n_checked = 0;
    for model_text in text.split("model ").skip(1) {
        let (head, mixes) = model_text.split_once('\n').unwrap();
        let mut model = Model::parse(head);
        for reversed in [false, true] {
            if reversed {
                model.tensors.reverse(); // the order of the file does not matter
            }
            let candidates: Vec<_> = model
                .tensors
                .iter()
                .map(|(name, shape)| Candidate {
                    name,
                    shape: *shape,
                })
                .collect();
            for mix_text in mixes.split("mix ").skip(1) {
                let mut lines = mix_text.lines();
                let (mix, base) = lines.next().unwrap().split_once(' ').unwrap();
                let base = DType::from_name(base).unwrap();
                let listed: Vec<_> = lines.map(|l| l.split_once(' ').unwrap()).collect();
                let mix = Mix::from_name(mix).unwrap();
                let chosen: Vec<DType> = choose(mix, model.traits, &candidates)
                    .unwrap()
                    .iter()
                    .map(|c| c.dtype.unwrap_or(DType::F32))
                    .collect();
                let stems = model.tensors.iter().map(|(name, _)| {
                    let rest = name.strip_prefix("blk.").and_then(|n| n.split_once('.'));
                    rest.map_or(&**name, |(_, rest)| rest)
                });
                for stem in stems.collect::<std::collections::BTreeSet<_>>() {
                    let mut ours = model.runs(&chosen, stem);
                    if reversed {
                        ours.reverse();
                    }
                    let total = ours.iter().map(|r| r.1).sum();
                    let expected = match listed.iter().find(|l| l.0 == stem) {
                        None if stem.ends_with("norm.weight") => vec![(DType::F32, total)],
                        None => vec![(base, total)],
                        Some((_, runs)) => runs
                            .split(' ')
                            .map(|run| {
                                let (dtype, n) = run.split_once('*').unwrap();
                                (DType::from_name(dtype).unwrap(), n.parse().unwrap())
                            })
                            .collect(),
                    };
                    assert_eq!(ours, expected, "{head}: {mix} {stem}");
                    n_checked += 1;
                }
            }
        }
    }
    assert!(n_checked > 2000, "{n_checked}");
}

#[test]
fn small_and_deciding_matrices_are_kept() {
    let traits = Traits {
        n_layers: 4,
        n_experts: 4,
        n_gqa: 0,
        is_70b: false,
    };
    let matrix = [256, 256, 1, 1];
    let cases = [
        ("blk.0.shortconv.conv.weight", matrix, None),
        ("blk.0.shortconv.in_proj.weight", matrix, Some(DType::Q4_0)),
        ("blk.0.ffn_gate_inp.weight", matrix, None),
        ("blk.0.attn_q_norm.weight", matrix, None),
        ("blk.0.attn_q.bias", matrix, None),
        ("blk.0.exp_probs_b.bias", [256, 1, 1, 1], None),
        ("position_embd.weight", matrix, None),
        ("output.weight", matrix, Some(DType::Q6_K)),
        ("token_embd.weight", matrix, Some(DType::Q4_0)),
        ("dense_2.weight", [48, 3, 1, 1], Some(DType::F16)),
        ("dense_2.weight", [48, 1, 1, 1], None),
    ];
    let candidates = cases.map(|(name, shape, _)| Candidate { name, shape });
    let choices = choose(Mix::Q4_0, traits, &candidates).unwrap();
    for ((name, shape, expected), choice) in cases.iter().zip(choices) {
        assert_eq!(choice.dtype, *expected, "{name} {shape:?}");
        assert_eq!(choice.is_fallback, *expected == Some(DType::F16), "{name}");
    }
    for name in ["blk.4.ffn_down_exps.weight", "blk.x.ffn_down.weight"] {
        let strange = [Candidate {
            name,
            shape: matrix,
        }];
        let error = choose(Mix::Q4_K_M, traits, &strange).unwrap_err();
        assert!(matches!(error, Error::BadModel(_)), "{error}");
    }
}

#[test]
fn foreign_tensors_are_copied_or_refused() {
    let scratch = Scratch::new();
    let (input, output) = (scratch.path("in"), scratch.path("out"));
    const I32: TensorType = TensorType::Foreign(26);
    for (name, is_matrix) in [("blk.0.table", false), ("blk.0.ffn_up.weight", true)] {
        let mut metadata = Metadata::new();
        metadata.set("general.architecture", "llama");
        metadata.set("llama.block_count", 1_u32);
        let specs = [TensorSpec::new(name, I32, [32, 2])];
        let mut writer = Writer::create(&input, &metadata, &specs).unwrap();
        let bytes: Vec<u8> = (0..=255).collect();
        writer.tensor(&bytes).unwrap();
        writer.finish().unwrap();
        match quantize(&input, &output, &to(Mix::Q8_0)) {
            Ok(summary) => {
                assert!(!is_matrix);
                assert_eq!((summary.bytes_in, summary.bytes_out), (256, 256));
                let made = Gguf::open(&output).unwrap();
                assert_eq!(made.tensor(name).unwrap().dtype, I32);
                assert!(*made.raw(name).unwrap() == bytes[..]);
            }
            Err(error) => {
                assert!(is_matrix, "{error}");
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            }
        }
    }
}
