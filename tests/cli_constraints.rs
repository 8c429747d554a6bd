//! `kinglet run` with a schema, a grammar, tools; `kinglet embed`.
#![cfg(all(feature = "cli", feature = "grammar"))]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn scratch(name: &str, text: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-constraints");
    std::fs::create_dir_all(&folder).expect("a folder for tests");
    let path = folder.join(name);
    std::fs::write(&path, text).expect("the folder is ours");
    path
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kinglet"))
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("KINGLET_MODEL")
        .stdin(Stdio::null())
        .output()
        .expect("the program was built")
}

fn json_of(args: &[&str]) -> Value {
    let output = run(args);
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{err}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn replies_are_json_by_a_schema_or_texts_of_a_grammar() {
    let schema = r#"{"type":"object","properties":{"ok":{"type":"boolean"},"n":{"type":"integer","minimum":0,"maximum":99}},"required":["ok","n"],"additionalProperties":false}"#;
    let file = scratch("schema.json", schema);
    let file = file.to_str().expect("UTF-8");
    let ask = [
        "run", "-q", "-p", "Well?", "-n", "60", "--temp", "2", "--seed", "3",
    ];
    for given in [schema, file] {
        let reply = json_of(&[&ask[..], &["-j", given]].concat());
        assert!(
            reply["ok"].is_boolean() && reply["n"].as_u64().is_some_and(|n| n < 100),
            "{reply}"
        );
    }
    let grammar = scratch("grammar.lark", "start: \"yes\" | \"no\"\n");
    let output = run(&[&ask[..], &["--grammar", grammar.to_str().expect("UTF-8")]].concat());
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(["yes\n", "no\n"].contains(&&*out), "{out}");

    let bad = run(&[&ask[..], &["-j", r#"{"properties":{"a":{"type":"text"}}}"#]].concat());
    let err = String::from_utf8_lossy(&bad.stderr).into_owned();
    assert_eq!(bad.status.code(), Some(2), "{err}");
    assert!(
        err.starts_with("error: JSON schema at `/properties/a`"),
        "{err}"
    );
    assert_eq!(
        run(&[&ask[..], &["-j", "no-such-file"]].concat())
            .status
            .code(),
        Some(5)
    );
}

#[test]
fn calls_are_told_apart() {
    let tools = json!([{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]);
    let tools = scratch("tools.json", &tools.to_string());
    let call = r#"<|tool_call_start|>[sky(at='nöon', n=2)]<|tool_call_end|>"#;
    let grammar = scratch(
        "call.lark",
        &format!("start: {}", json!(format!("Hm. {call}"))),
    );
    let [tools, grammar] = [&tools, &grammar].map(|path| path.to_str().expect("UTF-8"));
    let ask = ["run", "-q", "-p", "How is the sky?", "--grammar", grammar];
    let with_tools = [&ask[..], &["--tools", tools]].concat();
    let reply = json_of(&[&with_tools[..], &["--json"]].concat());
    assert_eq!(reply["text"], "Hm. ");
    let arguments = json!({"at": "nöon", "n": 2});
    assert_eq!(
        reply["tool_calls"],
        json!([{"name": "sky", "arguments": arguments}])
    );
    let out = run(&with_tools).stdout;
    assert_eq!(
        String::from_utf8_lossy(&out),
        "Hm. \n{\"name\":\"sky\",\"arguments\":{\"at\":\"nöon\",\"n\":2}}\n"
    );
    let without = json_of(&[&ask[..], &["--json"]].concat());
    assert_eq!(without["text"], format!("Hm. {call}"));
    assert_eq!(without["tool_calls"], json!([]));
    let bad = scratch("bad.json", "{}");
    let bad = run(&[&ask[..], &["--tools", bad.to_str().expect("UTF-8")]].concat());
    assert_eq!(bad.status.code(), Some(2));
}

#[test]
fn texts_become_vectors() {
    let output = run(&["embed", "-p", "A fox.", "-p", "naïve", "--pooling", "last"]);
    assert!(output.status.success());
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    let lines: Vec<Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).expect("JSON"))
        .collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["text"], "naïve");
    for line in lines {
        let vector = line["embedding"].as_array().expect("a vector");
        let length: f64 = vector
            .iter()
            .map(|x| x.as_f64().expect("a number").powi(2))
            .sum();
        assert!(
            (length - 1.0).abs() < 1e-3 && vector.len() > 100,
            "{length}"
        );
    }
    let output = run(&["embed", "-p", "A fox.", "--pooling", "none"]);
    let line: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let vectors = line["embedding"].as_array().expect("vectors");
    assert_eq!(Some(vectors.len() as u64), line["n_tokens"].as_u64());
    assert!(
        vectors
            .iter()
            .all(|v| v.as_array().is_some_and(|v| v.len() > 100))
    );
    let none = run(&["embed", "-p", ""]);
    assert!([Some(0), Some(2)].contains(&none.status.code()));
}
