//! Budgets: what is given up for one, in which order; streamed weights compute the same; peaks are what was promised.

use std::ops::ControlFlow::Continue;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use kinglet::session::{Concession, Footprint, Plan};
use kinglet::{Error, KvType, LoadOptions, Model, OnExceed, Repack, Session, SessionOptions};
use serde_json::Value;

const TINY: &str = "tests/data/lfm2-tiny-random.gguf";
const SMALL: &str = "models/lfm2-smol-Q4_0.gguf";

/// Who measures this process is alone in it.
static MEMORY: RwLock<()> = RwLock::new(());

fn beside_others() -> RwLockReadGuard<'static, ()> {
    MEMORY.read().unwrap_or_else(PoisonError::into_inner)
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Without copies of matrices, which sum in another order and which a budget does without.
fn load(memory: Option<u64>, on_exceed: OnExceed) -> LoadOptions {
    LoadOptions {
        threads: 2,
        repack: Repack::Off,
        memory,
        on_exceed,
        ..LoadOptions::default()
    }
}

fn options(n_ctx: usize) -> SessionOptions {
    SessionOptions {
        n_ctx,
        kv: KvType::F32.into(),
        batch: 512,
        ..SessionOptions::default()
    }
}

/// The bytes beside weights and state that plans in this process start from.
fn base(footprint: &Footprint) -> u64 {
    footprint.tokenizer + footprint.runtime + footprint.program
}

fn within(model: &Model, memory: u64, on_exceed: OnExceed) -> kinglet::Result<Plan> {
    Plan::within(model, &options(8192), 512, &load(Some(memory), on_exceed))
}

#[test]
fn less_and_less_is_asked_for() {
    let _beside = beside_others();
    let model = Model::outline(&root(SMALL), &load(None, OnExceed::Refuse)).unwrap();
    let unlimited = load(None, OnExceed::Refuse);
    let whole = Plan::within(&model, &options(8192), 512, &unlimited).unwrap();
    let total = whole.footprint.total();
    let mut seen = Vec::new();
    let mut before = whole.clone();
    for memory in (0..40).map(|i| total - i * (total / 40)) {
        match within(&model, memory, OnExceed::Degrade) {
            Ok(plan) => {
                assert!(plan.footprint.total() <= memory, "{plan:?}");
                let (now, then) = (&plan.options, &before.options);
                let streamed = |p: &Plan| p.kept_weights < p.weights;
                // A step further down the ladder, or streaming with the best that fits then.
                if streamed(&plan) == streamed(&before) {
                    assert!(now.batch <= then.batch && now.n_ctx <= then.n_ctx);
                }
                if now.n_ctx < 8192 {
                    let least = KvType::ALL.iter().map(|kv| {
                        let options = SessionOptions {
                            kv: (*kv).into(),
                            ..now.clone()
                        };
                        Plan::new(&model, &options, 1).unwrap().memory.kv
                    });
                    assert_eq!((now.batch, Some(plan.memory.kv)), (32, least.min()));
                }
                seen.extend(plan.concessions.iter().map(std::mem::discriminant));
                before = plan;
            }
            Err(Error::OverBudget { memory: told, .. }) => {
                assert_eq!(told, memory);
                assert!(memory < base(&whole.footprint) + (20 << 20), "{memory}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    for concession in [
        Concession::Batch(1, 1),
        Concession::Kv(KvType::F32.into(), KvType::F16.into()),
        Concession::Context(1, 1),
        Concession::Streaming(1, 1),
    ] {
        let kind = std::mem::discriminant(&concession);
        assert!(seen.contains(&kind), "never: {concession}");
    }
    // Nothing is given up where it fits, or where that was not allowed.
    let plan = within(&model, total, OnExceed::Refuse).unwrap();
    assert_eq!((plan.concessions.len(), plan.options.batch), (0, 512));
    let refused = within(&model, total - 1, OnExceed::Refuse);
    assert!(matches!(refused, Err(Error::OverBudget { needed, .. }) if needed == total));
}

#[test]
fn the_library_refuses_unless_told() {
    let _beside = beside_others();
    let options = LoadOptions {
        memory: Some(1 << 20),
        ..LoadOptions::default()
    };
    let model = Model::load(&root(TINY), &options).unwrap();
    let error = Session::new(&model, &SessionOptions::default()).err();
    assert!(matches!(error, Some(Error::OverBudget { memory, .. }) if memory == 1 << 20));
}

#[test]
fn snapshots_and_forks_take_their_part() {
    let _beside = beside_others();
    let open = |memory| {
        let model = Model::load(&root(TINY), &load(Some(memory), OnExceed::Refuse)).unwrap();
        Session::new(&model, &options(1024))
    };
    let Err(Error::OverBudget { needed, .. }) = open(1 << 20) else {
        panic!("no process is so small");
    };
    // The other tests' memory counts too, and grows.
    let mut session = open(needed + (256 << 20)).unwrap();
    let tokens: Vec<u32> = (0..1000).map(|i| i * 37 % 300).collect();
    session.prefill(&tokens, &mut |_, _| Continue(())).unwrap();
    let mut held = Vec::new();
    let error = loop {
        match session.snapshot() {
            Ok(snapshot) => held.push(snapshot),
            Err(error) => break error,
        }
    };
    let Error::OverBudget { needed, memory, .. } = error else {
        panic!("{error}");
    };
    let state = session.memory();
    let one = (state.kv + state.conv + state.scratch) as u64;
    assert!(
        memory < needed && needed <= memory + one,
        "{needed} of {memory}"
    );
    assert!(held.len() > 8, "{} of {one}", held.len());
    assert!(matches!(session.fork(), Err(Error::OverBudget { .. })));
    // Nothing is lost, and what is given up is there for others.
    session.truncate(500).unwrap();
    session.restore(&held[0]).unwrap();
    assert_eq!(session.tokens(), tokens);
    held.truncate(held.len() / 2);
    session.snapshot().unwrap();
    session.fork().unwrap();
}

/// Logits after prefills and single tokens, of one and of many.
fn logits(session: &mut Session) -> Vec<u32> {
    let tokens: Vec<u32> = (0..90).map(|i| i * 37 % 500).collect();
    let mut out = Vec::new();
    session.prefill(&tokens, &mut |_, _| Continue(())).unwrap();
    out.extend(session.logits().iter().map(|x| x.to_bits()));
    for token in [7, 8, 9] {
        session.decode(token).unwrap();
        out.extend(session.logits().iter().map(|x| x.to_bits()));
    }
    let each = &mut |_: usize, row: &[f32]| {
        out.extend(row.iter().map(|x| x.to_bits()));
        Continue(())
    };
    session.score(&tokens[..9], each).unwrap();
    out
}

/// What the process holds beside the model is not known, so the budget is found.
#[test]
fn streamed_weights_compute_the_same() {
    let _alone = MEMORY.write().unwrap_or_else(PoisonError::into_inner);
    let options = SessionOptions {
        n_ctx: 512,
        kv: KvType::F16.into(),
        batch: 32,
        ..SessionOptions::default()
    };
    let whole = Model::load(&root(SMALL), &load(None, OnExceed::Refuse)).unwrap();
    let expected = logits(&mut Session::new(&whole, &options).unwrap());
    let n_weights = whole.info().weight_bytes;
    drop(whole);
    let mut streamed = 0;
    for memory in (16..160).step_by(3).map(|n| n << 20) {
        let model = Model::load(&root(SMALL), &load(Some(memory), OnExceed::Degrade)).unwrap();
        let Ok(mut session) = Session::new(&model, &options) else {
            continue;
        };
        // Further down the ladder it would round otherwise.
        if session.kv_types() != options.kv {
            continue;
        }
        let kept = session.concessions().iter().find_map(|c| match c {
            Concession::Streaming(kept, _) => Some(*kept),
            _ => None,
        });
        let Some(kept) = kept else {
            break;
        };
        // With next to nothing kept, and with half.
        if streamed == 0 || (streamed == 1 && kept > n_weights / 2) {
            assert!(logits(&mut session) == expected, "{memory}: {kept} kept");
            streamed += 1;
        }
    }
    assert_eq!(streamed, 2);
}

/// A reply by a new process: its JSON.
fn run(memory: &str, more: &[&str]) -> Result<Value, (Option<i32>, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_kinglet"))
        .args([
            "run",
            "--raw",
            "--json",
            "-n",
            "8",
            "--ignore-eos",
            "--temp",
            "0",
            "-t",
            "2",
        ])
        .args(["-m", root(SMALL).to_str().unwrap(), "-c", "640"])
        .args(["-p", &"once upon a time ".repeat(150), "--memory", memory])
        .args(more)
        .output()
        .unwrap();
    if output.status.success() {
        Ok(serde_json::from_slice(&output.stdout).unwrap())
    } else {
        let text = String::from_utf8(output.stderr).unwrap();
        Err((output.status.code(), text))
    }
}

#[test]
fn peaks_stay_within_the_budget() {
    let whole = run("1G", &[]).unwrap();
    let peak = |reply: &Value| reply["memory"]["peak_bytes"].as_u64();
    if peak(&whole).is_none() {
        println!("skipped: this system does not count");
        return;
    }
    for mib in [70, 50, 32] {
        let reply = run(&format!("{mib}M"), &[]).unwrap();
        let peak = peak(&reply).unwrap();
        assert!(peak <= mib << 20, "{mib} MiB: {peak}");
        // What is given up changes how a prompt is read, and nothing else.
        assert_eq!(reply["timings"]["decode_tokens"], 7);
    }
    // A plan is what a run takes, within 3 %.
    let plan = Command::new(env!("CARGO_BIN_EXE_kinglet"))
        .args([
            "plan",
            root(SMALL).to_str().unwrap(),
            "-c",
            "640",
            "-t",
            "2",
            "--memory",
            "1G",
            "--json",
        ])
        .output()
        .unwrap();
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    let planned = plan["bytes"]["total"].as_f64().unwrap();
    let measured = peak(&whole).unwrap() as f64;
    println!("planned {planned}, measured {measured}");
    assert!((planned / measured - 1.0).abs() < 0.03, "{plan} {whole}");
}

#[test]
fn a_budget_that_cannot_be_kept_has_its_exit_code() {
    let (code, text) = run("12M", &[]).unwrap_err();
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains("over budget"), "{text}");
    let (code, _) = run("60M", &["--on-exceed", "refuse"]).unwrap_err();
    assert_eq!(code, Some(4));
    let (code, _) = run("60Q", &[]).unwrap_err();
    assert_eq!(code, Some(2));
}

/// Where the system gives less than a pass needs, that is an error, and the program tells it.
#[cfg(target_os = "linux")]
#[test]
fn missing_memory_is_an_error() {
    let output = Command::new("sh")
        .args(["-c", "ulimit -v 110000; exec \"$@\"", "sh"])
        .arg(env!("CARGO_BIN_EXE_kinglet"))
        .args([
            "run", "--raw", "-t", "1", "-n", "1", "-b", "65536", "-c", "65536",
        ])
        .args([
            "-m",
            root(TINY).to_str().unwrap(),
            "-p",
            &"word ".repeat(10_000),
        ])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("out of memory"), "{text}");
}
