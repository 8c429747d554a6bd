//! The tracer, what is made of its spans, and `kinglet profile`. How long something took is looked at nowhere: only that
//! times are in order, that sums agree with what the backend counted, and that files are what they say.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kinglet::backend::cpu::table::{self, Kernel};
use kinglet::profile::report::About;
use kinglet::profile::{Limits, Operation, PassKind, Profile, Recorder, Trace, Work};
use kinglet::{LoadOptions, Model, Session, SessionOptions};
use serde_json::Value;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

const TINY: &str = "tests/data/lfm2-tiny-random.gguf";
const SMALL: &str = "models/lfm2-smol-Q4_0.gguf";

fn session(path: &str, threads: usize, trace: bool) -> Session {
    let options = LoadOptions {
        threads,
        trace,
        ..LoadOptions::default()
    };
    let model = Model::load(&file(path), &options).expect("a model");
    let options = SessionOptions {
        n_ctx: 64,
        batch: 8,
        ..SessionOptions::default()
    };
    Session::new(&model, &options).expect("a session")
}

const PROMPT: [u32; 11] = [1, 5, 9, 2, 30, 31, 32, 7, 8, 100, 3];

fn prefill(session: &mut Session, prompt: &[u32]) {
    let go_on = &mut |_, _| ControlFlow::Continue(());
    session.prefill(prompt, go_on).expect("a prompt that fits");
}

/// Reads the prompt in two steps, decodes three tokens, and goes back by one.
fn run(session: &mut Session) -> Vec<Vec<u32>> {
    let bits = |session: &Session| session.logits().iter().map(|x| x.to_bits()).collect();
    prefill(session, &PROMPT);
    let mut logits = vec![bits(session)];
    for token in [4, 6, 12] {
        session.decode(token).expect("room");
        logits.push(bits(session));
    }
    session.truncate(PROMPT.len() + 2).expect("a cut");
    session.recall_logits().expect("logits");
    logits.push(bits(session));
    logits
}

/// All spans of a run with logits, with the backend's own counters.
fn traced(path: &str, threads: usize) -> (Trace, Work) {
    let mut session = session(path, threads, true);
    run(&mut session);
    let trace = session.take_trace().expect("it was loaded for that");
    (trace, session.work())
}

#[test]
fn a_traced_run_computes_the_same() {
    for (path, threads) in [(TINY, 1), (TINY, 2), (SMALL, 2)] {
        let mut plain = session(path, threads, false);
        let mut traced = session(path, threads, true);
        assert_eq!(run(&mut plain), run(&mut traced), "{path}");
        assert_eq!(plain.take_trace(), None);
        let without = |work: Work| Work { regions: 0, ..work };
        assert_eq!(without(plain.work()), without(traced.work()), "{path}");
    }
}

#[test]
fn spans_add_up_to_what_the_backend_counted() {
    for (path, threads) in [(TINY, 1), (TINY, 3), (SMALL, 2)] {
        let (trace, work) = traced(path, threads);
        let mut sum = Work::default();
        trace.spans.iter().for_each(|span| sum += span.work);
        assert_eq!(sum, work, "{path}, {threads} threads");
        assert!(work.weight_bytes > 0 && work.kv_bytes > 0 && work.ops() > 0);
        assert_eq!(work.regions > 0, threads > 1);
        // On a crowded machine the others may come too late for every region.
        let waited = trace.spans.iter().any(|span| span.waited > 0);
        assert!(!waited || threads > 1, "{path}, {threads} threads");
        let worked = trace.passes.iter().any(|pass| pass.worked > 0);
        assert!(!worked || threads > 1, "{path}, {threads} threads");
        assert_eq!(trace.dropped, 0);
    }
}

#[test]
fn spans_lie_in_order_inside_their_pass() {
    let (trace, _) = traced(SMALL, 2);
    let kinds: Vec<_> = trace.passes.iter().map(|p| (p.kind, p.n_tokens)).collect();
    use PassKind::{Decode, Prefill};
    assert_eq!(
        kinds[..5],
        [
            (Prefill, 8),
            (Prefill, 3),
            (Decode, 1),
            (Decode, 1),
            (Decode, 1)
        ]
    );
    let mut before = 0;
    for pass in &trace.passes {
        assert!(pass.start >= before);
        before = pass.start;
        for span in trace.spans_of(pass) {
            assert!(span.start >= before && span.end >= span.start);
            before = span.end;
        }
        assert!(pass.end >= before);
        before = pass.end;
    }
    let all: usize = trace.passes.iter().map(|pass| pass.spans.len()).sum();
    assert_eq!(all, trace.spans.len());
}

#[test]
fn operations_have_the_names_of_the_field_and_their_layer() {
    let mut session = session(SMALL, 1, true);
    run(&mut session);
    let trace = session.take_trace().expect("it was loaded for that");
    let config = &session.model().info().config;
    let pass = &trace.passes[2];
    let spans = trace.spans_of(pass);
    let of_layer = |layer: usize| -> Vec<&str> {
        let spans = spans.iter().filter(|s| s.layer == Some(layer as u16));
        spans.map(|span| &*trace.label(span).name).collect()
    };
    for (i, n_kv_heads) in config.n_kv_heads.iter().enumerate() {
        let mixer: &[&str] = if *n_kv_heads == 0 {
            &["in_proj", "short_conv", "out_proj"]
        } else {
            &[
                "q+k+v",
                "rms_norm",
                "rms_norm",
                "rope",
                "rope",
                "kv_write",
                "attention",
                "attn_output",
            ]
        };
        let mut expected = vec!["rms_norm"];
        expected.extend(mixer);
        expected.push("add");
        if i + 1 == config.n_layers {
            expected.push("rows_from");
        }
        expected.extend(["rms_norm", "gate+up", "glu", "down", "add"]);
        assert_eq!(of_layer(i), expected, "layer {i}");
    }
    let outside = spans.iter().filter(|span| span.layer.is_none());
    let outside: Vec<&str> = outside.map(|span| &*trace.label(span).name).collect();
    assert_eq!(
        outside,
        [
            "kv_reserve",
            "rope_angles",
            "embed",
            "rms_norm",
            "head",
            "read"
        ]
    );
}

#[test]
fn kernels_are_rows_of_the_table() {
    fn names<K: Kernel>(rows: &'static [K]) -> impl Iterator<Item = &'static str> {
        rows.iter().map(Kernel::name)
    }
    let rows: BTreeSet<&str> = names(table::GEMV)
        .chain(names(table::GEMV_PANELS))
        .chain(names(table::GEMM))
        .chain(names(table::TILES))
        .chain(names(table::GATED))
        .chain(names(table::PICKED))
        .chain(names(table::RMS_NORM))
        .chain(names(table::ROPE_HALVES))
        .chain(names(table::TO_F16))
        .chain(names(table::ATTEND))
        .chain(names(table::ATTEND_TILES))
        .chain(names(table::ATTEND_LANES))
        .chain(names(table::SHORT_CONV))
        .chain(names(table::GLU))
        .chain(names(table::ADD))
        .collect();
    let (trace, _) = traced(SMALL, 1);
    let kernels = trace
        .labels
        .iter()
        .flat_map(|label| label.kernel.split('+'));
    let kernels: BTreeSet<&str> = kernels.filter(|name| !name.is_empty()).collect();
    assert!(kernels.len() > 7, "{kernels:?}");
    assert!(kernels.is_subset(&rows), "{kernels:?}");
    for label in &trace.labels {
        let computes = matches!(
            label.operation,
            Operation::Linear | Operation::GatedFfn | Operation::Attention
        );
        assert!(!computes || !label.kernel.is_empty(), "{label:?}");
    }
}

#[test]
fn a_trace_is_taken_once_and_its_room_ends() {
    let mut session = session(TINY, 1, true);
    prefill(&mut session, &PROMPT);
    let first = session.take_trace().expect("it was loaded for that");
    assert_eq!(first.passes.len(), 2);
    session.decode(4).expect("room");
    let second = session.take_trace().expect("it was loaded for that");
    assert_eq!(second.passes.len(), 1);
    assert_eq!(second.passes[0].spans, 0..second.spans.len());
    let mut both = first.clone();
    both.append(second.clone());
    assert_eq!(both.spans_of(&both.passes[2]).len(), second.spans.len());
    let name = |trace: &Trace, i: usize| trace.label(&trace.spans[i]).clone();
    let n = first.spans.len();
    assert!((0..second.spans.len()).all(|i| name(&both, n + i) == name(&second, i)));
    // Nobody takes it: what has no room is counted, and what had stays whole.
    let per_pass = second.spans.len();
    let n_passes = (1 << 15) / per_pass + 10;
    for _ in 0..n_passes {
        session.truncate(0).expect("a cut");
        prefill(&mut session, &PROMPT[..1]);
    }
    let full = session.take_trace().expect("it was loaded for that");
    assert!(full.dropped > 0);
    assert!(full.spans.len() <= 1 << 15);
    assert!(
        full.passes
            .iter()
            .all(|pass| pass.spans.end <= full.spans.len())
    );
    session.decode(4).expect("room");
    let next = session.take_trace().expect("it was loaded for that");
    assert_eq!((next.dropped, next.passes.len()), (0, 1));
}

/// A run through all phases.
fn profiled(model: &str) -> Profile {
    let mut recorder = Recorder::default();
    let mut session = recorder.phase("load", |_| session(SMALL, 2, true));
    recorder.phase("prefill", |recorder| {
        prefill(&mut session, &PROMPT);
        recorder.add(|| session.take_trace());
    });
    recorder.phase("decode", |recorder| {
        for token in [4, 6, 12, 13] {
            recorder.token(|recorder| {
                recorder.span(Operation::Sample, "sample", || ());
                session.decode(token).expect("room");
            });
            recorder.add(|| session.take_trace());
        }
    });
    let info = session.model().info();
    let about = About {
        model: model.into(),
        weight_bytes: info.weight_bytes,
        n_layers: info.config.n_layers,
        n_threads: 2,
        cpu: None,
        version: "0".into(),
        experts: None,
    };
    let limits = Limits {
        memory: Some(1e10),
        file: None,
        int8: Some(1e12),
        bf16: Some(2e12),
        f32: Some(1e11),
    };
    recorder.finish(about, limits)
}

#[test]
fn a_report_accounts_for_every_span() {
    let profile = profiled("lfm2-smol");
    let (report, trace) = (&profile.report, &profile.trace);
    let counts: usize = report
        .phases
        .iter()
        .flat_map(|phase| phase.operations.iter().map(|row| row.count))
        .sum();
    assert_eq!(counts, trace.spans.len());
    let [load, prefill, decode] = &report.phases[..] else {
        panic!("three phases: {:?}", report.phases)
    };
    assert_eq!((load.passes, load.tokens), (0, 0));
    assert_eq!((prefill.passes, prefill.tokens), (2, PROMPT.len()));
    assert_eq!((decode.passes, decode.tokens), (4, 4));
    for phase in &report.phases {
        assert!(phase.explained <= phase.time && phase.time <= phase.end - phase.start);
        let mut work = Work::default();
        phase.operations.iter().for_each(|row| work += row.work);
        assert_eq!(work, phase.work);
        assert!(phase.operations.is_sorted_by(|a, b| a.time >= b.time));
        for row in &phase.operations {
            assert_eq!(row.bytes_per_second.is_some(), row.work.bytes() > 0);
            assert_eq!(row.of_roofline.is_some(), row.work.ops() > 0, "{row:?}");
        }
    }
    // All weights but the table, which is read by rows where it is not the head, once for each token.
    assert_eq!(decode.work.weight_bytes % 4, 0);
    assert!(decode.work.weight_bytes <= 4 * report.about.weight_bytes);
    assert_eq!(report.tokens.len(), 4);
    assert!(report.tokens.iter().all(|t| t.explained <= t.time));
    let latency = report.latency.expect("tokens");
    assert!(latency.p50 <= latency.p95 && latency.p99 <= latency.max);
    assert!(report.first_token > Some(load.time));
    assert!(report.memory.is_sorted_by_key(|sample| sample.at));
    let text = serde_json::to_string(&profile).expect("plain data");
    let back: Profile = serde_json::from_str(&text).expect("what was written");
    assert_eq!(back.trace, profile.trace);
    assert_eq!(back.report.phases.len(), 3);
}

#[test]
fn the_least_time_is_that_of_the_slower_resource() {
    let limits = Limits {
        memory: Some(1e9),
        file: Some(2e9),
        int8: Some(4e9),
        bf16: Some(8e9),
        f32: None,
    };
    let work = |bytes, ops| Work {
        weight_bytes: bytes,
        matmul_ops: ops,
        ..Work::default()
    };
    let least = |bytes, ops, kernel| limits.least_seconds(&work(bytes, ops), kernel);
    assert_eq!(least(2_000_000_000, 1, "gemv_q4_0_q8_avx2"), Some(1.0));
    assert_eq!(least(1, 4_000_000_000, "gemv_q8_0_q8_avx2"), Some(1.0));
    assert_eq!(least(1, 4_000_000_000, "gemm_q8_0_bf16_amx+x"), Some(0.5));
    assert_eq!(least(1, 1, "gemv_bf16_f32_neon_dotprod"), None);
    assert_eq!(least(0, 0, "add_avx2"), None);
}

/// What the Trace Event Format asks of an event, by its phase.
fn check_event(event: &Value) -> Option<(u64, u64)> {
    assert!(
        event["name"].is_string() && event["pid"].is_u64(),
        "{event}"
    );
    match event["ph"].as_str().expect("a phase") {
        "M" => {
            let kinds = ["process_name", "thread_name"];
            assert!(kinds.contains(&event["name"].as_str().expect("a name")));
            assert!(event["args"]["name"].is_string() && event["tid"].is_u64());
            None
        }
        "C" => {
            let args = event["args"].as_object().expect("series");
            assert!(event["ts"].is_f64() && !args.is_empty());
            assert!(args.values().all(Value::is_f64), "{event}");
            None
        }
        "X" => {
            assert!(event["cat"].is_string() && event["tid"].is_u64() && event["args"].is_object());
            let (start, took) = (event["ts"].as_f64(), event["dur"].as_f64());
            let (start, took) = (start.expect("a time"), took.expect("a duration"));
            assert!(start >= 0.0 && took >= 0.0);
            // Perfetto counts whole nanoseconds, and cuts off the rest of a product.
            let nanos = |micros: f64| (micros * 1e3) as u64;
            Some((nanos(start), nanos(start) + nanos(took)))
        }
        other => panic!("no such phase is written: {other}"),
    }
}

#[test]
fn the_trace_is_in_the_event_format_and_nests() {
    let profile = profiled("a \"model\"");
    let mut text = Vec::new();
    profile.write_chrome_trace(&mut text).expect("memory");
    let trace: Value = serde_json::from_slice(&text).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    let mut complete: Vec<(u64, u64)> = events.iter().filter_map(check_event).collect();
    let with = |key: &str, value: &str| events.iter().filter(|e| e[key] == value).count();
    assert_eq!(with("cat", "phase"), 3);
    assert_eq!(with("cat", "token"), 4);
    assert_eq!(with("cat", "pass"), 6);
    assert_eq!(with("cat", "layer"), 6 * profile.report.about.n_layers);
    assert_eq!(with("name", "thread_name"), 1);
    assert_eq!(with("name", "resident MiB"), profile.report.memory.len());
    let above = 3 + 4 + 6 + 6 * profile.report.about.n_layers;
    assert_eq!(complete.len(), above + profile.trace.spans.len());
    // Not a nanosecond is lost on the way.
    let spans = profile
        .trace
        .spans
        .iter()
        .map(|span| (span.start, span.end));
    assert!(spans.clone().all(|span| complete.contains(&span)));
    // What has a place in time lies on a track with a name: of a process, and of a thread of it.
    let of = |kind: &str, key: &str| -> BTreeSet<u64> {
        let named = events.iter().filter(|e| e["name"] == kind);
        named.filter_map(|e| e[key].as_u64()).collect()
    };
    for event in events.iter().filter(|e| e["ph"] != "M") {
        assert!(of("process_name", "pid").contains(&event["pid"].as_u64().expect("a process")));
        let thread = event["tid"].as_u64();
        assert!(thread.is_none_or(|tid| of("thread_name", "tid").contains(&tid)));
    }
    // On a track, of two events one holds the other or comes before it; else the latter would be dropped.
    complete.sort_by_key(|(start, end)| (*start, std::cmp::Reverse(*end)));
    let mut open: Vec<u64> = Vec::new();
    for (start, end) in complete {
        while open.last().is_some_and(|outer| *outer <= start) {
            open.pop();
        }
        assert!(
            open.last().is_none_or(|outer| end <= *outer),
            "{start} to {end}"
        );
        open.push(end);
    }
    // Counters go on in time, each for itself.
    let mut last = std::collections::HashMap::new();
    for event in events.iter().filter(|e| e["ph"] == "C") {
        let (name, at) = (
            event["name"].as_str(),
            event["ts"].as_f64().expect("a time"),
        );
        assert!(
            last.insert(name, at).is_none_or(|before| before <= at),
            "{event}"
        );
    }
}

#[test]
fn the_page_needs_nothing_else_and_holds_the_numbers() {
    let profile = profiled("</script><script>alert(1)</script>");
    let mut page = Vec::new();
    profile.write_html(&mut page).expect("memory");
    let page = String::from_utf8(page).expect("text");
    for outside in ["http:", "https:", "src=", "href=", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert_eq!(page.matches("url(").count(), page.matches("url(#").count());
    assert_eq!(page.matches("</script>").count(), 1);
    let (_, rest) = page.split_once("const data = ").expect("data");
    let data = rest.split_once(";\n").expect("the end of it").0;
    let data: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(data["report"]["about"]["model"], profile.report.about.model);
    let charts = data["charts"].as_array().expect("charts");
    // Two passes of the prompt, four tokens.
    assert_eq!(charts.len(), 6);
    let numbers = |chart: &Value| chart["spans"].as_array().expect("numbers").len();
    let in_charts: usize = charts.iter().map(|chart| numbers(chart) / 4).sum();
    let loading = profile.trace.spans.iter();
    let loading = loading.filter(|s| profile.trace.label(s).operation == Operation::Load);
    assert_eq!(in_charts + loading.count(), profile.trace.spans.len());
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// What tracing costs, and how much of a token its spans explain. By hand:
/// `cargo test --release --test trace -- --ignored --nocapture`
#[test]
#[ignore = "looks at the clock"]
fn overhead_and_coverage() {
    const SMOLLM2: &str = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    const N: usize = 300;
    for path in [SMALL, SMOLLM2] {
        for threads in [1, 2] {
            let open = |trace| {
                let options = LoadOptions {
                    threads,
                    trace,
                    ..LoadOptions::default()
                };
                let model = Model::load(&file(path), &options).expect("a model");
                let mut session = Session::new(&model, &SessionOptions::default()).expect("room");
                prefill(&mut session, &[7; 64]);
                session
            };
            let mut sessions = [open(false), open(true)];
            sessions[1].take_trace();
            let mut times = [const { Vec::new() }; 2];
            let mut explained = Vec::new();
            for i in 0..2 * N {
                // In turns, and each goes first as often as the other.
                let which = (i + i / 2) % 2;
                let start = kinglet::profile::span::now();
                sessions[which].decode(9).expect("room");
                let time = (kinglet::profile::span::now() - start) as f64;
                times[which].push(time / 1e6);
                if let Some(trace) = sessions[which].take_trace() {
                    let spans = trace.spans.iter().map(|span| span.time()).sum::<u64>();
                    explained.push(spans as f64 / time);
                }
            }
            // Of pairs of neighbours: what slows this machine down for a while slows both.
            let pairs = times[0].iter().zip(&times[1]);
            let cost = median(pairs.map(|(plain, with)| with / plain).collect()) - 1.0;
            let [plain, with] = times.map(median);
            let coverage = median(explained);
            println!(
                "{path}, {threads} threads: {plain:.3} ms a token, traced {with:.3} ({:+.2} %), {:.2} % explained",
                100.0 * cost,
                100.0 * coverage
            );
            assert!(cost < 0.02 && coverage > 0.95);
        }
    }
}

#[cfg(feature = "cli")]
mod command {
    use super::*;
    use std::process::{Command, Output};

    fn profile(args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kinglet"));
        command.args(["profile", "--no-measure", TINY]).args(args);
        // No roofline of this machine is looked up.
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        command.output().expect("the program runs")
    }

    #[test]
    fn prints_a_table_for_each_phase() {
        let output = profile(&["-p", "9", "-n", "4", "-t", "2"]);
        let text = String::from_utf8(output.stdout).expect("text");
        assert!(output.status.success(), "{text}");
        for phase in [
            "load: ",
            "prefill: 9 tokens, ",
            "first token: 1 token, ",
            "decode: 3 tokens, ",
        ] {
            assert!(
                text.lines().any(|line| line.starts_with(phase)),
                "{phase}\n{text}"
            );
        }
        for row in [
            "| network, tokenizer ",
            "| gate+up ",
            "| head ",
            "| sample ",
            "| (between) ",
        ] {
            assert!(
                text.lines().any(|line| line.starts_with(row)),
                "{row}\n{text}"
            );
        }
        assert!(text.contains("time to the first token"));
        assert!(!text.contains("no room"));
    }

    #[test]
    fn writes_json_and_files() {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("trace");
        std::fs::create_dir_all(&folder).expect("a folder");
        let (trace, page) = (folder.join("t.json"), folder.join("p.html"));
        let [trace_name, page_name] = [&trace, &page].map(|path| path.to_str().expect("a name"));
        let output = profile(&[
            "-p", "5", "-n", "0", "--json", "--trace", trace_name, "--html", page_name,
        ]);
        assert!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let phases = report["phases"].as_array().expect("phases");
        let names: Vec<&Value> = phases.iter().map(|phase| &phase["name"]).collect();
        assert_eq!(names, ["load", "prefill"]);
        assert_eq!(report["tokens"].as_array().map(Vec::len), Some(0));
        let trace = std::fs::read(trace).expect("the trace");
        serde_json::from_slice::<Value>(&trace).expect("JSON");
        let page = std::fs::read_to_string(page).expect("the page");
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let output = profile(&["-p", "2", "-n", "0", "--html", "no/such/folder/p.html"]);
        assert_eq!(output.status.code(), Some(5));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("no/such/folder/p.html"), "{text}");
    }
}
