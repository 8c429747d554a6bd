//! The folder tree is the architecture: which layer may use which, read from the `crate::` paths of the source.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Layer and what it may name. `error`, `cancel` and `profile` are free for all; a layer may always name itself.
const RULES: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("cancel", &[]),
    ("profile", &[]),
    ("quant", &[]),
    // Its passes over the vocabulary are rows of the kernel table.
    ("sampler", &["backend"]),
    ("tools", &[]),
    ("gguf", &["quant"]),
    ("tokenizer", &["gguf"]),
    ("grammar", &["tokenizer", "sampler"]),
    ("experts", &[]),
    // A store knows files and numbers alone: it lies below.
    ("backend", &["quant", "experts"]),
    ("model", &["gguf", "quant", "backend"]),
    ("sparsity", &["backend"]),
    (
        "session",
        &[
            "gguf",
            "quant",
            "tokenizer",
            "grammar",
            "tools",
            "backend",
            "experts",
            "model",
            "sampler",
            "sparsity",
        ],
    ),
];

/// Where `unsafe` is allowed: the map, the memory of experts and advice about their files, that of keys and values, the
/// pool and what its workers ask of the system, the map of a measurement, the kernel table, the loads and stores of each
/// instruction-set level, the calls into ggml, shaders without run-time checks, and the pointers and callbacks of C.
const FENCE: &[&str] = &[
    "src/gguf/map.rs",
    "src/experts/arena.rs",
    "src/experts/disk/sys.rs",
    "src/experts/disk/uring.rs",
    "src/backend/cpu/pool.rs",
    "src/backend/cpu/pace.rs",
    "src/backend/cpu/pages.rs",
    "src/backend/cpu/roofline.rs",
    "src/backend/cpu/table.rs",
    "src/backend/cpu/avx2/mod.rs",
    "src/backend/cpu/avx2/floats.rs",
    "src/backend/cpu/amx/mod.rs",
    "src/backend/cpu/avx512vnni/mod.rs",
    "src/backend/cpu/avx512vnni/floats.rs",
    "src/backend/cpu/neon/mod.rs",
    "src/backend/cpu/neon_dotprod/mod.rs",
    "src/backend/ggml/graph.rs",
    "src/backend/ggml/memory.rs",
    "src/backend/ggml/sys.rs",
    "src/backend/gpu/pipeline.rs",
    "src/capi/mod.rs",
    "src/capi/model.rs",
    "src/capi/params.rs",
    "src/capi/profile.rs",
    "src/capi/request.rs",
    "src/capi/runtime.rs",
    "src/capi/session.rs",
    "src/capi/text.rs",
    "src/capi/values.rs",
];

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                files.push((
                    path.strip_prefix(root).expect("below the root").to_owned(),
                    text,
                ));
            }
        }
    }
    assert!(files.len() > 20, "the source tree was found");
    files
}

/// The names after `crate::`, those in braces too: `crate::{error::Error, quant}`.
fn uses(text: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let word = |s: &str| {
            s.find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(s.len())
        };
        let Some(list) = rest.strip_prefix('{') else {
            found.insert(&rest[..word(rest)]);
            continue;
        };
        let (mut depth, mut start) = (0, true);
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if start && !c.is_whitespace() => {
                    found.insert(&list[i..i + word(&list[i..])]);
                    start = false;
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn layers_use_only_what_lies_below_them() {
    let modules: BTreeSet<&str> = RULES.iter().map(|(layer, _)| *layer).collect();
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let Some(layer) = path
            .components()
            .nth(1)
            .and_then(|c| c.as_os_str().to_str())
        else {
            continue;
        };
        let layer = layer.trim_end_matches(".rs");
        let Some((_, allowed)) = RULES.iter().find(|(name, _)| *name == layer) else {
            assert!(
                ["lib", "bin", "build", "capi"].contains(&layer),
                "{}: no rule for this layer",
                path.display()
            );
            continue;
        };
        for used in uses(&text) {
            if modules.contains(used)
                && used != layer
                && !["error", "cancel", "profile"].contains(&used)
                && !allowed.contains(&used)
            {
                broken.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn unsafe_stays_inside_its_fence() {
    for (path, text) in sources() {
        let name = path.to_string_lossy().replace('\\', "/");
        let opened = text
            .split_whitespace()
            .collect::<String>()
            .contains("allow(unsafe_code");
        assert!(
            !opened || FENCE.contains(&name.as_str()),
            "{name} opens the fence"
        );
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let has_block = code
            .clone()
            .any(|line| line.contains("unsafe {") || line.contains("unsafe impl"));
        assert!(
            !has_block || opened,
            "{name} has unsafe code and no reason for it"
        );
    }
}

#[test]
fn the_reader_of_this_test_sees_lists_too() {
    let text = "use crate::error::Result;\nuse crate::{\n    gguf::{Gguf, map},\n    quant,\n};\ncrate::model::load()";
    assert_eq!(
        uses(text).into_iter().collect::<Vec<_>>(),
        ["error", "gguf", "model", "quant"]
    );
}
