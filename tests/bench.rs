//! `kinglet bench` and the roofline in `kinglet doctor`, as a script meets them. What is measured is not looked at, but
//! for being there: a test must not depend on a clock.
#![cfg(feature = "cli")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kinglet::backend::cpu::roofline;
use kinglet::profile::Roofline;
use kinglet::profile::roofline::{Rate, Resource};
use serde_json::Value;

/// A random model: fast.
fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lfm2-tiny-random.gguf")
}

/// A cache folder of its own for a test, empty.
fn cache(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("bench")
        .join(name);
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn run_in(cache: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kinglet"));
    command.args(args).env("XDG_CACHE_HOME", cache);
    for name in ["KINGLET_MODEL", "KINGLET_ISA", "KINGLET_KERNEL"] {
        command.env_remove(name);
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.stdin(Stdio::null()).output().unwrap()
}

/// `kinglet bench`, which measures no limits.
fn bench(args: &[&str]) -> Output {
    let all: Vec<&str> = ["bench", "--no-measure"]
        .iter()
        .chain(args)
        .copied()
        .collect();
    run_in(&cache("none"), &all)
}

#[track_caller]
fn ok(output: &Output) -> String {
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Rows of a Markdown table, its heading first, without the rule.
fn table(text: &str) -> Vec<Vec<String>> {
    let lines: Vec<&str> = text
        .lines()
        .take_while(|line| line.starts_with('|'))
        .collect();
    let rule = lines[1].replace(['|', '-', ':', ' '], "");
    assert_eq!(rule, "", "a rule below the heading");
    let cells = |line: &&str| {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    let rows: Vec<Vec<String>> = lines.iter().map(cells).collect();
    assert!(rows.iter().all(|row| row.len() == rows[0].len()));
    rows.into_iter()
        .enumerate()
        .filter(|(i, _)| *i != 1)
        .map(|(_, row)| row)
        .collect()
}

/// The width of a table for people; with columns for what differs from the defaults it may be wider.
#[track_caller]
fn fits_a_terminal(text: &str) {
    let lines = text.lines().filter(|line| line.starts_with('|'));
    let width = lines.map(|line| line.chars().count()).max();
    assert!(width.is_some_and(|width| width <= 120), "{width:?} columns");
}

#[test]
fn a_table_like_llama_benchs() {
    let model = tiny();
    let model = model.to_str().unwrap();
    let text = ok(&bench(&[
        "-m", model, "-p", "8,4", "-n", "2", "-pg", "4,2", "-d", "0,6", "-t", "1,2", "-r", "2",
    ]));
    fits_a_terminal(&text);
    let rows = table(&text);
    assert_eq!(
        rows[0],
        [
            "model", "size", "params", "backend", "threads", "test", "t/s"
        ]
    );
    let names: Vec<(&str, &str)> = rows[1..]
        .iter()
        .map(|row| (row[4].as_str(), row[5].as_str()))
        .collect();
    let tests = [
        "pp8",
        "pp4",
        "tg2",
        "pp4+tg2",
        "pp8 @ d6",
        "pp4 @ d6",
        "tg2 @ d6",
        "pp4+tg2 @ d6",
    ];
    let expected: Vec<(&str, &str)> = ["1", "2"]
        .into_iter()
        .flat_map(|t| tests.map(|name| (t, name)))
        .collect();
    assert_eq!(names, expected);
    for row in &rows[1..] {
        let (avg, deviation) = row[6].split_once(" ± ").expect("a mean and a deviation");
        assert!(avg.parse::<f64>().unwrap() > 0.0);
        assert!(deviation.parse::<f64>().unwrap() >= 0.0);
        assert_eq!(row[3], "CPU");
    }
    assert!(text.contains("\nbuild: "), "{text}");
}

#[test]
fn columns_appear_when_they_differ() {
    let model = tiny();
    let args = [
        "-p", "4", "-n", "0", "-r", "1", "-b", "4", "-ub", "2", "-ctk", "f32", "-ctv", "f32",
    ];
    let args: Vec<&str> = std::iter::once(model.to_str().unwrap())
        .chain(args)
        .collect();
    let rows = table(&ok(&bench(&args)));
    assert_eq!(
        rows[0][5..],
        ["n_batch", "n_ubatch", "type_k", "type_v", "test", "t/s"]
    );
    assert_eq!(rows[1][5..9], ["4", "2", "f32", "f32"]);
}

#[test]
fn details_are_tables_below() {
    let model = tiny();
    let text = ok(&bench(&[
        model.to_str().unwrap(),
        "-p",
        "4",
        "-n",
        "2",
        "-r",
        "1",
        "--details",
    ]));
    fits_a_terminal(&text);
    for title in ["Time: ", "Limits: ", "Memory: "] {
        let (_, rest) = text.split_once(&format!("\n{title}")).expect(title);
        let (_, rest) = rest.split_once("\n\n").expect("a table below its title");
        let rows = table(rest);
        assert_eq!(rows.len(), 3, "{title}");
        assert_eq!(rows[0][..3], ["model", "threads", "test"]);
        assert_eq!([&*rows[1][2], &*rows[2][2]], ["pp4", "tg2"]);
    }
    assert!(text.contains("\nkernels of "), "{text}");
}

/// llama-bench's fields that make sense here, by its names.
const FIELDS: [&str; 21] = [
    "build_commit",
    "cpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "type_k",
    "type_v",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "test",
];

#[test]
fn json_csv_and_lines_have_the_same_fields() {
    let model = tiny();
    let with = |format| {
        ok(&bench(&[
            model.to_str().unwrap(),
            "-p",
            "4",
            "-n",
            "3",
            "-r",
            "2",
            "-t",
            "2",
            "-o",
            format,
        ]))
    };
    let json: Vec<Value> = serde_json::from_str(&with("json")).unwrap();
    let lines: Vec<Value> = with("jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let csv = with("csv");
    let names = |value: &Value| {
        value
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!((json.len(), lines.len(), csv.lines().count()), (2, 2, 3));
    assert_eq!(names(&json[0]), names(&lines[1]));
    let heading: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    let scalars: Vec<String> = names(&json[0])
        .into_iter()
        .filter(|name| !name.starts_with("samples_"))
        .collect();
    assert_eq!(heading, scalars);
    for line in csv.lines().skip(1) {
        // Every field in quotes; none of these has one inside.
        let fields: Vec<&str> = line.split("\",\"").collect();
        assert_eq!(fields.len(), heading.len());
        assert!(line.starts_with('"') && line.ends_with('"'));
    }
    let found: BTreeSet<String> = names(&json[0]).into_iter().collect();
    for name in FIELDS {
        assert!(found.contains(name), "{name}");
    }
    let (prompt, reply) = (&json[0], &json[1]);
    assert_eq!(
        (prompt["test"].as_str(), reply["test"].as_str()),
        (Some("pp4"), Some("tg3"))
    );
    assert_eq!(prompt["n_threads"], 2);
    assert_eq!(prompt["samples_ns"].as_array().unwrap().len(), 2);
    assert_eq!(reply["samples_ts"].as_array().unwrap().len(), 2);
    assert!(prompt["first_token_ms"].is_number() && reply["first_token_ms"].is_null());
    for share in ["p50", "p95", "p99"] {
        assert!(reply[format!("token_ms_{share}")].is_number());
        assert!(prompt[format!("token_ms_{share}")].is_null());
    }
    // No limits were measured, and none are made up.
    assert!(reply["limit_memory_gb_s"].is_null() && reply["decode_percent_of_memory"].is_null());
    assert!(reply["decode_gb_s"].is_number() && prompt["prefill_gop_s"].is_number());
    assert!(reply["kernels"].as_str().unwrap().contains("gemv_"));
    assert_eq!(reply["n_busy"], 0);
}

#[test]
fn work_is_counted_exactly() {
    let model = tiny();
    let run = |threads: &str| {
        let args = [
            model.to_str().unwrap(),
            "-p",
            "0",
            "-n",
            "2",
            "-d",
            "7",
            "-r",
            "1",
            "-t",
            threads,
            "-o",
            "json",
        ];
        let json: Vec<Value> = serde_json::from_str(&ok(&bench(&args))).unwrap();
        json[0].clone()
    };
    let gguf = kinglet::gguf::Gguf::open(&model).unwrap();
    let of = |name: &str| gguf.metadata().usize(&format!("lfm2.{name}")).unwrap();
    // Every matrix is used once for a token: the table of embeddings as the head, which is tied to it.
    let used = gguf
        .tensors()
        .filter(|t| t.dims().len() == 2 && !t.name.contains("shortconv.conv"));
    let weights: u64 = used.map(|t| t.bytes as u64).sum();
    let one = run("1");
    assert_eq!(one["decode_weight_bytes"], weights);
    // Keys and values of 8 and of 9 positions, in half floats.
    let kv_heads = gguf
        .metadata()
        .per_layer_usize("lfm2.attention.head_count_kv", of("block_count"))
        .unwrap();
    let head_dim = of("embedding_length") / of("attention.head_count");
    let position = 2 * 2 * kv_heads.iter().sum::<usize>() * head_dim;
    assert_eq!(one["decode_kv_bytes"], (8 + 9) * position / 2);
    assert_eq!(
        one["barriers_per_token"], 0.0,
        "a thread alone waits for nobody"
    );
    assert!(run("2")["barriers_per_token"].as_f64().unwrap() > 1.0);
}

#[test]
fn a_busy_process_is_beside_it_and_ends() {
    let model = tiny();
    let args = [
        model.to_str().unwrap(),
        "-p",
        "0",
        "-n",
        "2",
        "-r",
        "1",
        "--busy",
        "2",
        "-o",
        "json",
    ];
    let json: Vec<Value> = serde_json::from_str(&ok(&bench(&args))).unwrap();
    assert_eq!(json[0]["n_busy"], 2);
    // The process of `--busy` spins as long as its stdin is open.
    let mut spin = Command::new(env!("CARGO_BIN_EXE_kinglet"));
    let spin = spin
        .arg("spin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut spin = spin.spawn().unwrap();
    let mut byte = [0];
    std::io::Read::read_exact(spin.stdout.as_mut().unwrap(), &mut byte).unwrap();
    assert_eq!(spin.try_wait().unwrap(), None, "it spins");
    drop(spin.stdin.take());
    assert!(spin.wait().unwrap().success());
}

#[test]
fn the_first_token_of_new_processes() {
    let smol = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/lfm2-smol-Q4_0.gguf");
    let args = [smol.to_str().unwrap(), "--first-token", "20", "-r", "2"];
    let rows = table(&ok(&bench(&args)));
    assert_eq!((&*rows[0][6], &*rows[1][5]), ("ms", "first20"));
    let json = ok(&bench(&[&args[..], &["-o", "json"]].concat()));
    let json: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["samples_ms"].as_array().unwrap().len(), 2);
    assert!(json[0]["first_token_ms_p50"].as_f64().unwrap() > 0.0);
}

#[test]
fn speed_over_time() {
    let model = tiny();
    let model = model.to_str().unwrap();
    let rows = table(&ok(&bench(&[
        model,
        "-n",
        "4",
        "-t",
        "1",
        "--sustained",
        "2s",
    ])));
    assert_eq!(rows[0][2..6], ["test", "until s", "t/s", "% first"]);
    let until: Vec<&str> = rows[1..].iter().map(|row| row[3].as_str()).collect();
    assert_eq!(until, ["1.0", "2.0"]);
    assert_eq!(rows[1][5], "100.0");
    let text = ok(&bench(&[
        model,
        "-n",
        "4",
        "--sustained",
        "1s",
        "-o",
        "jsonl",
    ]));
    let row: Value = serde_json::from_str(&text).unwrap();
    assert!(row["n_tokens"].as_u64() > Some(3) && row["avg_ts"].as_f64() > Some(0.0));
    for args in [
        ["-n", "0", "--sustained", "1s"],
        ["-n", "4", "--sustained", "soon"],
    ] {
        let all: Vec<&str> = std::iter::once(model).chain(args).collect();
        assert_eq!(bench(&all).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn rows_of_the_kernel_table() {
    let listed = ok(&bench(&["--list-kernels"]));
    assert_eq!(ok(&bench(&["--kernel", "list"])), listed);
    let names: Vec<&str> = listed
        .lines()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    for name in [
        "gemv_q4_0_q8_scalar",
        "quantize_q8_scalar",
        "read_streams_scalar",
        "attend_scalar",
    ] {
        assert!(names.contains(&name), "{name}");
    }
    let args = [
        "--kernel",
        "gemv_q4_0_q8_scalar,add_scalar",
        "--shape",
        "16x64,8x32",
        "--tokens",
        "1,3",
        "-t",
        "1,2",
    ];
    let args = [&args[..], &["-r", "1", "-o", "json"]].concat();
    let json: Vec<Value> = serde_json::from_str(&ok(&bench(&args))).unwrap();
    assert_eq!(json.len(), 2 * 2 * 2 * 2);
    for result in &json {
        assert!(result["median_us"].as_f64().unwrap() > 0.0, "{result}");
        assert_eq!(result["level"], "scalar");
    }
    let gemv = &json[0];
    assert_eq!(
        (gemv["n_out"].as_u64(), gemv["n_in"].as_u64()),
        (Some(16), Some(64))
    );
    // Blocks of 32 weights in 18 bytes.
    assert_eq!(gemv["bytes"], 16 * 2 * 18);
    assert_eq!(gemv["ops"], 2 * 16 * 64);
    let args = [
        "--kernel",
        "rms_norm_scalar",
        "-r",
        "1",
        "--tokens",
        "1",
        "-t",
        "1",
    ];
    let text = ok(&bench(&args));
    fits_a_terminal(&text);
    let table = table(&text);
    assert_eq!(table[0][..4], ["kernel", "shape", "tokens", "threads"]);
    assert_eq!(table[1][0], "rms_norm_scalar");
}

#[test]
fn wrong_arguments_exit_with_2_and_print_nothing() {
    let model = tiny();
    let model = model.to_str().unwrap();
    for args in [
        &[model, "-p", "x"][..],
        &[model, "-p", "4-"],
        &[model, "-p", "4-8*1"],
        &[model, "-p", "0", "-n", "0"],
        &[model, "-pg", "4"],
        &[model, "-t", "0"],
        &[model, "-t", "9999"],
        &[model, "-b", "0"],
        &[model, "-r", "0"],
        &[model, "-o", "xml"],
        &[model, "-ctk", "q9"],
        &[model, "-d", "99999999"],
        &[model, "--first-token", "0"],
        &[model, "--first-token", "8", "-p", "4"],
        &[model, "--kernel", "add_scalar"],
        &[model, "--shape", "8x32"],
        &["--kernel", "nonesuch"],
        &["--kernel", "gemv_q4_0_q8_scalar", "--shape", "8x33"],
        &["--kernel", "gemv_q4_0_q8_scalar", "--shape", "8"],
        &["--kernel", "gemv_q4_0_q8_scalar", "--tokens", "0"],
    ] {
        let output = bench(args);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {err}");
        assert!(err.contains("error: "), "{args:?}: {err}");
        assert_eq!(output.stdout, b"", "{args:?}");
    }
    let missing = bench(&["no-such-file.gguf"]);
    assert_eq!((missing.status.code(), missing.stdout.len()), (Some(5), 0));
}

/// A roofline that nobody could have measured.
fn known(n_threads: usize) -> Roofline {
    let rate = |resource, level: &str, giga: u64| Rate {
        resource,
        kernel: format!("known_{level}"),
        level: level.into(),
        per_second: giga * 1_000_000_000,
    };
    Roofline {
        key: roofline::key(n_threads),
        measured_at: 1,
        buffer_bytes: 1 << 20,
        cache_bytes: None,
        disturbed: 0,
        rates: vec![
            rate(Resource::Mapped, "scalar", 123 * n_threads as u64),
            rate(Resource::Int8, "scalar", 4567),
        ],
    }
}

#[test]
fn doctor_and_bench_use_what_is_kept() {
    let cache = cache("kept");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let rooflines = [known(1), known(cores.max(2))];
    let paths = rooflines.map(|roofline| roofline.save(&cache.join("kinglet")).unwrap());
    let doctor = |args: &[&str]| ok(&run_in(&cache, &[&["doctor"], args].concat()));
    if cores > 1 {
        // Both are kept, so nothing is measured: it says what the files say.
        let text = doctor(&[]);
        assert!(
            text.contains("123.0 GB/s") && text.contains("4567 GOP/s"),
            "{text}"
        );
        let json: Value = serde_json::from_str(&doctor(&["--json"])).unwrap();
        assert_eq!(json["rooflines"].as_array().unwrap().len(), 2);
        assert_eq!(
            json["rooflines"][0]["rates"][0]["per_second"],
            123_000_000_000u64
        );
    }
    let model = tiny();
    let args = [
        "bench",
        model.to_str().unwrap(),
        "-p",
        "4",
        "-n",
        "2",
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "json",
    ];
    let json: Vec<Value> = serde_json::from_str(&ok(&run_in(&cache, &args))).unwrap();
    assert_eq!(json[1]["limit_memory_gb_s"], 123.0);
    assert_eq!(json[0]["limit_int8_gop_s"], 4567.0);
    assert!(json[1]["decode_percent_of_memory"].as_f64().unwrap() > 0.0);
    assert!(json[1]["limit_file_gb_s"].as_f64().unwrap() > 0.0);

    // Damaged files are as good as none.
    for path in paths {
        let text = fs::read_to_string(&path).unwrap();
        fs::write(
            &path,
            text.replacen("\"measured_at\":1", "\"measured_at\":2", 1),
        )
        .unwrap();
    }
    let json: Value = serde_json::from_str(&doctor(&["--no-measure", "--json"])).unwrap();
    assert_eq!(json["rooflines"], serde_json::json!([]));
    let text = doctor(&["--no-measure"]);
    assert!(!text.contains("Roofline"), "{text}");
    let output = run_in(&cache, &["doctor", "--measure", "--no-measure"]);
    assert_eq!(output.status.code(), Some(2));
}
