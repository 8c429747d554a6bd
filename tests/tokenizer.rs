//! The tokenizer against llama.cpp's ids, against the `tokenizers` crate, and its own laws.

use kinglet::gguf::Gguf;
use kinglet::tokenizer::{Special, Tokenizer};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// One text and the tokens that llama.cpp makes of it.
#[derive(serde::Deserialize)]
struct Golden {
    text: String,
    ids: Vec<u32>,
}

fn tokenizer_of(path: &Path) -> Tokenizer {
    let gguf = Gguf::open(path).unwrap_or_else(|e| panic!("{e}"));
    Tokenizer::from_gguf(&gguf).unwrap_or_else(|e| panic!("{e}"))
}

fn goldens(path: &Path) -> Vec<Golden> {
    let json = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&json).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn compare(tokenizer: &Tokenizer, goldens: &[Golden], special: Special, name: &str) {
    for Golden { text, ids } in goldens {
        let found = tokenizer.encode(text, special);
        if found != *ids {
            let at = found.iter().zip(ids).take_while(|(a, b)| a == b).count();
            let show = |ids: &[u32]| -> Vec<(u32, String)> {
                let end = ids.len().min(at + 6);
                ids[at.saturating_sub(3)..end]
                    .iter()
                    .map(|&id| (id, tokenizer.token_text(id)))
                    .collect()
            };
            let start: String = text.chars().take(60).collect();
            panic!(
                "{name}: {start:?}: token {at}: expected {:?}, found {:?}",
                show(ids),
                show(&found)
            );
        }
    }
}

/// All of it, where someone has it: `KINGLET_TOKENIZER_ORACLE` is a folder of `tok-<model>-{plain,special}.json`,
/// `KINGLET_MODELS` a folder of the models.
#[test]
fn equals_llama_cpp_on_everything() {
    let folder = |name| std::env::var_os(name).map(PathBuf::from);
    let (Some(oracle), Some(models)) =
        (folder("KINGLET_TOKENIZER_ORACLE"), folder("KINGLET_MODELS"))
    else {
        println!("skipped: KINGLET_TOKENIZER_ORACLE and KINGLET_MODELS are not both set");
        return;
    };
    for (name, file) in [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("qwen2.5", "qwen2.5-coder-0.5b-instruct-Q4_K_M.gguf"),
        ("gemma3", "gemma-3-270m-Q4_K_M.gguf"),
    ] {
        let start = Instant::now();
        let tokenizer = tokenizer_of(&models.join(file));
        println!(
            "{name}: {} tokens loaded in {:?}",
            tokenizer.n_vocab(),
            start.elapsed()
        );
        for (mode, special) in [("plain", Special::Text), ("special", Special::Parse)] {
            for part in ["-edge", ""] {
                let name = format!("tok-{name}{part}-{mode}.json");
                let goldens = goldens(&oracle.join(&name));
                let bytes: usize = goldens.iter().map(|g| g.text.len()).sum();
                let start = Instant::now();
                compare(&tokenizer, &goldens, special, &name);
                let speed = bytes as f64 / start.elapsed().as_secs_f64() / 1e6;
                println!(
                    "{name}: {} texts, {bytes} bytes, {speed:.1} MB/s",
                    goldens.len()
                );
            }
        }
    }
}
