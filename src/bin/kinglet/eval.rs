//! `kinglet eval ppl`: perplexity by llama-perplexity's method, so that numbers compare.
//!
//! The text is cut into windows of `-c` tokens. Each is read from an empty session, its first token replaced by BOS
//! where the model wants one; the tokens after its middle are scored. With `l` the mean of `-ln p` over all scored
//! tokens and `s` its standard error: `exp(l) ± exp(l) s`.

use std::io::{self, Write};
use std::ops::ControlFlow;

use kinglet::tokenizer::Special;
use kinglet::{Model, Session, SessionOptions};
use serde_json::json;

use crate::args::{EvalArgs, EvalCommand, PplArgs};
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

pub fn run(args: &EvalArgs) -> Outcome {
    match &args.what {
        EvalCommand::Ppl(args) => ppl(args),
    }
}

/// A sum of `-ln p`, of their squares, and how many.
#[derive(Clone, Copy, Default)]
struct Sums {
    nll: f64,
    nll2: f64,
    n: usize,
}

impl Sums {
    fn add(&mut self, nll: f64) {
        self.nll += nll;
        self.nll2 += nll * nll;
        self.n += 1;
    }

    fn ppl(&self) -> f64 {
        (self.nll / self.n as f64).exp()
    }

    fn error(&self) -> f64 {
        let n = self.n as f64;
        let mean = self.nll / n;
        let variance = (self.nll2 / n - mean * mean).max(0.0);
        self.ppl() * (variance / (n - 1.0).max(1.0)).sqrt()
    }
}

fn ppl(args: &PplArgs) -> Outcome {
    if args.ctx < 4 {
        return Err(Failure::usage(format!(
            "-c: expected at least 4 tokens, found {}",
            args.ctx
        )));
    }
    let text = ui::read_prompt(&args.file)?;
    let model = locate::load(&args.model)?;
    let tokenizer = model.tokenizer()?;
    let tokens = tokenizer.encode_with_bos(&text, Special::Text);
    if tokens.len() < 2 * args.ctx {
        return Err(Failure::usage(format!(
            "{}: expected at least {} tokens for windows of {}, found {}",
            args.file.display(),
            2 * args.ctx,
            args.ctx,
            tokens.len()
        )));
    }
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let n_windows = (tokens.len() / args.ctx).min(args.chunks.unwrap_or(usize::MAX));
    let mut session = open(&model, args)?;
    ui::note(&format!(
        "{n_windows} windows of {} tokens, {} in the text",
        args.ctx,
        tokens.len()
    ));

    let _busy = interrupt::busy();
    let bar = ui::progress("scoring", n_windows as u64, "{pos}/{len} windows {prefix}");
    let mut sums = Sums::default();
    let mut windows = tokens.chunks_exact(args.ctx).take(n_windows);
    let scored = windows.try_for_each(|window| -> Outcome {
        score(&mut session, window, bos, &mut sums)?;
        bar.inc(1);
        bar.set_prefix(format!("PPL {:.4}", sums.ppl()));
        Ok(())
    });
    bar.finish_and_clear();
    scored?;

    let mut out = io::stdout().lock();
    if args.json {
        let json = json!({
            "ppl": sums.ppl(),
            "error": sums.error(),
            "scored_tokens": sums.n,
            "windows": n_windows,
            "ctx": args.ctx,
            "text_tokens": tokens.len(),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "PPL = {:.4} ± {:.5}", sums.ppl(), sums.error())?;
    }
    out.flush()?;
    Ok(())
}

fn open(model: &Model, args: &PplArgs) -> Outcome<Session> {
    let options = SessionOptions {
        n_ctx: args.ctx,
        kv: args.cache.types(),
        batch: args.batch,
    };
    Ok(Session::new(model, &options)?)
}

/// Scores the tokens after the middle of a window: position `i` predicts `i + 1`.
fn score(session: &mut Session, window: &[u32], bos: Option<u32>, sums: &mut Sums) -> Outcome {
    session.truncate(0)?;
    let mut input = window.to_vec();
    if let Some(bos) = bos {
        input[0] = bos;
    }
    let (first, last) = (window.len() / 2, window.len() - 1);
    session.prefill(&input[..first], &mut |_, _| flow())?;
    session.score(&input[first..last], &mut |position, logits| {
        sums.add(nll(logits, window[position + 1] as usize));
        flow()
    })?;
    // A break after the last step is none to the session.
    if interrupt::hit() {
        Err(Failure::Interrupted)
    } else {
        Ok(())
    }
}

fn flow() -> ControlFlow<()> {
    if interrupt::hit() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// `-ln softmax(logits)[token]`; powers in single precision, their sum in double, as llama-perplexity has them.
fn nll(logits: &[f32], token: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
    sum.ln() - f64::from(logits[token] - max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fair_die_has_perplexity_six_without_error() {
        let mut sums = Sums::default();
        (0..60).for_each(|i| sums.add(nll(&[0.5; 6], i % 6)));
        assert!((sums.ppl() - 6.0).abs() < 1e-6);
        assert!(sums.error() < 1e-3);
    }

    #[test]
    fn standard_error_of_two_values() {
        let mut sums = Sums::default();
        sums.add(1.0);
        sums.add(3.0);
        // mean 2, variance 1, n - 1 = 1
        assert!((sums.ppl() - 2f64.exp()).abs() < 1e-9);
        assert!((sums.error() - 2f64.exp()).abs() < 1e-9);
    }
}
