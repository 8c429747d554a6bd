//! Calls of tools in replies: each family's syntax, whatever pieces the text comes in; what is no call stays as it was.

use std::ops::ControlFlow;
use std::path::Path;

use kinglet::sampler::{Sampler, Settings};
use kinglet::session::{Chat, Event, GenerateOptions};
use kinglet::tokenizer::Message;
use kinglet::tools::{Part, ToolCall, ToolParser};
use kinglet::{LoadOptions, Model, Session, SessionOptions};
use proptest::prelude::*;
use serde_json::{Value, json};

/// All at once.
fn parse(text: &str) -> Vec<Part> {
    let (mut parser, mut parts) = (ToolParser::default(), Vec::new());
    parser.push(text, &mut parts);
    parser.finish(&mut parts);
    parts
}

fn call(name: &str, arguments: Value) -> Part {
    let Value::Object(arguments) = arguments else {
        panic!("arguments have names")
    };
    Part::Call(ToolCall {
        name: name.into(),
        arguments,
    })
}

fn text(text: &str) -> Part {
    Part::Text(text.into())
}

/// Texts with what is in them.
fn cases() -> Vec<(String, Vec<Part>)> {
    let lfm2 = |calls: &str| format!("<|tool_call_start|>{calls}<|tool_call_end|>");
    let hermes = |call: &str| format!("<tool_call>\n{call}\n</tool_call>");
    let weather = || call("get_weather", json!({"city": "Zürich", "days": 3}));
    vec![
        (
            lfm2(r#"[get_weather(city="Zürich", days=3)]"#),
            vec![weather()],
        ),
        (
            format!(
                "Let me look.\n{}Done.",
                lfm2("[get_weather(city='Zürich', days=3), now()]")
            ),
            vec![
                text("Let me look.\n"),
                weather(),
                call("now", json!({})),
                text("Done."),
            ],
        ),
        (
            lfm2(r#"[{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}]"#),
            vec![weather()],
        ),
        (
            lfm2(r#"get_weather(city="Zürich", days=3)"#),
            vec![weather()],
        ),
        (
            lfm2(
                r#"[a.b(x=[1, -2.5, 1e3, (1, 2), (3,), (4), ()], y={"k": True, 'l': None}, z='it\'s "so"\n\u00e9\x41', w="""a"b""", )]"#,
            ),
            vec![call(
                "a.b",
                json!({"x": [1, -2.5, 1000.0, [1, 2], [3], 4, []], "y": {"k": true, "l": null}, "z": "it's \"so\"\né\u{41}", "w": "a\"b"}),
            )],
        ),
        (
            lfm2(r#"[f(x="<|tool_call_start|>[g()]", y="a" 'b')]"#),
            vec![call(
                "f",
                json!({"x": "<|tool_call_start|>[g()]", "y": "ab"}),
            )],
        ),
        (
            lfm2("[big(n=18446744073709551615, m=1_000, h=+5, smile='\\ud83d\\ude00')]"),
            vec![call(
                "big",
                json!({"n": u64::MAX, "m": 1000, "h": 5, "smile": "😀"}),
            )],
        ),
        (
            hermes(r#"{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}"#),
            vec![weather()],
        ),
        (
            format!(
                "é {} and {}",
                hermes(r#"{"name": "a", "arguments": "{\"x\": 1}"}"#),
                hermes(r#"{"name": "b", "parameters": {"y": "</b>"}}"#)
            ),
            vec![
                text("é "),
                call("a", json!({"x": 1})),
                text(" and "),
                call("b", json!({"y": "</b>"})),
            ],
        ),
        (
            hermes(r#"{"function": {"name": "a", "arguments": {}}}"#),
            vec![call("a", json!({}))],
        ),
        (
            hermes(r#"[{"name": "a"}, {"name": "b", "arguments": null}]"#),
            vec![call("a", json!({})), call("b", json!({}))],
        ),
        // The last mark did not come.
        (
            "<tool_call>{\"name\": \"a\", \"arguments\": {}}".into(),
            vec![call("a", json!({}))],
        ),
        (
            "<|tool_call_start|>[f(x=1)]".into(),
            vec![call("f", json!({"x": 1}))],
        ),
        // No calls: every sign stays.
        (
            "a < b, <tool_cal, <|tool_call_star and <".into(),
            vec![text("a < b, <tool_cal, <|tool_call_star and <")],
        ),
        (
            "x<tool_call>{\"name\": \"a\", \"argum".into(),
            vec![text("x<tool_call>{\"name\": \"a\", \"argum")],
        ),
        (
            "</tool_call> <|tool_call_end|>".into(),
            vec![text("</tool_call> <|tool_call_end|>")],
        ),
        (String::new(), vec![]),
    ]
}

/// What is none, of either kind.
const BROKEN: &[&str] = &[
    "",
    "[]",
    "[f(]",
    "[f(1)]",
    "[f(x=1)",
    "[f(x=1) g()]",
    "[f(x=1)] more",
    "[f(x=1, x=2)]",
    "[f(x=y)]",
    "[f(x=__import__('os'))]",
    "[f(x=1+1)]",
    "[f(x='a)]",
    "[f(x='\\ud83d')]",
    "[f(x='\\xg1')]",
    "[f(x=nan)]",
    "[f(x=1.2.3)]",
    "[1f(x=1)]",
    "[f(x={1: 2})]",
    "[f,]",
    "7",
    "{\"name\": 7}",
    "{\"name\": \"\"}",
    "{\"name\": \"a\", \"arguments\": 7}",
    "{\"name\": \"a\", \"arguments\": \"{\"}",
    "[{\"name\": \"a\"}, 7]",
];

#[test]
fn each_syntax_is_read() {
    for (written, parts) in cases() {
        assert_eq!(parse(&written), parts, "{written}");
    }
    for inner in BROKEN {
        for written in [
            format!("a<|tool_call_start|>{inner}<|tool_call_end|>b"),
            format!("a<tool_call>{inner}</tool_call>b"),
        ] {
            assert_eq!(parse(&written), [text(&written)], "{written}");
        }
    }
    let deep = format!(
        "<tool_call>[f(x={}1{})]</tool_call>",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert_eq!(parse(&deep), [text(&deep)]);
    let long = format!("<tool_call>{}", "x".repeat(3 << 20));
    assert_eq!(parse(&long), [text(&long)]);
}

/// In pieces; neighbouring texts joined. Whether text came as early as it could.
fn in_pieces<'a>(pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let (mut parser, mut parts) = (ToolParser::default(), Vec::new());
    let mut out: Vec<Part> = Vec::new();
    let mut join = |parts: &mut Vec<Part>| {
        for part in parts.drain(..) {
            match (out.last_mut(), part) {
                (Some(Part::Text(before)), Part::Text(more)) => before.push_str(&more),
                (_, part) => out.push(part),
            }
        }
    };
    for piece in pieces {
        parser.push(piece, &mut parts);
        join(&mut parts);
    }
    parser.finish(&mut parts);
    join(&mut parts);
    out
}

#[test]
fn a_stream_cut_anywhere_is_the_same() {
    let mut all: Vec<String> = cases().into_iter().map(|(written, _)| written).collect();
    all.extend(
        BROKEN
            .iter()
            .map(|b| format!("a<|tool_call_start|>{b}<|tool_call_end|>b")),
    );
    for written in all {
        let expected = in_pieces([&*written]);
        let cuts: Vec<usize> = written.char_indices().map(|(at, _)| at).collect();
        for &cut in &cuts {
            let (a, b) = written.split_at(cut);
            assert_eq!(in_pieces([a, b]), expected, "{a:?} {b:?}");
        }
        let ends = cuts.iter().skip(1).copied().chain([written.len()]);
        let single = cuts.iter().zip(ends).map(|(a, b)| &written[*a..b]);
        assert_eq!(in_pieces(single), expected);
    }
}

#[test]
fn text_is_not_held_longer_than_it_may_be_a_mark() {
    let (mut parser, mut parts) = (ToolParser::default(), Vec::new());
    parser.push("if a <", &mut parts);
    assert_eq!(parts, [text("if a ")]);
    parser.push(" b <tool_", &mut parts);
    assert_eq!(parts, [text("if a < b ")]);
    parser.push("call>{\"name\":\"x\"}</tool_call>y", &mut parts);
    assert_eq!(parts, [text("if a < b "), call("x", json!({})), text("y")]);
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        // Sixty-fourths: their decimals are read back exactly.
        (-1_000_000..1_000_000i32).prop_map(|n| Value::from(f64::from(n) / 64.0)),
        ".{0,12}".prop_map(Value::from),
        "[<>|a-z_/'\"\\\\ \n]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,4}", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

/// As Python would print it.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Array(items) => format!(
            "[{}]",
            items.iter().map(python).collect::<Vec<_>>().join(", ")
        ),
        Value::Object(fields) => {
            let fields = fields
                .iter()
                .map(|(k, v)| format!("{}: {}", python(&json!(k)), python(v)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

proptest! {
    #[test]
    fn any_arguments_come_back(
        arguments in prop::collection::btree_map("[a-z_]{1,6}", value(), 0..4),
        name in "[a-z_]{1,8}",
        before in "[^<]{0,10}",
        cuts in prop::collection::vec(0..400usize, 0..8),
    ) {
        let arguments: serde_json::Map<String, Value> = arguments.into_iter().collect();
        let expected = call(&name, Value::Object(arguments.clone()));
        let named = arguments.iter().map(|(k, v)| format!("{k}={}", python(v)));
        let named = named.collect::<Vec<_>>().join(", ");
        let json = json!({"name": name, "arguments": arguments}).to_string();
        // What a JSON writer would not do: a mark within an argument ends the call there.
        prop_assume!(!json.contains("</tool_call>") && !named.contains("<|tool_call_end|>"));
        for written in [
            format!("{before}<|tool_call_start|>[{name}({named})]<|tool_call_end|>"),
            format!("{before}<tool_call>{json}</tool_call>"),
        ] {
            let mut cuts: Vec<usize> = cuts.iter().map(|c| written.floor_char_boundary(*c)).collect();
            cuts.extend([0, written.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|w| &written[w[0]..w[1]]);
            let found = in_pieces(pieces);
            let mut whole = Vec::new();
            if !before.is_empty() {
                whole.push(text(&before));
            }
            whole.push(expected.clone());
            prop_assert_eq!(found, whole, "{}", written);
        }
    }

    #[test]
    fn any_text_comes_back_or_is_a_call(written in "(<tool_call>|</tool_call>|<\\|tool_call_start\\|>|<\\|tool_call_end\\|>|[\\[\\](){}<a-c=,'\"\\\\:1 é]){0,24}") {
        let parts = parse(&written);
        if parts.iter().all(|part| matches!(part, Part::Text(_))) {
            let joined: String = parts.iter().map(|part| match part {
                Part::Text(text) => &**text,
                Part::Call(_) => "",
            }).collect();
            prop_assert_eq!(joined, written);
        }
    }
}

/// A reply whose text is a call: made certain by a grammar, where the model is too small to call anything by itself.
#[cfg(feature = "grammar")]
#[test]
fn a_reply_tells_calls_from_text() {
    use kinglet::grammar::ReplyFormat;
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/lfm2-smol-Q4_0.gguf");
    let model = Model::load(&path, &options).expect("a model");
    let options = SessionOptions {
        n_ctx: 1024,
        ..SessionOptions::default()
    };
    let mut chat = Chat::new(Session::new(&model, &options).expect("room")).expect("a template");
    let tools = json!([{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]);
    assert!(chat.set_tools(Some(json!({}))).is_err());
    chat.set_tools(Some(tools)).expect("a list");
    let written =
        "One moment.<tool_call>{\"name\": \"sky\", \"arguments\": {\"at\": \"nöon\"}}</tool_call>";
    let grammar = format!("start: {}", json!(written));
    let constraint = model
        .constraint(&ReplyFormat::Lark(&grammar))
        .expect("a grammar");
    let options = GenerateOptions {
        max_tokens: Some(200),
        constraint: Some(constraint),
        ..GenerateOptions::default()
    };
    let mut sampler = Sampler::new(&Settings::default());
    let (mut texts, mut calls, mut n_events) = (String::new(), Vec::new(), 0);
    let reply = chat.send("How is the sky?", &mut sampler, &options, &mut |event| {
        match event {
            Event::Prefill { .. } => return ControlFlow::Continue(()),
            Event::Text(text) => texts.push_str(text),
            Event::Call(call) => calls.push(call.clone()),
        }
        n_events += 1;
        ControlFlow::Continue(())
    });
    let reply = reply.expect("a reply");
    assert_eq!(reply.text, "One moment.");
    assert_eq!(reply.written.as_deref(), Some(written));
    assert_eq!((&texts, &calls), (&reply.text, &reply.calls));
    assert_eq!(n_events, reply.tokens.len());
    assert_eq!(
        calls,
        [ToolCall {
            name: "sky".into(),
            arguments: json!({"at": "nöon"}).as_object().expect("one").clone()
        }]
    );
    // This template knows of no calls: they are in the message as they were written.
    assert_eq!(chat.messages()[1].content, written);
    let answer = Message::new("tool", "{\"sky\": \"blue\"}");
    let options = GenerateOptions {
        max_tokens: Some(3),
        ..GenerateOptions::default()
    };
    let on = &mut |_: Event| ControlFlow::Continue(());
    let reply = chat
        .answer(vec![answer.clone()], &mut sampler, &options, on)
        .expect("a reply");
    assert!(reply.calls.is_empty() && reply.written.is_none());
    assert_eq!(chat.messages()[2], answer);
    // Without tools nothing is looked for.
    chat.set_tools(None).expect("none");
    chat.clear();
    let constraint = model
        .constraint(&ReplyFormat::Lark(&grammar))
        .expect("a grammar");
    let options = GenerateOptions {
        constraint: Some(constraint),
        ..options
    };
    let options = GenerateOptions {
        max_tokens: Some(200),
        ..options
    };
    let reply = chat
        .send("How is the sky?", &mut sampler, &options, on)
        .expect("a reply");
    assert_eq!((&*reply.text, reply.calls.len()), (written, 0));
}
