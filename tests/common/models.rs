//! Models of tests.

use std::path::{Path, PathBuf};

/// A file of this repository.
pub fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// SmolLM2 where it was fetched, else the model of this repository.
pub fn real_model() -> PathBuf {
    let path = at(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return path;
    }
    assert!(
        std::env::var_os("KINGLET_REQUIRE_MODELS").is_none(),
        "no {}: run models/get-smollm2.sh",
        path.display()
    );
    println!("no SmolLM2: the small model instead");
    at("models/lfm2-smol-Q4_0.gguf")
}
