//! `kinglet eval needle`: facts hidden in a long text (after Kamradt's needle in a haystack), each asked for at its end.
//!
//! A fact is a sentence with a number of five digits. Small models fail at much, so the number is not judged by a reply
//! but given token by token: the mean of `ln p` of its tokens, what that gains over a prompt without any fact, and whether
//! each token was the likeliest. Facts lie between sentences; facts hidden together lie at different depths.

use std::io::{self, Write};
use std::path::Path;

use kinglet::sampler::Rng;
use kinglet::tokenizer::{Special, Tokenizer};
use kinglet::{Error, Session};
use serde_json::json;

use super::svg::{HeatMap, heat_map};
use super::{answer, bos, lossy, lossy_line, mean};
use crate::args::NeedleArgs;
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

const PLACES: [&str; 12] = [
    "Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Dublin", "Havana", "Vienna", "Lima", "Cairo",
    "Athens", "Seoul",
];

/// A sentence that states a number, and the beginning of a reply that must end with it.
const FORMS: [(&str, &str); 3] = [
    (
        "The secret code of {place} is {number}.",
        "Question: What is the secret code of {place}?\nAnswer: The secret code of {place} is",
    ),
    (
        "The archive in {place} keeps its key in box number {number}.",
        "Question: In which box does the archive in {place} keep its key?\nAnswer: The archive in {place} keeps its key \
         in box number",
    ),
    (
        "Remember that the train to {place} leaves with exactly {number} letters on board.",
        "Question: How many letters are on board of the train to {place}?\nAnswer: The train to {place} leaves with \
         exactly",
    ),
];

/// A fact in tokens.
struct Needle {
    sentence: Vec<u32>,
    question: Vec<u32>,
    number: Vec<u32>,
}

impl Needle {
    /// Facts that are told apart by their places; which comes first and their numbers depend on `trial`.
    fn some(tokenizer: &Tokenizer, n: usize, trial: usize) -> Vec<Self> {
        let mut rng = Rng::new(trial as u64);
        let mut number = || 10_000 + rng.next_u64() % 90_000;
        let some = (0..n).map(|i| Self::new(tokenizer, i + trial * n, &number().to_string()));
        some.collect()
    }

    fn new(tokenizer: &Tokenizer, which: usize, number: &str) -> Self {
        let (sentence, question) = FORMS[which % FORMS.len()];
        let fill = |form: &str| {
            let place = PLACES[which % PLACES.len()];
            form.replace("{place}", place).replace("{number}", number)
        };
        let encode = |text: &str| tokenizer.encode(text, Special::Text);
        let question = format!("\n\n{}", fill(question));
        // A space may be part of the number's first token.
        let whole = encode(&format!("{question} {number}"));
        let alone = encode(&question);
        let common = whole.iter().zip(&alone).take_while(|(a, b)| a == b).count();
        Self {
            sentence: encode(&format!(" {}", fill(sentence))),
            question: whole[..common].to_vec(),
            number: whole[common..].to_vec(),
        }
    }
}

/// Sentences of a text, in tokens.
struct Haystack(Vec<Vec<u32>>);

impl Haystack {
    fn new(tokenizer: &Tokenizer, text: &str) -> Self {
        let sentences = text.split_inclusive(". ").filter(|s| !s.trim().is_empty());
        Self(
            sentences
                .map(|s| tokenizer.encode(s, Special::Text))
                .collect(),
        )
    }

    /// Exactly `n` tokens with `sentences` in them, each after the last sentence that ends before its share of the whole;
    /// the text begins at sentence `first` and may go round.
    fn with(&self, n: usize, first: usize, mut needles: Vec<(f64, &[u32])>) -> Option<Vec<u32>> {
        needles.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut needed: usize = needles.iter().map(|(_, tokens)| tokens.len()).sum();
        let mut out = Vec::with_capacity(n);
        let mut needles = needles.into_iter().peekable();
        let mut sentences = self.0.iter().cycle().skip(first % self.0.len().max(1));
        while out.len() < n {
            let sentence = sentences.next()?;
            let room = n - out.len();
            let is_last = sentence.len() + needed >= room;
            let fits = |depth: f64| (out.len() + sentence.len()) as f64 > depth * n as f64;
            match needles.next_if(|(depth, _)| is_last || fits(*depth)) {
                Some((_, needle)) => {
                    out.extend_from_slice(needle);
                    needed -= needle.len();
                    // The sentence comes after it, or another fact does.
                    let filled = sentence.len().min(n.checked_sub(out.len() + needed)?);
                    out.extend_from_slice(&sentence[..filled]);
                }
                None => out.extend_from_slice(&sentence[..sentence.len().min(room)]),
            }
        }
        needles.peek().is_none().then_some(out)
    }
}

/// What was found of one fact.
struct Cell {
    length: usize,
    depth: usize,
    trial: usize,
    ln_p: f64,
    /// The same without any fact.
    without: f64,
    exact: bool,
}

pub fn run(args: &NeedleArgs) -> Outcome {
    let text = ui::read_prompt(&args.file)?;
    let model = locate::load(&args.model)?;
    let tokenizer = model.tokenizer()?;
    let haystack = Haystack::new(tokenizer, &text);
    if let Some(depth) = args.depths().iter().find(|depth| **depth > 100) {
        return Err(Failure::usage(format!(
            "--depths: expected at most 100 per cent, found {depth}"
        )));
    }
    if args.needles > PLACES.len() {
        let most = PLACES.len();
        let found = args.needles;
        return Err(Failure::usage(format!(
            "--needles: expected at most {most}, which have places of their own, found {found}"
        )));
    }
    if haystack.0.is_empty() {
        return Err(Failure::usage(format!(
            "{}: expected a text, found none",
            args.file.display()
        )));
    }

    let _busy = interrupt::busy();
    let n_cells = args.lengths().len() * args.depths().len() * args.trials;
    let bar = ui::progress("searching", n_cells as u64, "{pos}/{len} needles");
    let mut cells = Vec::new();
    let mut searched = || -> Outcome {
        for &length in args.lengths() {
            let mut search = Search::new(&model, args, &haystack, length)?;
            for trial in 0..args.trials {
                search.trial(args, trial, &mut |found| {
                    bar.inc(found.len() as u64);
                    cells.extend(found);
                })?;
            }
        }
        Ok(())
    };
    let searched = searched();
    bar.finish_and_clear();
    searched?;
    if let Some(path) = &args.svg {
        draw(args, &cells, path)?;
    }
    print(args, &cells)
}

/// Which of `n` facts are hidden together, `at_once` at most: such as are far from each other.
fn groups(n: usize, at_once: usize) -> Vec<Vec<usize>> {
    let n_groups = n.div_ceil(at_once);
    let group = |first: usize| (first..n).step_by(n_groups).collect();
    (0..n_groups).map(group).collect()
}

/// Searches prompts of one length.
struct Search<'a> {
    tokenizer: &'a Tokenizer,
    haystack: &'a Haystack,
    session: Session,
    length: usize,
    /// Where questions begin.
    n_text: usize,
}

impl<'a> Search<'a> {
    fn new(
        model: &'a kinglet::Model,
        args: &NeedleArgs,
        haystack: &'a Haystack,
        length: usize,
    ) -> Outcome<Self> {
        let tokenizer = model.tokenizer()?;
        let all = FORMS.len() * PLACES.len();
        let longest = |of: fn(&Needle) -> usize| {
            let needles = (0..all).map(|i| of(&Needle::new(tokenizer, i, "88888")));
            needles.max().expect("some places")
        };
        let asked = longest(|n| n.question.len() + n.number.len());
        let told = longest(|n| n.sentence.len()) * args.needles + 2;
        if length < 2 * (asked + told) {
            return Err(Failure::usage(format!(
                "--lengths: expected at least {} tokens for {} facts, found {length}",
                2 * (asked + told),
                args.needles
            )));
        }
        let n_text = length - asked;
        let mut options = args.scoring.options(length);
        options.sparsity.dense_from = args.dense_tail.then_some(n_text);
        Ok(Self {
            tokenizer,
            haystack,
            session: Session::new(model, &options)?,
            length,
            n_text,
        })
    }

    /// Hides a fact at each depth, as many at a time as are asked for, and asks for each.
    fn trial(
        &mut self,
        args: &NeedleArgs,
        trial: usize,
        found: &mut dyn FnMut(Vec<Cell>),
    ) -> Outcome {
        let depths = args.depths();
        let needles = Needle::some(self.tokenizer, depths.len(), trial);
        let all: Vec<&Needle> = needles.iter().collect();
        let without = self.ask(&all, Vec::new(), trial)?;
        for group in groups(depths.len(), args.needles) {
            let needles: Vec<&Needle> = group.iter().map(|i| &needles[*i]).collect();
            let hidden = group.iter().zip(&needles);
            let hidden = hidden.map(|(i, n)| (depths[*i] as f64 / 100.0, &n.sentence[..]));
            let with = self.ask(&needles, hidden.collect(), trial)?;
            let cells = group.iter().zip(with).map(|(&i, with)| Cell {
                length: self.length,
                depth: depths[i],
                trial,
                ln_p: with.ln_p,
                without: without[i].ln_p,
                exact: with.exact,
            });
            found(cells.collect());
        }
        Ok(())
    }

    fn ask(
        &mut self,
        needles: &[&Needle],
        hidden: Vec<(f64, &[u32])>,
        trial: usize,
    ) -> Outcome<Vec<super::Answer>> {
        // Other trials begin elsewhere in the text.
        let first = trial * 97;
        let bos = bos(self.tokenizer);
        let n = self.n_text - usize::from(bos.is_some());
        let text = self.haystack.with(n, first, hidden);
        let text = text.ok_or_else(|| Failure::usage("--needles: expected fewer".to_owned()))?;
        let text: Vec<u32> = bos.into_iter().chain(text).collect();
        let mut asked = |needle: &&Needle| {
            let prompt = [&text[..], &needle.question].concat();
            answer(&mut self.session, &prompt, &needle.number)
        };
        needles.iter().map(&mut asked).collect()
    }
}

/// The cells of a length and a depth.
fn at(cells: &[Cell], length: usize, depth: usize) -> impl Iterator<Item = &Cell> {
    let here = move |cell: &&Cell| cell.length == length && cell.depth == depth;
    cells.iter().filter(here)
}

fn print(args: &NeedleArgs, cells: &[Cell]) -> Outcome {
    let options = args.scoring.options(0);
    let mut out = io::stdout().lock();
    let summary = |length: usize| {
        let of = || cells.iter().filter(move |cell| cell.length == length);
        let n_exact = of().filter(|cell| cell.exact).count();
        let gain = mean(of().map(|cell| cell.ln_p - cell.without));
        (of().count(), n_exact, mean(of().map(|c| c.ln_p)), gain)
    };
    if args.scoring.json {
        let cell = |cell: &Cell| {
            json!({
                "length": cell.length,
                "depth": cell.depth,
                "trial": cell.trial,
                "ln_p": cell.ln_p,
                "ln_p_without": cell.without,
                "exact": cell.exact,
            })
        };
        let lengths = args.lengths().iter().map(|&length| {
            let (n, n_exact, ln_p, gain) = summary(length);
            json!({ "length": length, "cells": n, "exact": n_exact, "ln_p": ln_p, "gain": gain })
        });
        let json = json!({
            "lengths": lengths.collect::<Vec<_>>(),
            "needles": args.needles,
            "dense_tail": args.dense_tail,
            "cells": cells.iter().map(cell).collect::<Vec<_>>(),
            "lossy": lossy(&options),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{}", conditions(args))?;
        write!(out, "ln p at %")?;
        for depth in args.depths() {
            write!(out, "{depth:>7}")?;
        }
        writeln!(out, "    exact    gain")?;
        for &length in args.lengths() {
            write!(out, "{length:>9}")?;
            for &depth in args.depths() {
                write!(
                    out,
                    "{:>7.2}",
                    mean(at(cells, length, depth).map(|c| c.ln_p))
                )?;
            }
            let (n, n_exact, _, gain) = summary(length);
            writeln!(out, "{:>9} {gain:>7.2}", format!("{n_exact}/{n}"))?;
        }
    }
    out.flush()?;
    Ok(())
}

/// The lossy options in a line of text.
fn conditions(args: &NeedleArgs) -> String {
    let tail = match args.dense_tail {
        true => "; questions are read densely",
        false => "",
    };
    format!("{}{tail}", lossy_line(&args.scoring.options(0)))
}

fn draw(args: &NeedleArgs, cells: &[Cell], path: &Path) -> Outcome {
    let title = format!("Mean ln p of hidden numbers; {}", conditions(args));
    let value = |depth: usize, length: usize| mean(at(cells, length, depth).map(|c| c.ln_p));
    let map = HeatMap {
        title: &title,
        across: ("tokens", args.lengths()),
        down: ("depth, %", args.depths()),
        // No better than one digit in ten, and certain.
        range: (-(10f64.ln()), 0.0),
        value: &value,
    };
    std::fs::write(path, heat_map(&map)).map_err(|e| Error::io(path, e))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sentences of 5 tokens, each its number.
    fn haystack() -> Haystack {
        Haystack((0..40).map(|i| vec![i; 5]).collect())
    }

    #[test]
    fn facts_lie_between_sentences_where_they_should() {
        let fact = [900, 901, 902];
        for n in [50, 101, 150] {
            for depth in [0.0, 0.31, 0.5, 0.99, 1.0] {
                let text = haystack().with(n, 2, vec![(depth, &fact)]).unwrap();
                assert_eq!(text.len(), n);
                let at = text.windows(3).position(|w| w == fact).unwrap();
                assert!(at.is_multiple_of(5) || depth > 0.9, "{depth}: {at}");
                let wanted = (depth * n as f64) as usize;
                assert!(at.abs_diff(wanted.min(n - 3)) <= 5, "{n} {depth}: {at}");
                let rest: Vec<u32> = text.into_iter().filter(|t| *t < 900).collect();
                let plain = haystack().with(n - 3, 2, vec![]).unwrap();
                assert_eq!(rest, plain);
            }
        }
    }

    #[test]
    fn several_facts_are_all_there_and_in_order() {
        let facts: [[u32; 2]; 4] = [[900; 2], [901; 2], [902; 2], [903; 2]];
        let hidden = [1.0, 0.98, 0.0, 0.5]
            .into_iter()
            .zip(facts.iter().map(|f| &f[..]));
        let text = haystack().with(60, 0, hidden.collect()).unwrap();
        let found: Vec<u32> = text.iter().copied().filter(|t| *t >= 900).collect();
        assert_eq!(found, [902, 902, 903, 903, 901, 901, 900, 900]);
        assert_eq!(text.len(), 60);
        // No room: told, not cut.
        assert!(haystack().with(7, 0, vec![(0.5, &[1; 9])]).is_none());
    }

    #[test]
    fn depths_asked_for_together_are_far_apart() {
        assert_eq!(groups(5, 2), [vec![0, 3], vec![1, 4], vec![2]]);
        assert_eq!(groups(2, 9), [vec![0, 1]]);
        assert_eq!(groups(2, 1), [vec![0], vec![1]]);
    }
}
