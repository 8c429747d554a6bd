//! The tokenizer against llama.cpp's ids, against the `tokenizers` crate, and its own laws.

use kinglet::Error;
use kinglet::gguf::{Array, Gguf, Metadata, StringArray, Value};
use kinglet::tokenizer::{Special, TokenType, Tokenizer, Vocab};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
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

/// The model that lies in the repository; its vocabulary is SmolLM2's.
static MODEL: LazyLock<Gguf> = LazyLock::new(|| {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/lfm2-smol-Q4_0.gguf");
    Gguf::open(&path).unwrap_or_else(|e| panic!("{e}"))
});

static SMOL: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_gguf(&MODEL).unwrap());

/// SmolLM2's vocabulary under another pre-tokenizer.
fn smol_with(pre: &str) -> Tokenizer {
    let mut vocab = Vocab::from_metadata(MODEL.metadata()).unwrap();
    vocab.pre = pre.into();
    Tokenizer::new(vocab).unwrap()
}

/// A SentencePiece vocabulary that spells whatever it is given: a few words, pieces that merge into them, all bytes.
fn sentence_pieces(add_space_prefix: bool) -> Tokenizer {
    let special = [
        ("<unk>", TokenType::Unknown),
        ("<s>", TokenType::Control),
        ("</s>", TokenType::Control),
    ];
    let mut tokens: Vec<(String, TokenType, f32)> = special
        .iter()
        .map(|&(text, token_type)| (text.to_owned(), token_type, 0.0))
        .collect();
    tokens.extend((0..=255).map(|b| (format!("<0x{b:02X}>"), TokenType::Byte, 0.0)));
    tokens.push(("\n\n".into(), TokenType::UserDefined, 0.0));
    let texts = [
        "\u{2581}",
        "a",
        "b",
        "ab",
        "\u{2581}a",
        "\u{2581}ab",
        "aba",
        "\u{2581}\u{2581}",
        "é",
        "b\u{2581}a",
    ];
    for (i, text) in texts.into_iter().enumerate() {
        tokens.push((text.into(), TokenType::Normal, -(i as f32)));
    }
    Tokenizer::new(Vocab {
        model: "llama".into(),
        tokens: StringArray::from_strings(tokens.iter().map(|t| &t.0)).unwrap(),
        types: tokens.iter().map(|t| t.1).collect(),
        scores: tokens.iter().map(|t| t.2).collect(),
        add_space_prefix: Some(add_space_prefix),
        ..Vocab::default()
    })
    .unwrap()
}

#[test]
fn equals_llama_cpp_on_tricky_texts() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer");
    for (name, special) in [
        ("smollm2-text.json", Special::Text),
        ("smollm2-parse.json", Special::Parse),
    ] {
        let goldens = goldens(&folder.join(name));
        assert!(goldens.len() > 200);
        compare(&SMOL, &goldens, special, name);
    }
}

/// Text of many kinds: prose, code, white space, digits, scripts, look-alikes of control tokens. No control characters:
/// SmolLM2 has no tokens for some of them.
fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "\\PC{0,60}",
        "[ \\n\\r\\ta-zA-Z0-9'.,;(){}=<>|_-]{0,80}",
        "([a-z]{1,8}[ ,.]){0,30}",
        "[ \\n\\t]{0,40}[é字한أ\u{1F600}\u{301}\u{3000}0-9٣]{0,30}",
        "a{0,200}",
        prop::collection::vec(
            prop::sample::select(
                &[
                    "<|im_end|>",
                    "<|im_",
                    "start|>",
                    "<|endoftext|>",
                    "</s>",
                    "<s>",
                    "a",
                    " ",
                    "\n"
                ][..]
            ),
            0..12
        )
        .prop_map(|parts| parts.concat()),
    ]
    // Planes 4 to 15 hold no characters; SmolLM2 lacks two bytes of theirs.
    .prop_map(|text| text.replace(|c| ('\u{40000}'..='\u{BFFFF}').contains(&c), ""))
}

/// Cases of a property; what fails is printed, not filed.
fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config(400))]
    #[test]
    fn decoding_gives_the_text_back(text in any_text()) {
        for pre in ["smollm", "lfm2", "qwen2", "gpt-2", "default"] {
            let tokenizer = smol_with_cached(pre);
            let ids = tokenizer.encode(&text, Special::Text);
            prop_assert_eq!(&tokenizer.decode(&ids), &text, "{}", pre);
            prop_assert!(!ids.iter().any(|&id| tokenizer.is_control(id)), "{}", pre);
        }
        for add_space_prefix in [false, true] {
            // The prefix comes again after each user-defined token, so such a text does not come back.
            if add_space_prefix && text.contains("\n\n") {
                continue;
            }
            let tokenizer = sentence_pieces(add_space_prefix);
            let ids = tokenizer.encode(&text, Special::Text);
            // U+2581 is how SentencePiece spells a space.
            prop_assert_eq!(tokenizer.decode(&ids), text.replace('\u{2581}', " "));
            prop_assert!(!ids.iter().any(|&id| tokenizer.is_control(id)));
        }
    }

    #[test]
    fn a_stream_equals_the_whole(ids in prop::collection::vec(0..49_152u32, 0..40), bytes in any_text()) {
        let spelled = sentence_pieces(false);
        let ids_of_bytes: Vec<u32> = bytes.bytes().map(|b| 3 + u32::from(b)).rev().collect();
        for (tokenizer, ids) in [(&*SMOL, &ids), (&spelled, &ids_of_bytes)] {
            let mut stream = tokenizer.stream();
            let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text += &stream.flush();
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id).into_owned()).collect();
            prop_assert_eq!(&text, &String::from_utf8_lossy(&bytes));
            prop_assert_eq!(&text, &tokenizer.decode(ids));
        }
    }
}

fn smol_with_cached(pre: &str) -> &'static Tokenizer {
    static ALL: LazyLock<Vec<(&str, Tokenizer)>> = LazyLock::new(|| {
        ["smollm", "lfm2", "qwen2", "gpt-2", "default"]
            .map(|pre| (pre, smol_with(pre)))
            .into()
    });
    &ALL.iter().find(|(name, _)| *name == pre).unwrap().1
}

/// The `tokenizers` crate, built from the same data.
mod oracle {
    use super::MODEL;
    use tokenizers::models::bpe::{BPE, Vocab};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::digits::Digits;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{SplitDelimiterBehavior, Tokenizer};

    pub fn of(pre: &str) -> Tokenizer {
        let strings = |key| MODEL.metadata().strings(key).unwrap();
        let tokens = strings("tokenizer.ggml.tokens");
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let vocab: Vocab = (0u32..)
            .zip(tokens.iter())
            .map(|(id, token)| (text(token), id))
            .collect();
        let pair = |merge: &[u8]| {
            let merge = text(merge);
            let (left, right) = merge.split_once(' ').unwrap();
            (left.to_owned(), right.to_owned())
        };
        let merges = strings("tokenizer.ggml.merges").iter().map(pair).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre == "lfm2")
            .build()
            .unwrap();
        let mut tokenizer = Tokenizer::new(bpe);
        let llama3 = |digits| {
            let pattern = format!(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            );
            Split::new(
                SplitPattern::Regex(pattern),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .unwrap()
        };
        let bytes = ByteLevel::new(false, false, false);
        let sequence = match pre {
            "lfm2" => vec![llama3("{1,3}").into(), bytes.into()],
            "qwen2" => vec![llama3("").into(), bytes.into()],
            "gpt-2" => vec![bytes.use_regex(true).into()],
            _ => vec![Digits::new(true).into(), bytes.use_regex(true).into()],
        };
        tokenizer.with_pre_tokenizer(Some(Sequence::new(sequence)));
        tokenizer
    }
}

proptest! {
    #![proptest_config(config(1500))]
    #[test]
    fn equals_the_tokenizers_crate(text in any_text()) {
        static ORACLES: LazyLock<Vec<(&str, tokenizers::Tokenizer)>> =
            LazyLock::new(|| ["smollm", "lfm2", "qwen2", "gpt-2"].map(|pre| (pre, oracle::of(pre))).into());
        // It knows a newer Unicode, and takes the long s for an s.
        static NEWER: LazyLock<fancy_regex::Regex> =
            LazyLock::new(|| fancy_regex::Regex::new(r"[^\p{age=15.1}]|\u{17F}").unwrap());
        prop_assume!(!NEWER.is_match(&text).unwrap());
        for (pre, oracle) in ORACLES.iter() {
            let expected = oracle.encode_fast(text.as_str(), false).unwrap();
            prop_assert_eq!(&*smol_with_cached(pre).encode(&text, Special::Text), expected.get_ids(), "{}", pre);
        }
    }
}

#[test]
fn special_tokens_are_parsed_only_on_request() {
    let ids = SMOL.encode("<|im_start|>x<|im_end|>", Special::Parse);
    assert_eq!((ids[0], ids[2], ids.len()), (1, 2, 3));
    assert!(
        SMOL.encode("<|im_start|>x<|im_end|>", Special::Text)
            .iter()
            .all(|&id| id > 16)
    );
    assert!(SMOL.is_end(2) && SMOL.is_end(0) && !SMOL.is_end(1));
    assert_eq!(SMOL.token_text(2), "<|im_end|>");
    assert_eq!(SMOL.decode(&ids), "x");
    let mut shown = SMOL.stream().show_special(true);
    assert_eq!(
        ids.iter().map(|&id| shown.push(id)).collect::<String>(),
        "<|im_start|>x<|im_end|>"
    );
    assert_eq!(
        (&*SMOL.token_bytes(u32::MAX), SMOL.token_text(49_152)),
        (&b""[..], String::new())
    );
}

#[test]
fn a_bos_is_added_once() {
    let with = |add_bos, add_eos| {
        let mut vocab = Vocab::from_metadata(MODEL.metadata()).unwrap();
        (vocab.add_bos, vocab.add_eos) = (Some(add_bos), Some(add_eos));
        Tokenizer::new(vocab).unwrap()
    };
    let ids = |add_bos, add_eos, text| with(add_bos, add_eos).encode_with_bos(text, Special::Parse);
    let x = SMOL.encode("x", Special::Text)[0];
    assert_eq!(ids(false, false, "x"), [x]);
    assert_eq!(ids(true, true, "x"), [1, x, 2]);
    assert_eq!(ids(true, true, "<|im_start|>x<|im_end|>"), [1, x, 2]);
    assert_eq!(ids(true, false, ""), [1]);
    assert_eq!(SMOL.encode_with_bos("x", Special::Text), [x]);
}

#[test]
fn sentence_pieces_merge_by_score() {
    let tokenizer = sentence_pieces(true);
    let texts = |text: &str| -> Vec<String> {
        tokenizer
            .encode(text, Special::Text)
            .iter()
            .map(|&id| tokenizer.token_text(id))
            .collect()
    };
    assert_eq!(texts("ab"), [" ab"]);
    // `ab` has the highest score, then ` a`: `aba` never comes to be.
    assert_eq!(texts("ab aba"), [" ab", " ab", "a"]);
    assert_eq!(texts("é€"), [" ", "é", "<0xE2>", "<0x82>", "<0xAC>"]);
    assert_eq!(texts("a\n\nb\n"), [" a", "\n\n", " ", "b", "<0x0A>"]);
    // Byte and control tokens are not spelled by text.
    assert_eq!(
        tokenizer.decode(&tokenizer.encode("<0x41></s>", Special::Text)),
        "<0x41></s>"
    );
    assert_eq!(tokenizer.encode("a</s>", Special::Parse).last(), Some(&2));
    // A long text without a cut merges through the heap, to the same end.
    let long = "ab".repeat(400);
    assert_eq!(texts(&long).concat(), format!(" {long}"));
    assert!(texts(&long)[1..].iter().all(|t| t == "ab"));
}

#[test]
fn other_kinds_are_named_with_what_is_supported() {
    let with = |model: &str, pre: &str| {
        let mut vocab = Vocab::from_metadata(MODEL.metadata()).unwrap();
        (vocab.model, vocab.pre) = (model.into(), pre.into());
        Tokenizer::new(vocab).err().unwrap()
    };
    let err = with("bert", "");
    assert!(matches!(
        err,
        Error::Unsupported {
            kind: "tokenizer",
            ..
        }
    ));
    assert_eq!(
        err.to_string(),
        "unsupported tokenizer `bert`; supported: gpt2, llama"
    );
    let err = with("gpt2", "tekken");
    assert!(matches!(
        err,
        Error::Unsupported {
            kind: "pre-tokenizer",
            ..
        }
    ));
    assert!(
        err.to_string().contains("`tekken`") && err.to_string().contains("smollm"),
        "{err}"
    );
}

#[test]
fn contradictions_are_errors_that_name_the_key() {
    let base = || {
        let mut metadata = Metadata::new();
        metadata.set("tokenizer.ggml.model", Value::String("gpt2".into()));
        metadata.set("tokenizer.ggml.pre", Value::String("gpt-2".into()));
        metadata.set("tokenizer.ggml.tokens", strings(&["a", "b", "ab", "<s>"]));
        metadata.set(
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![1, 1, 1, 3])),
        );
        metadata.set("tokenizer.ggml.merges", strings(&["a b"]));
        metadata
    };
    fn strings(all: &[&str]) -> Value {
        Value::Array(Array::String(StringArray::from_strings(all).unwrap()))
    }
    let load = |metadata: &Metadata| Vocab::from_metadata(metadata).and_then(Tokenizer::new);
    assert_eq!(load(&base()).unwrap().encode("aab", Special::Text), [0, 2]);
    let cases: [(&str, Option<Value>, &[&str]); 12] = [
        ("tokenizer.ggml.model", None, &["tokenizer.ggml.model"]),
        ("tokenizer.ggml.tokens", None, &["tokenizer.ggml.tokens"]),
        ("tokenizer.ggml.merges", None, &["tokenizer.ggml.merges"]),
        (
            "tokenizer.ggml.tokens",
            Some(strings(&[])),
            &["at least one token"],
        ),
        (
            "tokenizer.ggml.tokens",
            Some(strings(&["a", "b", "a", ""])),
            &["distinct", "`a`", "0", "2"],
        ),
        (
            "tokenizer.ggml.token_type",
            Some(Value::Array(Array::I32(vec![1; 3]))),
            &["token_type", "4", "3"],
        ),
        (
            "tokenizer.ggml.token_type",
            Some(Value::Array(Array::I32(vec![1, 1, 7, 1]))),
            &["entry 2", "7"],
        ),
        (
            "tokenizer.ggml.token_type",
            Some(Value::Array(Array::I32(vec![1, 6, 1, 1]))),
            &["token 1", "<0x0A>", "`b`"],
        ),
        (
            "tokenizer.ggml.scores",
            Some(Value::Array(Array::F32(vec![f32::NAN; 4]))),
            &["scores", "NaN"],
        ),
        (
            "tokenizer.ggml.scores",
            Some(Value::Array(Array::F32(vec![0.0; 5]))),
            &["scores", "4", "5"],
        ),
        (
            "tokenizer.ggml.merges",
            Some(strings(&["a b", "ab"])),
            &["merges", "entry 1", "`ab`"],
        ),
        (
            "tokenizer.ggml.bos_token_id",
            Some(Value::U32(4)),
            &["bos_token_id", "below 4", "found 4"],
        ),
    ];
    for (key, value, words) in cases {
        let mut metadata = base();
        match value {
            Some(value) => metadata.set(key, value),
            None => drop(metadata.remove(key)),
        }
        let err = load(&metadata)
            .err()
            .unwrap_or_else(|| panic!("{key}: accepted"))
            .to_string();
        assert!(words.iter().all(|word| err.contains(word)), "{key}: {err}");
    }
}
