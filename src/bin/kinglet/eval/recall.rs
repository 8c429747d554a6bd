//! `kinglet eval recall`: multi-query associative recall (Zoology, arXiv:2312.04927) for models that were trained on text.
//!
//! A prompt begins with lines of two words, a key and its value, and goes on with lines of other words. Among those each
//! key comes once more: most soon, some late, at distances of a power law, as words recur in text. Counted is how often
//! the value is the likeliest token after its key, and the mean of its `ln p`.

use std::collections::HashSet;
use std::io::{self, Write};

use kinglet::sampler::Rng;
use kinglet::tokenizer::{Special, Tokenizer};
use kinglet::{Model, Session};
use serde_json::json;

use super::{bos, flow, go_on, ln_p, lossy, lossy_line, mean, top};
use crate::args::RecallArgs;
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

/// The exponent of distances, as in Zoology: `p(gap) ~ gap^(POWER - 1)`.
const POWER: f64 = 0.01;

/// Words that are one token.
struct Words {
    words: Vec<u32>,
    newline: Vec<u32>,
    bos: Option<u32>,
}

impl Words {
    fn of(tokenizer: &Tokenizer) -> Self {
        let is_word = |id: &u32| {
            let text = tokenizer.token_text(*id);
            let word = text.strip_prefix([' ', '\u{2581}', '\u{120}']);
            word.is_some_and(|w| w.len() >= 3 && w.bytes().all(|b| b.is_ascii_lowercase()))
        };
        Self {
            words: (0..tokenizer.n_vocab() as u32).filter(is_word).collect(),
            newline: tokenizer.encode("\n", Special::Text),
            bos: bos(tokenizer),
        }
    }

    fn line_len(&self) -> usize {
        2 + self.newline.len()
    }
}

/// A prompt, and the indices of keys whose values come next.
struct Prompt {
    tokens: Vec<u32>,
    asked: Vec<usize>,
}

impl Prompt {
    /// At most `length` tokens with `n` pairs.
    fn new(words: &Words, length: usize, n: usize, rng: &mut Rng) -> Option<Self> {
        let n_lines = (length - usize::from(words.bos.is_some())) / words.line_len();
        // No word twice among keys and values; the others are never keys.
        if n_lines < 2 * n || words.words.len() < 4 * n {
            return None;
        }
        let mut used = HashSet::new();
        let mut fresh = || loop {
            let word = words.words[(rng.next_u64() % words.words.len() as u64) as usize];
            if used.insert(word) {
                return word;
            }
        };
        let pairs: Vec<[u32; 2]> = (0..n).map(|_| [fresh(), fresh()]).collect();
        let mut lines: Vec<Option<[u32; 2]>> = vec![None; n_lines];
        let mut is_asked = vec![false; n_lines];
        for (i, pair) in pairs.iter().enumerate() {
            lines[i] = Some(*pair);
            // The inverse of the law's distribution; the next free line from there.
            let most = (n_lines - n) as f64;
            let gap = (rng.next_f64() * (most.powf(POWER) - 1.0) + 1.0).powf(1.0 / POWER);
            let wanted = (gap as usize).min(n_lines - n - 1);
            let free = |at: &usize| lines[*at].is_none();
            let at = (n + wanted..n_lines).find(free);
            let at = at.or_else(|| (n..n + wanted).rev().find(free))?;
            lines[at] = Some(*pair);
            is_asked[at] = true;
        }
        let mut prompt = Self {
            tokens: words.bos.into_iter().collect(),
            asked: Vec::new(),
        };
        for (line, is_asked) in lines.into_iter().zip(is_asked) {
            if is_asked {
                prompt.asked.push(prompt.tokens.len());
            }
            let mut other = || loop {
                let word = words.words[(rng.next_u64() % words.words.len() as u64) as usize];
                if !used.contains(&word) {
                    return word;
                }
            };
            prompt
                .tokens
                .extend(line.unwrap_or_else(|| [other(), other()]));
            prompt.tokens.extend(&words.newline);
        }
        Some(prompt)
    }
}

/// What was recalled at one length.
#[derive(Default)]
struct Recalled {
    ln_p: Vec<f64>,
    n_exact: usize,
}

pub fn run(args: &RecallArgs) -> Outcome {
    let model = locate::load(&args.model)?;
    let words = Words::of(model.tokenizer()?);
    let _busy = interrupt::busy();
    let n = args.lengths().len() * args.trials;
    let bar = ui::progress("recalling", n as u64, "{pos}/{len} prompts");
    let measured = args.lengths().iter().map(|&length| {
        let mut recalled = Recalled::default();
        for trial in 0..args.trials {
            recall(&model, args, &words, length, trial, &mut recalled)?;
            bar.inc(1);
        }
        Ok((length, recalled))
    });
    let measured: Outcome<Vec<_>> = measured.collect();
    bar.finish_and_clear();
    print(args, &measured?)
}

fn recall(
    model: &Model,
    args: &RecallArgs,
    words: &Words,
    length: usize,
    trial: usize,
    recalled: &mut Recalled,
) -> Outcome {
    let prompt = Prompt::new(words, length, args.pairs, &mut Rng::new(trial as u64));
    let Some(prompt) = prompt else {
        return Err(Failure::usage(format!(
            "--lengths, --pairs: expected at least {} tokens and {} words in the vocabulary for {} pairs, found {length} \
             and {}",
            2 * args.pairs * words.line_len() + 1,
            4 * args.pairs,
            args.pairs,
            words.words.len()
        )));
    };
    let mut session = Session::new(model, &args.scoring.options(length))?;
    let first = prompt.asked[0];
    session.prefill(&prompt.tokens[..first], &mut |_, _| flow())?;
    go_on()?;
    let mut asked = prompt.asked.iter().peekable();
    session.score(&prompt.tokens[first..], &mut |position, logits| {
        if asked.next_if(|at| **at == position).is_some() {
            let value = prompt.tokens[position + 1];
            recalled.ln_p.push(ln_p(logits, value));
            recalled.n_exact += usize::from(top(logits) == value);
        }
        flow()
    })?;
    go_on()
}

fn print(args: &RecallArgs, measured: &[(usize, Recalled)]) -> Outcome {
    let options = args.scoring.options(0);
    let mut out = io::stdout().lock();
    if args.scoring.json {
        let lengths = measured.iter().map(|(length, recalled)| {
            json!({
                "length": length,
                "asked": recalled.ln_p.len(),
                "exact": recalled.n_exact,
                "ln_p": mean(recalled.ln_p.iter().copied()),
            })
        });
        let json = json!({
            "lengths": lengths.collect::<Vec<_>>(),
            "pairs": args.pairs,
            "lossy": lossy(&options),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{}", lossy_line(&options))?;
        for (length, recalled) in measured {
            let n = recalled.ln_p.len();
            writeln!(
                out,
                "{length} tokens: {}/{n} recalled ({:.1} %), mean ln p {:.3}",
                recalled.n_exact,
                100.0 * recalled.n_exact as f64 / n as f64,
                mean(recalled.ln_p.iter().copied())
            )?;
        }
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_comes_twice_and_its_value_with_it() {
        let words = Words {
            words: (100..400).collect(),
            newline: vec![7],
            bos: Some(1),
        };
        for (length, n) in [(500, 16), (97, 16), (3000, 40)] {
            for seed in 0..5 {
                let prompt = Prompt::new(&words, length, n, &mut Rng::new(seed)).unwrap();
                assert!(prompt.tokens.len() <= length && prompt.tokens.len() > length - 3);
                assert_eq!(prompt.asked.len(), n);
                assert!(prompt.asked.is_sorted());
                for &at in &prompt.asked {
                    let key = prompt.tokens[at];
                    let places = prompt.tokens.iter().enumerate();
                    let places = places.filter(|(_, t)| **t == key).map(|(i, _)| i);
                    let places: Vec<usize> = places.collect();
                    assert_eq!(places.len(), 2, "key {key}");
                    assert_eq!(places[1], at);
                    assert!(places[0] < 1 + 3 * n, "told at the beginning");
                    assert_eq!(prompt.tokens[places[0] + 1], prompt.tokens[at + 1]);
                }
            }
        }
        assert!(Prompt::new(&words, 95, 16, &mut Rng::new(0)).is_none());
        assert!(Prompt::new(&words, 5000, 80, &mut Rng::new(0)).is_none());
    }
}
