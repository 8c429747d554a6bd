//! Policies on a GPU choose what they choose on the CPU.

use std::sync::Arc;

use kinglet::backend::delta::Delta;
use kinglet::backend::select::{Chunking, KvOptions};
use kinglet::backend::{Attention, KvType, RopePairs, Step};
use kinglet::session::{Extra, StateFile};
use kinglet::sparsity::{Heads, Policy, Repair, Sparsity};
use kinglet::{BackendKind, Error, Session, SessionOptions};

use super::on_gpu::{adapter, distance, load, new_session, prefill, sparse_session};
use super::{Case, attend, cpu, go_back_part_and_come_back, gpu, largest, near};

/// Every policy that a device has, of at least `n` keys.
fn policies(n: usize) -> Vec<Sparsity> {
    let dhsa = |n, heads| Policy::Dhsa {
        chunking: Chunking::Fixed(n),
        heads,
    };
    let policies = [
        Policy::Window,
        Policy::Blocks,
        dhsa(8, Heads::Each),
        dhsa(16, Heads::Shared),
        dhsa(8, Heads::Vote),
        dhsa(13, Heads::Best),
    ];
    let plain = policies.map(|policy| Sparsity {
        local: 40,
        ..Sparsity::new(policy, n)
    });
    // And a share of what is seen.
    let shares = plain.map(|sparsity| Sparsity {
        per_cent: 60,
        sink: 21,
        ..sparsity
    });
    plain.into_iter().chain(shares).collect()
}

fn options(case: Case, sparsity: Sparsity) -> KvOptions {
    KvOptions {
        select: sparsity.selector().expect("a budget that suffices"),
        ..case.kv.into()
    }
}

#[test]
fn policies_choose_as_on_the_cpu() {
    if !adapter() {
        return;
    }
    let case = |(n_heads, n_kv_heads, head_dim), window, (n_past, n_tokens), kv: KvType| Case {
        shape: Attention {
            n_heads,
            n_kv_heads,
            head_dim,
            // Small, so that a key more or less is seen.
            scale: 0.02,
            window,
        },
        n_past,
        n_tokens,
        kv: kv.into(),
        pairs: Some(RopePairs::Halves),
        normed: false,
    };
    let [plain, shares] = [0, 6].map(|first| policies(236)[first..first + 6].to_vec());
    for (case, policies) in [
        (case((9, 3, 64), None, (400, 3), KvType::F16), &shares),
        (case((8, 1, 32), Some(310), (350, 9), KvType::F32), &plain),
        (case((2, 1, 256), None, (310, 2), KvType::Q8_0), &plain),
        // Some of the tokens still see everything.
        (case((4, 4, 16), None, (220, 40), KvType::F32), &shares),
    ] {
        for &sparsity in policies {
            let kv = options(case, sparsity);
            // Each token by itself there: what reads several together rounds more.
            let expected = attend(&mut cpu(), case, &kv, Step::Decode);
            let share = if case.kv.is_quantized() { 1e-2 } else { 3e-3 };
            for step in [Step::Decode, Step::Prefill] {
                let what = format!("{case:?}, {sparsity}, {step:?}");
                let found = attend(&mut gpu(), case, &kv, step);
                near(&found, &expected, share, &what);
            }
            // One chunk more would have been seen.
            let more = Sparsity {
                budget: sparsity.budget + 64,
                per_cent: sparsity.per_cent * 4 / 3,
                ..sparsity
            };
            let other = attend(&mut cpu(), case, &options(case, more), Step::Decode);
            let pairs = other.iter().zip(&expected);
            let differs = pairs.fold(0.0f32, |most, (a, b)| most.max((a - b).abs()));
            let seen = 2.0 * share * largest(&expected);
            assert!(f64::from(differs) > seen, "{case:?}, {sparsity}: {differs}");
        }
    }
}

/// Tokens without a period: keys of chunks that repeat would be near ties.
fn tokens(n: u32, n_vocab: u32) -> Vec<u32> {
    let hash = |i: u32| (i + 1).wrapping_mul(2_654_435_761) >> 13;
    (0..n).map(|i| hash(i) % n_vocab).collect()
}

#[test]
fn a_budget_that_suffices_is_dense_to_the_bit() {
    if !adapter() {
        return;
    }
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let run = |mut session: Session| {
        prefill(&mut session, &tokens(300, 320));
        let mut logits = session.logits().to_vec();
        session.decode(7).expect("decode");
        logits.extend_from_slice(session.logits());
        (logits, session.work())
    };
    let (dense, _) = run(new_session(&model, KvType::F16, 64));
    for sparsity in policies(301).into_iter().step_by(2) {
        let (found, work) = run(sparse_session(&model, KvType::F16, 64, sparsity));
        assert_eq!(found, dense, "{sparsity}");
        assert_eq!(work.share_read(), Some(1.0), "{sparsity}");
    }
    for sparsity in policies(240).into_iter().take(3) {
        let (found, _) = run(sparse_session(&model, KvType::F16, 64, sparsity));
        assert_ne!(found, dense, "{sparsity}");
    }
}

#[test]
fn sessions_of_the_cpu_and_the_gpu_agree() {
    if !adapter() {
        return;
    }
    let all = policies(236);
    for (name, policies) in [("lfm2", 0..6), ("smallthinker", 3..8)] {
        let file = format!("tests/data/{name}-tiny-random.gguf");
        let models = [BackendKind::Cpu, BackendKind::Gpu].map(|backend| load(&file, backend));
        for &sparsity in &all[policies] {
            let [expected, found] = models.each_ref().map(|model| {
                let mut session = sparse_session(model, KvType::F32, 64, sparsity);
                prefill(&mut session, &tokens(330, 320));
                session.decode(9).expect("decode");
                session
            });
            let d = distance(found.logits(), expected.logits());
            assert!(d < 1e-3, "{name}, {sparsity}: {d:e}");
            let pairs = |session: &Session| (session.work().pairs, session.work().pairs_read);
            let ((all, read), found) = (pairs(&expected), pairs(&found));
            assert_eq!(found.0, all, "{name}, {sparsity}");
            assert!(read < all && found.1 >= read, "{name}, {sparsity}");
            // A block that a window of the model cuts is counted whole.
            if sparsity.policy != Policy::Blocks {
                assert_eq!(found.1, read, "{name}, {sparsity}");
            }
        }
    }
}

#[test]
fn sessions_with_a_policy_go_back_part_and_come_back() {
    if !adapter() {
        return;
    }
    for i in [0, 1, 5] {
        go_back_part_and_come_back("tests/data/lfm2-tiny-random.gguf", policies(236)[i]);
    }
}

#[test]
fn the_chat_model_goes_on_on_the_gpu() {
    if !adapter() {
        return;
    }
    let file = "models/lfm2-smol-Q4_0.gguf";
    let [cpu, gpu] = [BackendKind::Cpu, BackendKind::Gpu].map(|backend| load(file, backend));
    let state = std::env::temp_dir().join(format!("kinglet-sparse-{}.state", std::process::id()));
    for i in [0, 1, 5, 10] {
        let sparsity = policies(236)[i];
        let mut session = sparse_session(&cpu, KvType::F16, 128, sparsity);
        prefill(&mut session, &tokens(420, 4000));
        session.save(&state, &Extra::default()).expect("room");
        let found = StateFile::open(&state).and_then(|file| file.load(&gpu, &session.options()));
        let (mut found, _) = found.expect("what was saved");
        for token in 0..3 {
            session.decode(token).expect("decode");
            found.decode(token).expect("decode");
        }
        // The same keys but three; activations are rounded to eight bits on both sides, not to the same.
        let d = distance(found.logits(), session.logits());
        println!("{sparsity}: {d:e}");
        assert!(d < 3e-2, "{sparsity}: {d:e}");
        let read = found.work().share_read().expect("keys were read");
        assert!(read < 0.7, "{sparsity}: {read}");
    }
    std::fs::remove_file(state).expect("a file");
}

#[test]
fn what_no_device_chooses_is_an_error_that_names_it() {
    if !adapter() {
        return;
    }
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let dhsa = |chunking| Policy::Dhsa {
        chunking,
        heads: Heads::Best,
    };
    let shift = Sparsity::new(dhsa(Chunking::Shift(16)), 300);
    let predict = Sparsity::new(dhsa(Chunking::Predict(16)), 300);
    let pooled = Sparsity {
        repair: Repair::Pooled,
        ..Sparsity::new(dhsa(Chunking::Fixed(16)), 300)
    };
    let delta = SessionOptions {
        delta: Some(Arc::new(Delta::new(0.5))),
        ..SessionOptions::default()
    };
    for (options, named) in [
        (of(shift), "keys shift"),
        (of(predict), "predict:16"),
        (of(pooled), "pooled"),
        (delta, "DeltaLLM"),
    ] {
        let error = Session::new(&model, &options).map(drop).expect_err(named);
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(named), "{error}");
    }
}

fn of(sparsity: Sparsity) -> SessionOptions {
    SessionOptions {
        sparsity,
        ..SessionOptions::default()
    }
}
