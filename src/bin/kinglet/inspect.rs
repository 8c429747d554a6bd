//! `kinglet inspect FILE`: what a model file holds, and what is odd about it.

use std::collections::BTreeMap;
use std::io::{self, Write};

use kinglet::gguf::{Array, Gguf, TensorInfo, Value};
use serde_json::{Map, json};

use crate::args::InspectArgs;
use crate::failure::{Failure, Outcome};
use crate::ui;

/// Elements of an array that are shown in JSON; vocabularies have hundreds of thousands.
const JSON_ELEMENTS: usize = 64;

pub fn run(args: &InspectArgs) -> Outcome {
    let gguf = Gguf::open(&args.file)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.template {
        let template = gguf.metadata().opt_str("tokenizer.chat_template")?;
        let Some(template) = template else {
            let path = args.file.display();
            return Err(Failure::usage(format!("{path}: no chat template")));
        };
        writeln!(out, "{}", ui::printable(template))?;
    } else if args.json {
        writeln!(out, "{}", json(&gguf, args))?;
    } else {
        text(&gguf, args, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

fn text(gguf: &Gguf, args: &InspectArgs, out: &mut impl Write) -> Outcome {
    for part in gguf.parts() {
        writeln!(
            out,
            "{}: GGUF v{}, {}, header {}, alignment {}",
            ui::one_line(&part.path().display().to_string()),
            part.version(),
            ui::bytes(part.file_bytes()),
            ui::bytes(part.header_bytes()),
            part.alignment(),
        )?;
    }

    writeln!(out, "\nMetadata: {} keys", gguf.metadata().len())?;
    for (key, value) in gguf.metadata().iter() {
        writeln!(
            out,
            "  {} = {value}  ({})",
            ui::one_line(key),
            value.type_name()
        )?;
    }

    let n_weights: usize = gguf.tensors().map(TensorInfo::n_elements).sum();
    writeln!(
        out,
        "\nTensors: {}, {} weights",
        gguf.tensors().len(),
        ui::count(n_weights as u64)
    )?;
    for (dtype, (n, weights, bytes)) in by_type(gguf) {
        let bits = 8.0 * bytes as f64 / weights.max(1) as f64;
        writeln!(
            out,
            "  {dtype:<8} {n:>5} tensors  {:>9} weights  {:>11}  {bits:.2} bits each",
            ui::count(weights as u64),
            ui::bytes(bytes as u64),
        )?;
    }
    if args.tensors {
        writeln!(out)?;
        for t in gguf.tensors() {
            let dtype = t.dtype.to_string();
            let shape = format!("{:?}", t.dims());
            writeln!(
                out,
                "  {:<40} {dtype:<8} {shape:<20} {:>11}  at {}",
                ui::one_line(&t.name),
                ui::bytes(t.bytes as u64),
                t.offset
            )?;
        }
    }

    match gguf
        .metadata()
        .get("tokenizer.chat_template")
        .and_then(Value::as_bytes)
    {
        Some(template) => {
            let lines = template.split(|b| *b == b'\n').count();
            writeln!(
                out,
                "\nChat template: {} bytes, {lines} lines (--template prints it)",
                template.len()
            )?;
        }
        None => writeln!(out, "\nChat template: none")?,
    }
    let problems = gguf.problems();
    writeln!(
        out,
        "\nProblems: {}",
        if problems.is_empty() {
            "none found"
        } else {
            ""
        }
    )?;
    for problem in problems {
        writeln!(out, "  {}", ui::one_line(&problem))?;
    }
    Ok(())
}

/// Tensors, weights and bytes of each type.
fn by_type(gguf: &Gguf) -> BTreeMap<String, (usize, usize, usize)> {
    let mut types = BTreeMap::<String, (usize, usize, usize)>::new();
    for t in gguf.tensors() {
        let entry = types.entry(t.dtype.to_string()).or_default();
        *entry = (entry.0 + 1, entry.1 + t.n_elements(), entry.2 + t.bytes);
    }
    types
}

fn json(gguf: &Gguf, args: &InspectArgs) -> serde_json::Value {
    let parts = gguf.parts().iter().map(|part| {
        json!({
            "path": part.path().display().to_string(),
            "version": part.version(),
            "bytes": part.file_bytes(),
            "header_bytes": part.header_bytes(),
            "data_start": part.data_start(),
            "alignment": part.alignment(),
        })
    });
    let metadata: Map<_, _> = gguf
        .metadata()
        .iter()
        .map(|(key, value)| (key.to_owned(), json_value(value)))
        .collect();
    let types: Map<_, _> = by_type(gguf)
        .into_iter()
        .map(|(dtype, (n, weights, bytes))| {
            (
                dtype,
                json!({ "tensors": n, "weights": weights, "bytes": bytes }),
            )
        })
        .collect();
    let mut json = json!({
        "parts": parts.collect::<Vec<_>>(),
        "metadata": metadata,
        "n_tensors": gguf.tensors().len(),
        "types": types,
        "problems": gguf.problems(),
    });
    if args.tensors {
        let tensors = gguf.tensors().map(|t| {
            json!({
                "name": t.name,
                "type": t.dtype.to_string(),
                "shape": t.dims(),
                "part": t.part,
                "offset": t.offset,
                "bytes": t.bytes,
            })
        });
        json["tensors"] = tensors.collect();
    }
    json
}

/// Long arrays are cut: an object with the number of elements and the first of them.
fn json_value(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(x) => json!(x),
        Value::Array(array) => {
            let shown = (0..array.len())
                .take(JSON_ELEMENTS)
                .filter_map(|i| array.get(i));
            let shown: Vec<_> = shown.map(|value| json_value(&value)).collect();
            if array.len() > JSON_ELEMENTS {
                json!({ "length": Array::len(array), "first": shown })
            } else {
                json!(shown)
            }
        }
        value => {
            let text = || {
                value
                    .as_bytes()
                    .map(|bytes| json!(String::from_utf8_lossy(bytes)))
            };
            let integer = || {
                let x = value.as_integer()?;
                let signed = i64::try_from(x).ok().map(|x| json!(x));
                signed.or_else(|| u64::try_from(x).ok().map(|x| json!(x)))
            };
            // JSON has no infinities: null.
            let float = || value.as_float().map(|x| json!(x));
            text()
                .or_else(integer)
                .or_else(float)
                .unwrap_or(serde_json::Value::Null)
        }
    }
}
