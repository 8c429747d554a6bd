//! `kinglet run`: one prompt, one reply.

use std::io::{self, IsTerminal, Write};
use std::path::Path;

use kinglet::profile::machine::Resident;
use kinglet::sampler::Sampler;
use kinglet::session::{Chat, Event, Extra, Finish, GenerateOptions, Reply, generate};
use kinglet::tokenizer::Special;
use kinglet::{Error, Model, Session};
use serde_json::json;

use crate::args::RunArgs;
use crate::failure::{Failure, Outcome};
use crate::ui::{self, ReplyPrinter};
use crate::{interrupt, locate};

pub fn run(args: &RunArgs) -> Outcome {
    args.sampling.check()?;
    let prompt = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => ui::read_prompt(path)?,
        (None, None) if io::stdin().is_terminal() => {
            return Err(Failure::usage(
                "no prompt: give it with -p, with -f, or through a pipe",
            ));
        }
        (None, None) => ui::read_prompt(Path::new("-"))?,
    };
    let model = locate::load_within(&args.model, &args.budget, &args.session)?;
    let mut sampler = Sampler::new(&args.sampling.settings(&model)?);
    let session = match &args.prompt_cache {
        Some(path) if path.exists() => cached(path, &model, args)?,
        _ => args.session.open(&model)?,
    };
    let n_ctx = session.n_ctx();
    let raw = args.raw || model.tokenizer()?.chat_template().is_none();
    if raw && args.system.is_some() {
        return Err(Failure::usage(
            "the model has no chat template, so there is no place for --system",
        ));
    }
    if raw && !args.raw {
        ui::note("note: the model has no chat template; the text is continued as it is (--raw)");
    }

    let busy = interrupt::busy();
    let mut printer = ReplyPrinter::new(!args.json);
    let reply = if raw {
        continue_text(session, &prompt, args, &mut sampler, &mut printer)
    } else {
        answer(session, &prompt, args, &mut sampler, &mut printer)
    };
    drop(busy);
    printer.end()?;
    let (reply, session) = reply?;
    ui::note_fault(&session);
    if let Some(path) = &args.prompt_cache {
        cache(session, &reply, path)?;
    }
    if args.json {
        print_json(&reply, &sampler)?;
    } else if !args.quiet {
        let paint = ui::Paint::stderr();
        ui::note_raw(&paint.dim(&format!("[{}]", ui::stats_line(&reply.stats))));
    }
    match reply.finish {
        Finish::Stop | Finish::Length => Ok(()),
        Finish::Cancelled => Err(Failure::Interrupted),
        Finish::ContextFull => {
            let needed = n_ctx + 1;
            Err(Error::ContextFull { needed, n_ctx }.into())
        }
    }
}

/// The session in a file, if it is of use.
fn cached(path: &Path, model: &Model, args: &RunArgs) -> Outcome<Session> {
    match Session::load(model, path, &args.session.options()) {
        Err(error @ (Error::Mismatch { .. } | Error::ContextFull { .. })) => {
            ui::note(&format!(
                "note: {error}; the whole prompt is read and the file replaced"
            ));
            args.session.open(model)
        }
        session => Ok(session?),
    }
}

/// Keeps the session as it was after the prompt, unless all of it came from the file.
fn cache(mut session: Session, reply: &Reply, path: &Path) -> Outcome {
    let n = reply.stats.prompt_tokens;
    if n > reply.stats.reused_tokens && n <= session.tokens().len() {
        session.truncate(n)?;
        session.recall_logits()?;
        session.save(path, &Extra::default())?;
    }
    Ok(())
}

fn answer(
    session: Session,
    prompt: &str,
    args: &RunArgs,
    sampler: &mut Sampler,
    printer: &mut ReplyPrinter,
) -> Outcome<(Reply, Session)> {
    let model = session.model().clone();
    let mut chat = Chat::new(session)?;
    chat.set_system(args.system.as_deref());
    if let Some(path) = &args.tools {
        let text = ui::read_text(path)?;
        let bad = |e| {
            Failure::usage(format!(
                "{}: expected a list of tools, found {e}",
                path.display()
            ))
        };
        chat.set_tools(Some(serde_json::from_str(&text).map_err(bad)?))?;
    }
    let on = &mut |event: Event| printer.on(event);
    let reply = chat.send(prompt, sampler, &args.end.options(&model)?, on)?;
    Ok((reply, chat.into_session()))
}

fn continue_text(
    mut session: Session,
    prompt: &str,
    args: &RunArgs,
    sampler: &mut Sampler,
    printer: &mut ReplyPrinter,
) -> Outcome<(Reply, Session)> {
    let special = if args.special {
        Special::Parse
    } else {
        Special::Text
    };
    let model = session.model().clone();
    let tokenizer = model.tokenizer()?;
    let mut tokens = tokenizer.encode_with_bos(prompt, special);
    if tokenizer.add_eos() && tokens.last() == tokenizer.eos().as_ref() {
        tokens.pop(); // what is to be continued has not ended
    }
    if tokens.is_empty() {
        // Something must come before the first token of a text.
        tokens.extend(tokenizer.bos().or(tokenizer.eos()));
    }
    let options = GenerateOptions {
        continued: true,
        ..args.end.options(&model)?
    };
    let on = &mut |event: Event| printer.on(event);
    let reply = generate(&mut session, &tokens, sampler, &options, on)?;
    Ok((reply, session))
}

fn print_json(reply: &Reply, sampler: &Sampler) -> Outcome {
    let stats = &reply.stats;
    let ms = |time: std::time::Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let json = json!({
        "text": reply.text,
        "tool_calls": reply.calls,
        "tokens": reply.tokens,
        "finish": reply.finish.name(),
        "seed": sampler.seed(),
        "memory": Resident::now().map(|held| json!({
            "anonymous_bytes": held.anonymous,
            "file_bytes": held.file,
            "peak_bytes": held.peak,
        })),
        "timings": {
            "prompt_tokens": stats.prompt_tokens,
            "reused_tokens": stats.reused_tokens,
            "replayed_tokens": stats.replayed_tokens,
            "prefill_ms": ms(stats.prefill),
            "prefill_tokens_per_second": stats.prefill_rate(),
            "first_token_ms": ms(stats.first_token),
            "decode_tokens": stats.decode_tokens,
            "decode_ms": ms(stats.decode),
            "decode_tokens_per_second": stats.decode_rate(),
            "pairs": stats.work.pairs,
            "pairs_read": stats.work.pairs_read,
            "delta": stats.work.delta.sparsity(),
            "decide_ms": stats.work.decide_ns as f64 / 1e6,
        },
    });
    let mut out = io::stdout().lock();
    writeln!(out, "{json}")?;
    out.flush()?;
    Ok(())
}
