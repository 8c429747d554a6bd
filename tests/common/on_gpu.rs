//! Models and sessions on a GPU, for tests.

use std::ops::ControlFlow;

use kinglet::backend::gpu;
use kinglet::{BackendKind, KvType, LoadOptions, Model, Session, SessionOptions, Sparsity};

/// Whether there is an adapter; says so if not.
pub fn adapter() -> bool {
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

pub fn load(path: &str, backend: BackendKind) -> Model {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let options = LoadOptions {
        threads: 2,
        backend,
        ..LoadOptions::default()
    };
    Model::load(&path, &options).expect("the model loads")
}

pub fn new_session(model: &Model, kv: KvType, batch: usize) -> Session {
    sparse_session(model, kv, batch, Sparsity::default())
}

pub fn sparse_session(model: &Model, kv: KvType, batch: usize, sparsity: Sparsity) -> Session {
    let options = SessionOptions {
        n_ctx: 512,
        kv: kv.into(),
        batch,
        sparsity,
        ..SessionOptions::default()
    };
    Session::new(model, &options).expect("a session")
}

pub fn prefill(session: &mut Session, tokens: &[u32]) {
    session
        .prefill(tokens, &mut |_, _| ControlFlow::Continue(()))
        .expect("prefill");
}

/// Largest difference, relative to the largest logit.
pub fn distance(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / scale
}

pub fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len())
        .max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a)))
        .expect("logits") as u32
}
