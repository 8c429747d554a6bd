//! `kinglet eval ppl`: perplexity by llama-perplexity's method, so that numbers compare.
//!
//! With `l` the mean of `-ln p` over all scored tokens and `s` its standard error: `exp(l) ± exp(l) s`.

use std::io::{self, Write};

use kinglet::Session;
use serde_json::json;

use super::windows::Windows;
use super::{flow, go_on, ln_p, lossy};
use crate::args::PplArgs;
use crate::failure::Outcome;
use crate::{interrupt, locate, ui};

/// A sum of `-ln p`, of their squares, and how many.
#[derive(Clone, Copy, Default)]
pub(super) struct Sums {
    nll: f64,
    nll2: f64,
    pub(super) n: usize,
}

impl Sums {
    pub(super) fn add(&mut self, nll: f64) {
        self.nll += nll;
        self.nll2 += nll * nll;
        self.n += 1;
    }

    pub(super) fn mean(&self) -> f64 {
        self.nll / self.n as f64
    }

    /// Standard error of the mean.
    pub(super) fn mean_error(&self) -> f64 {
        let n = self.n as f64;
        let variance = (self.nll2 / n - self.mean() * self.mean()).max(0.0);
        (variance / (n - 1.0).max(1.0)).sqrt()
    }

    pub(super) fn ppl(&self) -> f64 {
        self.mean().exp()
    }

    fn error(&self) -> f64 {
        self.ppl() * self.mean_error()
    }
}

pub fn run(args: &PplArgs) -> Outcome {
    let model = locate::load(&args.model)?;
    let windows = Windows::open(&model, &args.windows)?;
    let options = args.scoring.options(args.windows.ctx);
    let mut session = Session::new(&model, &options)?;

    let _busy = interrupt::busy();
    let bar = ui::progress(
        "scoring",
        windows.len() as u64,
        "{pos}/{len} windows {prefix}",
    );
    let mut sums = Sums::default();
    let scored = windows
        .iter()
        .try_for_each(|(unscored, scored, next)| -> Outcome {
            session.truncate(0)?;
            session.prefill(&unscored, &mut |_, _| flow())?;
            let mut next = next.iter();
            session.score(scored, &mut |_, logits| {
                let token = *next.next().expect("one after each scored token");
                sums.add(-ln_p(logits, token));
                flow()
            })?;
            go_on()?;
            bar.inc(1);
            bar.set_prefix(format!("PPL {:.4}", sums.ppl()));
            Ok(())
        });
    bar.finish_and_clear();
    scored?;

    let mut out = io::stdout().lock();
    if args.scoring.json {
        let json = json!({
            "ppl": sums.ppl(),
            "error": sums.error(),
            "scored_tokens": sums.n,
            "windows": windows.len(),
            "ctx": args.windows.ctx,
            "text_tokens": windows.n_tokens(),
            "lossy": lossy(&options),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "PPL = {:.4} ± {:.5}", sums.ppl(), sums.error())?;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fair_die_has_perplexity_six_without_error() {
        let mut sums = Sums::default();
        (0..60).for_each(|i| sums.add(-ln_p(&[0.5; 6], i % 6)));
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
