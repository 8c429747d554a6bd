//! Models, random numbers, and sessions made from scratch.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kinglet::sampler::{Rng, Sampler, Settings, Source};
use kinglet::{KvTypes, LoadOptions, Model, Session, SessionOptions};

/// Tokens that fit into a session of these tests.
pub const N_CTX: usize = 1024;

/// A model of this repository, on two threads.
pub fn load(path: impl AsRef<Path>) -> Model {
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    };
    Model::load(&root().join(path), &options).expect("the model loads")
}

/// The folder of this repository.
pub fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// The random model with convolutions.
pub fn tiny() -> Model {
    load("tests/data/lfm2-tiny-random.gguf")
}

/// The model that `models/get-smollm2.sh` gets, if it is here.
pub fn smollm2() -> Option<Model> {
    let path = ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf";
    if root().join(path).exists() {
        return Some(load(path));
    }
    let required = std::env::var_os("KINGLET_REQUIRE_MODELS").is_some();
    assert!(!required, "{path} is missing: models/get-smollm2.sh");
    println!("skipped: {path} is missing; models/get-smollm2.sh gets it");
    None
}

/// A session that reads `batch` tokens at once.
pub fn session(model: &Model, batch: usize) -> Session {
    session_with(model, batch, KvTypes::default())
}

/// The same with other cache types.
pub fn session_with(model: &Model, batch: usize, kv: KvTypes) -> Session {
    let n_ctx = N_CTX;
    let options = SessionOptions {
        n_ctx,
        kv,
        batch,
        ..SessionOptions::default()
    };
    Session::new(model, &options).expect("a session")
}

/// Reads tokens.
pub fn prefill(session: &mut Session, tokens: &[u32]) {
    let go = &mut |_, _| ControlFlow::Continue(());
    session.prefill(tokens, go).expect("room and memory");
}

/// Takes the likeliest token.
pub fn greedy() -> Sampler {
    let mut settings = Settings::neutral();
    settings.set("temp", "0", Source::Flag).expect("a number");
    Sampler::new(&settings)
}

/// Small numbers.
pub struct Random(pub Rng);

impl Random {
    /// Those of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(Rng::new(seed))
    }

    /// One below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n as u64) as usize
    }

    /// `n` tokens of a vocabulary.
    pub fn tokens(&mut self, n: usize, n_vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(n_vocab) as u32).collect()
    }
}

/// The bits, for comparisons that tell 0 from -0.
pub fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}
