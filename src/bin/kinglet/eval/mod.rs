//! `kinglet eval`: what a model predicts, and what of it lossy options change.
//!
//! Every result names the lossy options in force.

mod kl;
mod needle;
mod ppl;
mod recall;
mod svg;
mod windows;

use std::ops::ControlFlow;

use kinglet::tokenizer::Tokenizer;
use kinglet::{Session, SessionOptions};
use serde_json::{Value, json};

use crate::args::{EvalArgs, EvalCommand};
use crate::failure::{Failure, Outcome};
use crate::interrupt;

pub fn run(args: &EvalArgs) -> Outcome {
    match &args.what {
        EvalCommand::Ppl(args) => ppl::run(args),
        EvalCommand::Kl(args) => kl::run(args),
        EvalCommand::Needle(args) => needle::run(args),
        EvalCommand::Recall(args) => recall::run(args),
    }
}

/// What in a session may change its predictions.
fn lossy(options: &SessionOptions) -> Value {
    json!({
        "cache_type_k": options.kv.keys.name(),
        "cache_type_v": options.kv.values.name(),
        "attention": options.attention(),
    })
}

/// What a session has left out so far, and what its cache takes.
fn saved(session: &Session) -> Value {
    let work = session.work();
    json!({
        "pairs_read": work.share_read(),
        "delta": work.delta.sparsity(),
        "kv_bytes": session.memory().kv,
    })
}

/// The same in a line of text.
fn lossy_line(options: &SessionOptions) -> String {
    format!(
        "keys and values: {}; attention: {}",
        options.kv,
        options.attention()
    )
}

fn flow() -> ControlFlow<()> {
    if interrupt::hit() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// A break after the last step is none to a session.
fn go_on() -> Outcome {
    if interrupt::hit() {
        Err(Failure::Interrupted)
    } else {
        Ok(())
    }
}

/// The logarithm of a softmax: powers in single precision, their sum in double, as llama-perplexity has them.
#[derive(Clone, Copy)]
struct LogSoftmax {
    max: f32,
    ln_sum: f64,
}

impl LogSoftmax {
    fn of(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|x| f64::from((x - max).exp())).sum();
        Self {
            max,
            ln_sum: sum.ln(),
        }
    }

    fn ln_p(&self, logit: f32) -> f64 {
        f64::from(logit - self.max) - self.ln_sum
    }
}

/// `ln softmax(logits)[token]`.
fn ln_p(logits: &[f32], token: u32) -> f64 {
    LogSoftmax::of(logits).ln_p(logits[token as usize])
}

/// The likeliest token, the first of equals.
fn top(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0) as u32
}

/// Tokens that are expected after a prompt, each given all before it.
struct Answer {
    /// Mean of `ln p` of the tokens.
    ln_p: f64,
    /// Whether each of them was the likeliest.
    exact: bool,
}

/// Reads `prompt`, of which what `session` holds already is not read again, and scores `expected`.
fn answer(session: &mut Session, prompt: &[u32], expected: &[u32]) -> Outcome<Answer> {
    let both = session.tokens().iter().zip(prompt);
    let common = both.take_while(|(a, b)| a == b).count();
    let common = common.min(prompt.len() - 1);
    session.truncate(common)?;
    session.prefill(&prompt[common..], &mut |_, _| flow())?;
    go_on()?;
    let mut answer = Answer {
        ln_p: 0.0,
        exact: true,
    };
    // One by one, as a reply is.
    for (i, &token) in expected.iter().enumerate() {
        answer.ln_p += ln_p(session.logits(), token) / expected.len() as f64;
        answer.exact &= top(session.logits()) == token;
        if i + 1 < expected.len() {
            session.decode(token)?;
        }
    }
    Ok(answer)
}

/// BOS where the model wants one.
fn bos(tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.bos().filter(|_| tokenizer.add_bos())
}

/// The mean; of nothing, no number.
fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, n) = values
        .into_iter()
        .fold((0.0, 0u32), |(sum, n), x| (sum + x, n + 1));
    sum / f64::from(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_the_first_of_equals_wins() {
        let logits = [1.0, 3.5, -2.0, 3.5];
        let sum: f64 = (0..4).map(|i| ln_p(&logits, i).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        assert_eq!(top(&logits), 1);
    }
}
