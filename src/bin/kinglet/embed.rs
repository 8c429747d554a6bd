//! `kinglet embed`: each text as one vector or more, a JSON object on a line.

use std::io::{self, IsTerminal, Write};

use kinglet::session::{Pooling, embed};
use kinglet::tokenizer::Special;
use serde_json::json;

use crate::args::EmbedArgs;
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

pub fn run(args: &EmbedArgs) -> Outcome {
    let texts: Vec<String> = match &args.texts[..] {
        [] if io::stdin().is_terminal() => {
            return Err(Failure::usage(
                "no text: give it with -p, or each on a line through a pipe",
            ));
        }
        [] => ui::read_stdin()?.lines().map(str::to_owned).collect(),
        texts => texts.to_vec(),
    };
    let model = locate::load_within(&args.model, &args.budget, &args.session)?;
    let mut session = args.session.open(&model)?;
    let tokenizer = model.tokenizer()?;
    let hidden = model.info().config.hidden;
    let mut out = io::stdout().lock();
    let _busy = interrupt::busy();
    for text in texts {
        if interrupt::hit() {
            return Err(Failure::Interrupted);
        }
        let tokens = tokenizer.encode_with_bos(&text, Special::Text);
        let vectors = embed(&mut session, &tokens, args.pooling, !args.no_normalize)?;
        let embedding = match args.pooling {
            Pooling::None => json!(vectors.chunks_exact(hidden).collect::<Vec<_>>()),
            Pooling::Mean | Pooling::Last => json!(vectors),
        };
        let json = json!({ "text": text, "n_tokens": tokens.len(), "embedding": embedding });
        writeln!(out, "{json}")?;
        out.flush()?;
    }
    Ok(())
}
