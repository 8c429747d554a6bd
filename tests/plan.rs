//! Plans: the planner counts what the CPU does and holds, from the header alone.

use std::fs;
use std::ops::ControlFlow::Continue;
use std::path::{Path, PathBuf};

use kinglet::backend::select::Chunking;
use kinglet::session::Plan;
use kinglet::sparsity::{Heads, Policy, Sparsity};
use kinglet::{Error, KvType, KvTypes, LoadOptions, Model, Session, SessionOptions};

const TINY: &str = "tests/data/lfm2-tiny-random.gguf";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The models that are here: the others are fetched by hand, and required where the environment says so.
fn models() -> Vec<PathBuf> {
    let real = [
        "models/lfm2-smol-Q4_0.gguf",
        ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf",
    ];
    let (here, missing): (Vec<_>, Vec<_>) = real.map(root).into_iter().partition(|p| p.is_file());
    if std::env::var_os("KINGLET_REQUIRE_MODELS").is_some_and(|v| v == "1") {
        assert!(missing.is_empty(), "missing: {missing:?}");
    }
    std::iter::once(root(TINY)).chain(here).collect()
}

fn load(threads: usize) -> LoadOptions {
    LoadOptions {
        threads,
        ..LoadOptions::default()
    }
}

/// Prompts, a cut, single tokens, logits of all: what sessions do, some of it twice so that buffers are reused.
fn drive(session: &mut Session) -> kinglet::Result<()> {
    let n_vocab = session.model().info().config.n_vocab;
    let tokens: Vec<u32> = (0..90).map(|i| (i * 37 % n_vocab) as u32).collect();
    session.prefill(&tokens, &mut |_, _| Continue(()))?;
    for token in &tokens[..3] {
        session.decode(*token)?;
    }
    session.truncate(41)?;
    session.prefill(&tokens[..7], &mut |_, _| Continue(()))?;
    session.score(&tokens[..13], &mut |_, _| Continue(()))?;
    session.decode(1)
}

#[test]
fn the_planner_counts_what_the_cpu_does() {
    let floats = [KvType::F32, KvType::F16].map(KvTypes::from);
    let small = floats.map(|kv| [1, 5, 32, 90].map(|batch| (root(TINY), kv, batch)));
    // Heads of the tiny model are no whole blocks.
    let mixed = KvTypes {
        keys: KvType::Q8_0,
        values: KvType::Q4_0,
    };
    let kinds = KvType::ALL.map(KvTypes::from).into_iter().chain([mixed]);
    let quantized = kinds.flat_map(|kv| models().into_iter().nth(1).map(|path| (path, kv, 32)));
    let large = models().into_iter().skip(2);
    let large = large.map(|path| (path, KvTypes::default(), 32));
    let small = small.into_iter().flatten().chain(quantized);
    for (path, kv, batch) in small.chain(large) {
        let options = SessionOptions {
            n_ctx: 300,
            kv,
            batch,
            ..SessionOptions::default()
        };
        let model = Model::load(&path, &load(1)).unwrap();
        let outline = Model::outline(&path, &load(1)).unwrap();
        let mut real = Session::new(&model, &options).unwrap();
        let mut planned = Session::new(&outline, &options).unwrap();
        drive(&mut real).unwrap();
        drive(&mut planned).unwrap();
        let name = format!("{}, {kv:?}, batches of {batch}", path.display());
        assert_eq!(planned.memory(), real.memory(), "{name}");
        // One thread enters no regions.
        assert_eq!(planned.work(), real.work(), "{name}");
        assert!(real.work().weight_bytes > 0);
    }
}

#[test]
fn several_threads_hold_what_is_planned() {
    // Of at most 90 keys; the second keeps sums of some.
    let dhsa = Policy::Dhsa {
        chunking: Chunking::Fixed(8),
        heads: Heads::Each,
    };
    let sparse = [Policy::Window, dhsa].map(|policy| Sparsity {
        local: 8,
        ..Sparsity::new(policy, 32)
    });
    let dense = Sparsity::default();
    for (threads, sparsity) in [2, 3].into_iter().flat_map(|n| {
        let all = [dense].into_iter().chain(sparse);
        all.map(move |sparsity| (n, sparsity))
    }) {
        let options = SessionOptions {
            n_ctx: 300,
            kv: KvType::F32.into(),
            batch: 64,
            sparsity,
            ..SessionOptions::default()
        };
        let model = Model::load(&root(TINY), &load(threads)).unwrap();
        let outline = Model::outline(&root(TINY), &load(threads)).unwrap();
        let mut real = Session::new(&model, &options).unwrap();
        let mut planned = Session::new(&outline, &options).unwrap();
        drive(&mut real).unwrap();
        drive(&mut planned).unwrap();
        let work = real.work();
        assert_eq!(work.pairs_read == work.pairs, sparsity == dense);
        assert_eq!(planned.memory(), real.memory(), "{threads}, {sparsity}");
    }
}

#[test]
fn a_plan_needs_the_header_alone() {
    let whole = root(TINY);
    let header = kinglet::gguf::Gguf::open(&whole).unwrap().header_bytes();
    let cut = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan-cut.gguf");
    let bytes = fs::read(&whole).unwrap();
    fs::write(&cut, &bytes[..header as usize]).unwrap();
    let plan = |path: &Path| {
        let outline = Model::outline(path, &load(2)).unwrap();
        Plan::new(&outline, &SessionOptions::default(), 100).unwrap()
    };
    let (cut_plan, plan) = (plan(&cut), plan(&whole));
    assert_eq!(cut_plan.memory, plan.memory);
    assert_eq!(cut_plan.prefill, plan.prefill);
    assert_eq!(cut_plan.decode, plan.decode);
    // Its weights cannot be run, and a header that is cut is still an error.
    assert!(matches!(
        Model::load(&cut, &load(1)),
        Err(Error::BadFile { .. })
    ));
    fs::write(&cut, &bytes[..header as usize - 1]).unwrap();
    assert!(matches!(
        Model::outline(&cut, &load(1)),
        Err(Error::BadFile { .. })
    ));
}

#[test]
fn a_plan_is_what_a_full_session_holds() {
    let model = Model::load(&root(TINY), &load(1)).unwrap();
    let options = SessionOptions {
        n_ctx: 300,
        kv: KvType::F16.into(),
        batch: 32,
        ..SessionOptions::default()
    };
    let plan = Plan::new(&model, &options, 300).unwrap();
    let mut session = Session::new(&model, &options).unwrap();
    let tokens: Vec<u32> = (0..299).collect();
    session.prefill(&tokens, &mut |_, _| Continue(())).unwrap();
    session.decode(7).unwrap();
    assert_eq!(session.memory(), plan.memory);
}
