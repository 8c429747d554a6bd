//! `kinglet show`: the card of a model: what it is, what it needs, how it is sampled and who says so.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use kinglet::sampler::Settings;
use kinglet::{KvTypes, Model, Session};
use serde_json::{Map, json};

use crate::args::ShowArgs;
use crate::failure::Outcome;
use crate::{locate, ui};

pub fn run(args: &ShowArgs) -> Outcome {
    args.sampling.check()?;
    let model = locate::load(&args.model)?;
    let session = args.session.open(&model)?;
    let kv = args.session.options().kv;
    let settings = args.sampling.settings(&model)?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", json(&session, kv, &settings))?;
    } else {
        let card = card(&session, kv);
        write!(out, "{card}\nSampling\n{}", sampling(&settings))?;
    }
    out.flush()?;
    Ok(())
}

/// What the model is and needs.
pub fn card(session: &Session, kv: KvTypes) -> String {
    let model = session.model();
    let info = model.info();
    let config = &info.config;
    let mut card = String::new();
    let mut row = |name: &str, value: String| {
        writeln!(card, "  {name:<14} {}", ui::one_line(&value)).expect("strings can be written to");
    };
    let attention = config.n_kv_heads.iter().filter(|n| **n > 0).count();
    row("name", info.name.clone());
    row("file", model.gguf().path().display().to_string());
    if let Ok(Some(licence)) = model.gguf().metadata().opt_str("general.license") {
        row("licence", licence.to_owned());
    }
    row("architecture", config.architecture.clone());
    row(
        "parameters",
        format!(
            "{} in {}",
            ui::count(info.n_params),
            ui::bytes(info.weight_bytes)
        ),
    );
    row("weights", mix(model));
    row(
        "layers",
        format!("{}, {attention} with attention", config.n_layers),
    );
    row(
        "hidden",
        format!("{}, feed-forward {}", config.hidden, config.ffn),
    );
    row(
        "heads",
        format!(
            "{} of {}, {} for keys and values",
            config.n_heads,
            config.head_dim,
            config.n_kv_heads.iter().max().unwrap_or(&0)
        ),
    );
    row(
        "context",
        format!(
            "{} tokens, made for {}",
            session.n_ctx(),
            config.n_ctx_train
        ),
    );
    row("tokenizer", tokenizer(model));
    row("chat template", template(model));
    row(
        "memory",
        format!(
            "{} weights + {} keys and values when the context is full",
            ui::bytes(info.weight_bytes),
            ui::bytes(kv_bytes(session, kv))
        ),
    );
    row("backend", model.backend().name().to_owned());
    row("threads", model.n_threads().to_string());
    format!("Model\n{card}")
}

/// Every value with its source.
pub fn sampling(settings: &Settings) -> String {
    let rows = settings.rows();
    let width = rows
        .iter()
        .map(|row| row.value.len().min(12))
        .max()
        .unwrap_or(0);
    let lines = rows
        .iter()
        .map(|row| format!("  {:<18} {:<width$}  {}\n", row.name, row.value, row.source));
    lines.collect()
}

/// Bytes of keys and values of a full context.
fn kv_bytes(session: &Session, kv: KvTypes) -> u64 {
    let config = &session.model().info().config;
    let heads: usize = config.n_kv_heads.iter().sum();
    let bytes = heads as u64 * kv.row_bytes(config.head_dim) as u64;
    bytes * session.n_ctx() as u64
}

/// Bytes of each format, largest first.
fn mix(model: &Model) -> String {
    let mut types = BTreeMap::<String, u64>::new();
    for tensor in model.gguf().tensors() {
        *types.entry(tensor.dtype.to_string()).or_default() += tensor.bytes as u64;
    }
    let total: u64 = types.values().sum::<u64>().max(1);
    let mut types: Vec<_> = types.into_iter().collect();
    types.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let parts = types
        .into_iter()
        .map(|(name, bytes)| format!("{name} {:.1} %", 100.0 * bytes as f64 / total as f64));
    parts.collect::<Vec<_>>().join(", ")
}

fn tokenizer(model: &Model) -> String {
    let meta = model.gguf().metadata();
    let name = |key: &str| {
        meta.opt_str(key)
            .ok()
            .flatten()
            .unwrap_or("none")
            .to_owned()
    };
    match model.tokenizer() {
        Ok(tokenizer) => {
            let bos = if tokenizer.add_bos() {
                ", begins with BOS"
            } else {
                ""
            };
            let (kind, pre) = (name("tokenizer.ggml.model"), name("tokenizer.ggml.pre"));
            format!("{kind}, {pre}, {} tokens{bos}", tokenizer.n_vocab())
        }
        Err(error) => error.to_string(),
    }
}

/// The family by the markers it writes.
fn template(model: &Model) -> String {
    let Some(template) = model.tokenizer().ok().and_then(|t| t.chat_template()) else {
        return "none: a base model, for `kinglet run --raw`".into();
    };
    let families = [
        ("<|im_start|>", "ChatML"),
        ("<start_of_turn>", "Gemma"),
        ("<|start_header_id|>", "Llama 3"),
        ("[INST]", "Mistral"),
        ("<|user|>", "Zephyr"),
    ];
    let family = families
        .iter()
        .find(|(marker, _)| template.contains(marker));
    let family = family.map_or("its own markers", |(_, name)| name);
    format!("{family}, {} bytes", template.len())
}

fn json(session: &Session, kv: KvTypes, settings: &Settings) -> serde_json::Value {
    let model = session.model();
    let info = model.info();
    let config = &info.config;
    let rows = settings.rows().into_iter().map(|row| {
        let value = json!({ "value": row.value, "source": row.source.to_string() });
        (row.name.to_owned(), value)
    });
    json!({
        "name": info.name,
        "file": model.gguf().path().display().to_string(),
        "architecture": config.architecture,
        "n_params": info.n_params,
        "weight_bytes": info.weight_bytes,
        "n_layers": config.n_layers,
        "hidden": config.hidden,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "n_vocab": config.n_vocab,
        "n_ctx": session.n_ctx(),
        "n_ctx_train": config.n_ctx_train,
        "kv_bytes": kv_bytes(session, kv),
        "tokenizer": tokenizer(model),
        "chat_template": template(model),
        "sampling": rows.collect::<Map<_, _>>(),
        "recommended": model.recommended() == *settings,
    })
}
