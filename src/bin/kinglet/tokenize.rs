//! `kinglet tokenize`: the tokens of a text, one on a line: id, tab, what it stands for.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use kinglet::gguf::Gguf;
use kinglet::tokenizer::{Special, Tokenizer};
use serde_json::json;

use crate::args::TokenizeArgs;
use crate::failure::{Failure, Outcome};
use crate::{locate, ui};

pub fn run(args: &TokenizeArgs) -> Outcome {
    let is_model = |name: &str| Path::new(name).extension().is_some_and(|e| e == "gguf");
    let (model, text) = match &args.model_and_text[..] {
        [] => (None, None),
        [one] if args.model.is_none() && is_model(one) => (Some(&**one), None),
        [one] => (None, Some(one)),
        [model, text] => (Some(&**model), Some(text)),
        _ => return Err(Failure::usage("expected [MODEL] [TEXT]")),
    };
    if model.is_some() && args.model.is_some() {
        return Err(Failure::usage("expected one MODEL, found two"));
    }
    let text = match (text, &args.file) {
        (Some(_), Some(_)) => return Err(Failure::usage("expected TEXT or -f, found both")),
        (Some(text), None) => text.clone(),
        (None, Some(path)) => ui::read_text(path)?,
        (None, None) if io::stdin().is_terminal() => {
            return Err(Failure::usage(
                "no text: give it as an argument, with -f, or through a pipe",
            ));
        }
        (None, None) => ui::read_stdin()?,
    };

    // The vocabulary alone: no network is built.
    let path = locate::locate(model.or(args.model.as_deref()))?;
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path)?)?;
    let special = if args.special {
        Special::Parse
    } else {
        Special::Text
    };
    let tokens = if args.bos {
        tokenizer.encode_with_bos(&text, special)
    } else {
        tokenizer.encode(&text, special)
    };

    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        let texts: Vec<_> = tokens.iter().map(|id| tokenizer.token_text(*id)).collect();
        let whole = tokenizer.decode(&tokens) == text;
        let json = json!({ "tokens": tokens, "texts": texts, "round_trip": whole });
        writeln!(out, "{json}")?;
    } else {
        for id in tokens {
            // Quoted: spaces and newlines are what one wants to see here.
            writeln!(out, "{id}\t{:?}", tokenizer.token_text(id))?;
        }
    }
    out.flush()?;
    Ok(())
}
