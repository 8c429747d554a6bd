//! Where in a schema an error is: the deepest part that fails alone, with the definitions of the whole at hand.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// Parts that are tried, and for how long: the schema is wrong in any case.
const MAX_TRIES: usize = 200;
const MAX_TIME: Duration = Duration::from_secs(1);

/// Keys that hold a schema, a list of them, and named ones.
const ONE: &[&str] = &["items", "additionalProperties", "contains", "not"];
const LISTS: &[&str] = &["anyOf", "oneOf", "allOf", "prefixItems"];
const NAMED: &[&str] = &["properties", "patternProperties", "$defs", "definitions"];

/// The pointer to the deepest part of `schema` that `fails`, with what it says.
pub(super) fn deepest(
    schema: &Value,
    fails: &dyn Fn(&Value) -> Option<String>,
) -> Option<(String, String)> {
    let began = Instant::now();
    let mut found = None;
    let (mut part, mut at, mut n_tries) = (schema, String::new(), 0);
    'down: loop {
        for (step, inner) in parts(part) {
            n_tries += 1;
            if n_tries > MAX_TRIES || began.elapsed() > MAX_TIME {
                return found;
            }
            if let Some(what) = fails(&with_definitions(inner, schema)) {
                at.push_str(&step);
                found = Some((at.clone(), what));
                part = inner;
                continue 'down;
            }
        }
        return found;
    }
}

fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let escape = |key: &str| key.replace('~', "~0").replace('/', "~1");
    let mut out = Vec::new();
    for (key, value) in schema.as_object().into_iter().flatten() {
        let is = |keys: &[&str]| keys.contains(&key.as_str());
        match value {
            value if is(ONE) => out.push((format!("/{key}"), value)),
            Value::Array(items) if is(LISTS) => {
                let items = items.iter().enumerate();
                out.extend(items.map(|(i, item)| (format!("/{key}/{i}"), item)));
            }
            Value::Object(fields) if is(NAMED) => {
                out.extend(
                    fields
                        .iter()
                        .map(|(name, v)| (format!("/{key}/{}", escape(name)), v)),
                );
            }
            _ => {}
        }
    }
    out
}

/// `part` as a schema of its own; its references go to the definitions of `whole`.
fn with_definitions(part: &Value, whole: &Value) -> Value {
    let Value::Object(fields) = part else {
        return part.clone();
    };
    let mut fields: Map<String, Value> = fields.clone();
    for key in ["$defs", "definitions"] {
        if let Some(definitions) = whole.get(key) {
            fields.entry(key).or_insert_with(|| definitions.clone());
        }
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_deepest_part_that_fails_is_named() {
        let schema = json!({
            "properties": {"a": {"type": "string"}, "b/c": {"items": {"anyOf": [true, {"bad": 1}]}}},
            "$defs": {"x": {"type": "null"}}
        });
        // Fails where it is, or anywhere below.
        let fails = |part: &Value| {
            let mut part = part.clone();
            part.as_object_mut().map(|fields| fields.remove("$defs"));
            part.to_string()
                .contains("bad")
                .then(|| "it is bad".to_owned())
        };
        let (at, what) = deepest(&schema, &fails).expect("a place");
        assert_eq!(at, "/properties/b~1c/items/anyOf/1");
        assert_eq!(what, "it is bad");
        assert_eq!(deepest(&json!({"type": "string"}), &fails), None);
    }
}
