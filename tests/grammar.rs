//! Constraints: whatever the model prefers, the reply is a text of the schema or grammar; hostile ones end in an error.
#![cfg(feature = "grammar")]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kinglet::grammar::ReplyFormat;
use kinglet::sampler::{Constraint, Follow, Rng, Sampler, Settings, Source};
use kinglet::session::{Chat, Finish, GenerateOptions};
use kinglet::{Error, LoadOptions, Model, Session, SessionOptions};
use serde_json::{Value, json};

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| load(Path::new("models/lfm2-smol-Q4_0.gguf")))
}

fn load(path: &Path) -> Model {
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Model::load(&root.join(path), &options).expect("a model")
}

fn by_schema(model: &Model, schema: &Value) -> kinglet::Result<Arc<dyn Constraint>> {
    model.constraint(&ReplyFormat::JsonSchema(&schema.to_string()))
}

fn ids(allowed: &[u32]) -> Vec<u32> {
    let bits = allowed.iter().zip(0..);
    bits.flat_map(|(word, i)| {
        (0..32)
            .filter(move |b| word >> b & 1 == 1)
            .map(move |b| i * 32 + b)
    })
    .collect()
}

/// A walk that takes any token that is allowed, as a model that knows nothing. Its text, if it comes to an end.
fn walk(model: &Model, follow: &mut dyn Follow, rng: &mut Rng, most: usize) -> Option<String> {
    let tokenizer = model.tokenizer().expect("a vocabulary");
    let mut text = Vec::new();
    for _ in 0..most {
        if follow.is_complete() {
            return Some(String::from_utf8(text).expect("characters are whole"));
        }
        let allowed = ids(follow.allowed().expect("something may come"));
        let may_end = allowed.iter().any(|id| tokenizer.is_end(*id));
        for id in &allowed {
            let is_control = tokenizer.is_control(*id) && !tokenizer.is_end(*id);
            assert!(!is_control, "{}", tokenizer.token_text(*id));
        }
        // Long words are rare among tokens, so the end of a text is taken more often than by chance.
        if may_end && rng.next_f64() < 0.3 {
            return Some(String::from_utf8(text).expect("characters are whole"));
        }
        let token = allowed[(rng.next_f64() * allowed.len() as f64) as usize];
        if tokenizer.is_end(token) {
            return Some(String::from_utf8(text).expect("characters are whole"));
        }
        follow.accept(token).expect("it was allowed");
        text.extend_from_slice(&tokenizer.token_bytes(token));
    }
    None
}

/// Whether `value` is one of `schema`, by those of its rules that these tests use.
fn is_valid(schema: &Value, value: &Value, root: &Value) -> bool {
    let Some(rules) = schema.as_object() else {
        return schema.as_bool().expect("a schema");
    };
    let number = |key: &str| rules.get(key).and_then(Value::as_f64);
    let within = |x: f64, least: &str, most: &str| {
        number(least).is_none_or(|y| x >= y) && number(most).is_none_or(|y| x <= y)
    };
    rules.iter().all(|(rule, wanted)| match rule.as_str() {
        "type" => match wanted.as_str().expect("one type") {
            "integer" => value.as_i64().is_some(),
            "number" => value.is_number(),
            "string" => value.is_string(),
            "boolean" => value.is_boolean(),
            "null" => value.is_null(),
            "array" => value.is_array(),
            "object" => value.is_object(),
            other => panic!("{other}"),
        },
        "enum" => wanted.as_array().expect("a list").contains(value),
        "const" => wanted == value,
        "anyOf" => wanted
            .as_array()
            .expect("a list")
            .iter()
            .any(|s| is_valid(s, value, root)),
        "$ref" => {
            let at = wanted
                .as_str()
                .expect("a reference")
                .trim_start_matches('#');
            is_valid(root.pointer(at).expect("a definition"), value, root)
        }
        "minimum" | "maximum" => value
            .as_f64()
            .is_none_or(|x| within(x, "minimum", "maximum")),
        "minLength" | "maxLength" => value
            .as_str()
            .is_none_or(|s| within(s.chars().count() as f64, "minLength", "maxLength")),
        "minItems" | "maxItems" => value
            .as_array()
            .is_none_or(|a| within(a.len() as f64, "minItems", "maxItems")),
        "items" => value
            .as_array()
            .is_none_or(|a| a.iter().all(|v| is_valid(wanted, v, root))),
        "required" => value.as_object().is_none_or(|o| {
            let names = wanted.as_array().expect("names");
            names
                .iter()
                .all(|n| o.contains_key(n.as_str().expect("a name")))
        }),
        "properties" => value.as_object().is_none_or(|o| {
            o.iter()
                .all(|(k, v)| wanted.get(k).is_none_or(|s| is_valid(s, v, root)))
        }),
        "additionalProperties" => value.as_object().is_none_or(|o| {
            let known = rules.get("properties");
            o.iter().all(|(k, v)| {
                known.is_some_and(|p| p.get(k).is_some()) || is_valid(wanted, v, root)
            })
        }),
        "pattern" => value.as_str().is_none_or(|s| {
            let pattern = fancy_regex::Regex::new(wanted.as_str().expect("a pattern"));
            pattern.expect("a pattern").is_match(s).expect("it ends")
        }),
        "$defs" => true,
        other => panic!("the tests know no `{other}`"),
    })
}

fn schemas() -> Vec<Value> {
    let text = json!({"type": "string", "maxLength": 12});
    vec![
        json!({
            "type": "object",
            "properties": {
                "name": text,
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "is_new": {"type": "boolean"},
                "kind": {"enum": ["größe", "日本", "🦊", 7, null]},
                "marks": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 1, "maxItems": 3},
                "inner": {
                    "type": "object",
                    "properties": {"x": {"type": "null"}},
                    "required": ["x"],
                    "additionalProperties": false
                }
            },
            "required": ["name", "age", "kind", "marks", "inner"],
            "additionalProperties": false
        }),
        json!({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, {"const": {"a": ["b"]}}]}),
        json!({
            "$ref": "#/$defs/node",
            "$defs": {"node": {
                "type": "object",
                "properties": {"at": {"type": "integer", "minimum": 1, "maximum": 9}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["at", "next"],
                "additionalProperties": false
            }}
        }),
        json!({"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"}),
        json!({"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "properties": {"é": text}, "required": ["é"]}),
    ]
}

#[test]
fn a_model_that_knows_nothing_writes_what_the_schema_says() {
    let mut rng = Rng::new(3);
    for schema in schemas() {
        let constraint = by_schema(model(), &schema).expect("a sound schema");
        let mut n_ended = 0;
        for _ in 0..40 {
            let mut follow = constraint.start();
            let Some(text) = walk(model(), &mut *follow, &mut rng, 400) else {
                continue;
            };
            n_ended += 1;
            let value: Value =
                serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(is_valid(&schema, &value, &schema), "{text}: {schema}");
        }
        assert!(n_ended >= 10, "{n_ended} ended: {schema}");
    }
    // The judge is one.
    let schema = &schemas()[0];
    assert!(!is_valid(schema, &json!({"name": "x"}), schema));
    assert!(!is_valid(&schemas()[3], &json!("abc-1"), schema));
}

#[test]
fn it_may_end_only_where_the_text_is_one_of_the_grammar() {
    let grammar = "start: sum\nsum: product (\"+\" product)*\nproduct: atom (\"*\" atom)*\n\
                   atom: /[0-9]{1,3}/ | \"(\" sum \")\"\n";
    let constraint = model()
        .constraint(&ReplyFormat::Lark(grammar))
        .expect("a grammar");
    let tokenizer = model().tokenizer().expect("a vocabulary");
    let mut rng = Rng::new(5);
    let (mut n_may, mut n_may_not) = (0, 0);
    for _ in 0..30 {
        let mut follow = constraint.start();
        let mut text = String::new();
        for _ in 0..30 {
            let allowed = ids(follow.allowed().expect("something may come"));
            let may_end = allowed.iter().any(|id| tokenizer.is_end(*id));
            let depth = text.matches('(').count() as i32 - text.matches(')').count() as i32;
            let is_whole = depth == 0 && text.ends_with(|c: char| c.is_ascii_digit() || c == ')');
            assert_eq!(may_end, is_whole, "{text}");
            n_may += usize::from(may_end);
            n_may_not += usize::from(!may_end);
            let going_on: Vec<_> = allowed
                .iter()
                .filter(|id| !tokenizer.is_end(**id))
                .collect();
            let token = *going_on[(rng.next_f64() * going_on.len() as f64) as usize];
            follow.accept(token).expect("it was allowed");
            text.push_str(std::str::from_utf8(&tokenizer.token_bytes(token)).expect("ASCII"));
        }
    }
    assert!(n_may > 50 && n_may_not > 50, "{n_may}, {n_may_not}");
}

#[test]
fn going_back_and_apart_keeps_the_state() {
    let schema = &schemas()[0];
    let constraint = by_schema(model(), schema).expect("a sound schema");
    let mut rng = Rng::new(7);
    for _ in 0..6 {
        let mut follow = constraint.start();
        let mut tokens: Vec<u32> = Vec::new();
        for _ in 0..60 {
            if follow.is_complete() {
                break;
            }
            let allowed = follow.allowed().expect("something may come").to_vec();
            let mut fresh = constraint.start();
            tokens
                .iter()
                .for_each(|t| fresh.accept(*t).expect("it was allowed"));
            assert_eq!(allowed, fresh.allowed().expect("the same"));
            if rng.next_f64() < 0.3 {
                let n = (rng.next_f64() * tokens.len() as f64) as usize;
                let mut apart = follow.fork();
                apart.take_back(n).expect("there are so many");
                tokens.truncate(tokens.len() - n);
                // The one that it came from has not moved.
                assert_eq!(allowed, follow.allowed().expect("as before"));
                follow = apart;
                continue;
            }
            let choices = ids(&allowed);
            let tokenizer = model().tokenizer().expect("a vocabulary");
            let choices: Vec<_> = choices
                .into_iter()
                .filter(|id| !tokenizer.is_end(*id))
                .collect();
            let Some(token) = choices.get((rng.next_f64() * choices.len() as f64) as usize) else {
                break;
            };
            follow.accept(*token).expect("it was allowed");
            tokens.push(*token);
        }
        assert!(follow.take_back(tokens.len() + 1).is_err());
    }
}

fn hot(seed: &str) -> Sampler {
    let mut settings = Settings::default();
    for (name, value) in [("temp", "3"), ("seed", seed)] {
        settings.set(name, value, Source::Flag).expect("a value");
    }
    Sampler::new(&settings)
}

#[test]
fn replies_of_models_are_within_it() {
    let smollm2 = PathBuf::from(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut models = vec![model().clone()];
    match root.join(&smollm2).exists() {
        true => models.push(load(&smollm2)),
        false if std::env::var_os("KINGLET_REQUIRE_MODELS").is_some() => {
            panic!("{}: models/get-smollm2.sh brings it", smollm2.display())
        }
        false => eprintln!("skipped: no {}", smollm2.display()),
    }
    for model in models {
        let options = SessionOptions {
            n_ctx: 1024,
            ..SessionOptions::default()
        };
        let mut chat =
            Chat::new(Session::new(&model, &options).expect("room")).expect("a template");
        for (i, schema) in schemas().iter().enumerate() {
            let constraint = by_schema(&model, schema).expect("a sound schema");
            let options = GenerateOptions {
                max_tokens: Some(150),
                constraint: Some(constraint),
                ignore_end: i % 2 == 1,
                ..GenerateOptions::default()
            };
            let ask = |sampler: &mut Sampler, chat: &mut Chat, again: bool| {
                let on = &mut |_: kinglet::session::Event| ControlFlow::Continue(());
                let reply = match again {
                    true => chat
                        .regenerate(sampler, &options, on)
                        .map(|r| r.expect("one to replace")),
                    false => chat.send("Tell me about a fox.", sampler, &options, on),
                };
                reply.expect("a reply")
            };
            let mut sampler = hot("1");
            let reply = ask(&mut sampler, &mut chat, false);
            if reply.finish == Finish::Stop {
                let value = serde_json::from_str(&reply.text);
                let value = value.unwrap_or_else(|e| panic!("{}: {e}", reply.text));
                assert!(is_valid(schema, &value, schema), "{}", reply.text);
            } else {
                assert_eq!(reply.finish, Finish::Length, "{}", reply.text);
            }
            // Again, and in a conversation apart: the grammar begins anew.
            let mut apart = chat.fork().expect("room");
            let (mut one, mut other) = (hot("9"), hot("9"));
            let first = ask(&mut one, &mut chat, true);
            assert_eq!(first.text, ask(&mut other, &mut apart, true).text);
            chat.clear();
        }
    }
}

/// Compiles and follows a hostile source, in bounded time; what it said.
fn survive(name: &str, format: &ReplyFormat) -> Option<String> {
    let began = Instant::now();
    let said = match model().constraint(format) {
        Ok(constraint) => {
            let mut follow = constraint.start();
            let mut rng = Rng::new(1);
            let mut said = None;
            for _ in 0..20 {
                let allowed = match follow.allowed() {
                    Ok(allowed) => ids(allowed),
                    Err(e) => {
                        said = Some(e.to_string());
                        break;
                    }
                };
                let token = allowed[(rng.next_f64() * allowed.len() as f64) as usize];
                if follow.accept(token).is_err() || follow.is_complete() {
                    break;
                }
            }
            said
        }
        Err(Error::Grammar(what)) => {
            assert!(!what.contains('\n') && what.len() < 1000, "{name}: {what}");
            Some(what)
        }
        Err(other) => panic!("{name}: {other}"),
    };
    let time = began.elapsed();
    println!("{name}: {} ms, {said:?}", time.as_millis());
    assert!(time < Duration::from_secs(20), "{name}: {time:?}");
    said
}

#[test]
fn hostile_sources_end() {
    let schema = |name: &str, text: &str| survive(name, &ReplyFormat::JsonSchema(text));
    let nested = |n: usize| format!("{}true{}", r#"{"items":"#.repeat(n), "}".repeat(n));
    schema("nested 120", &nested(120));
    assert!(schema("nested 100,000", &nested(100_000)).is_some());
    let chain = |n: usize| {
        let defs: serde_json::Map<String, Value> = (0..n)
            .map(|i| {
                (
                    format!("d{i}"),
                    json!({"$ref": format!("#/$defs/d{}", i + 1)}),
                )
            })
            .chain([(format!("d{n}"), json!({"type": "null"}))])
            .collect();
        json!({"$ref": "#/$defs/d0", "$defs": defs}).to_string()
    };
    assert_eq!(schema("chain of references", &chain(1000)), None);
    assert!(schema("too many references", &chain(1100)).is_some());
    schema("itself", r##"{"$ref": "#"}"##);
    schema(
        "itself with a sibling",
        r##"{"$ref": "#", "type": "object"}"##,
    );
    schema(
        "a circle",
        r##"{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/b"},"b":{"$ref":"#/$defs/a"}}}"##,
    );
    assert!(schema("elsewhere", r##"{"$ref": "http://example.org/x.json"}"##).is_some());
    let either = json!({"anyOf": (0..4).map(|i| json!({"properties": {format!("p{i}"): {"type": "null"}}})).collect::<Vec<_>>()});
    schema("product", &json!({"allOf": vec![either; 30]}).to_string());
    let one = json!({"oneOf": (0..3000).map(|i| json!({"type": "string", "pattern": format!("^a{{{i}}}b*$")})).collect::<Vec<_>>()});
    schema("one of many", &one.to_string());
    let many: Vec<_> = (0..15_000).map(|i| format!("value {i}")).collect();
    assert_eq!(schema("enum", &json!({"enum": many}).to_string()), None);
    assert!(
        schema(
            "larger than we take",
            &json!({"enum": vec!["x"; 200_000]}).to_string()
        )
        .is_some()
    );
    for pattern in [
        "(a{1000}){1000}",
        "(a*)*(b*)*(c*)*",
        "[",
        "(?=a)",
        "(a|aa|aaa){500}x",
    ] {
        schema(
            pattern,
            &json!({"type": "string", "pattern": pattern}).to_string(),
        );
    }
    let intersections: Vec<_> = (0..12)
        .map(|i| json!({"type": "string", "pattern": format!("(.*a.{{{i}}}b.*)+")}))
        .collect();
    schema(
        "patterns at once",
        &json!({"allOf": intersections}).to_string(),
    );
    schema(
        "long",
        r#"{"type":"string","minLength":1000000000,"maxLength":2000000000}"#,
    );
    schema("many", r#"{"type":"array","minItems":1000000000}"#);
    schema("nothing", "false");
    schema(
        "divisors",
        r#"{"type":"integer","multipleOf":1e-300,"minimum":1e300}"#,
    );
    for text in ["", "[]", "7", "{", "nul", "{\"type\": 7}", "\u{0}"] {
        assert!(schema(text, text).is_some(), "{text}");
    }
    assert!(schema("options", r#"{"x-guidance": {"no such option": 1}}"#).is_some());

    let lark = |name: &str, text: &str| survive(name, &ReplyFormat::Lark(text));
    for text in [
        "",
        "start: ",
        "start",
        "start: missing",
        "start: /[/",
        "begin: \"x\"",
        "start: \"x\"{5,2}",
    ] {
        lark(text, text);
    }
    assert!(lark("missing", "start: missing").is_some());
    lark("left recursion", "start: start start | \"a\" |");
    lark(
        "ambiguous",
        "start: a a a a a\na: a a | \"x\" | \"x\" \"x\" |",
    );
    lark(
        "parentheses",
        &format!("start: {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000)),
    );
    let rules = (0..2_500)
        .map(|i| format!("r{i}: r{} | \"x\"\n", i + 1))
        .collect::<String>();
    lark(
        "chain of rules",
        &format!("start: r0\n{rules}r2500: \"y\"\n"),
    );
    let long = format!("start: \"{}\"", "x".repeat(70_000));
    assert!(lark("a long grammar", &long).is_some());
    lark("repeated", "start: (\"a\"{1,1000}){1,1000}");
}

#[test]
fn an_error_says_where() {
    let error = |schema: Value| {
        by_schema(model(), &schema)
            .expect_err("an error")
            .to_string()
    };
    let deep = json!({"type": "object", "properties": {"a": {"type": "object", "properties": {"b/c": {"type": "strin"}}}}});
    let said = error(deep);
    assert!(
        said.contains("`/properties/a/properties/b~1c`") && said.contains("strin"),
        "{said}"
    );
    let said = error(json!({"$defs": {"x": {"not": {}}}, "$ref": "#/$defs/x"}));
    assert!(
        said.contains("`/$defs/x`") && said.contains("not"),
        "{said}"
    );
    let said = error(json!({"items": [1]}));
    assert!(said.starts_with("JSON schema at `/"), "{said}");
    let said = model()
        .constraint(&ReplyFormat::JsonSchema("{\"type\":}"))
        .expect_err("no JSON");
    assert!(said.to_string().contains("line 1 column 9"), "{said}");
    let said = error(json!({"type": "string", "pattern": "a[b"}));
    assert!(said.contains("unclosed character class"), "{said}");
    let said = model()
        .constraint(&ReplyFormat::Lark("start: missing\n"))
        .expect_err("no rule");
    assert!(said.to_string().contains("missing"), "{said}");
}
