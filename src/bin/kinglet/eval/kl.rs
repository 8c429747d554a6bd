//! `kinglet eval kl`: how far predictions are from those of the same weights with dense attention over f16 keys and
//! values, read by a second session in step with the one that is measured.
//!
//! `KL = sum_t p(t) (ln p(t) - ln q(t))` in nats, `p` dense; then the share of positions with the same likeliest token, and
//! what the text's own tokens lose: the mean of `ln p - ln q` of each with its standard error, of pairs.

use std::io::{self, Write};

use kinglet::Session;
use serde_json::json;

use super::ppl::Sums;
use super::windows::Windows;
use super::{LogSoftmax, flow, go_on, lossy, lossy_line, mean, saved, top};
use crate::args::KlArgs;
use crate::failure::Outcome;
use crate::{interrupt, locate, ui};

/// Positions whose logits are held at a time.
const STEP: usize = 64;

/// What all positions together say.
#[derive(Default)]
struct Found {
    kl: Vec<f64>,
    n_same: usize,
    dense: Sums,
    measured: Sums,
    /// Of the differences between the two.
    lost: Sums,
}

impl Found {
    fn add(&mut self, dense: &[f32], measured: &[f32], token: u32) {
        let (p, q) = (LogSoftmax::of(dense), LogSoftmax::of(measured));
        self.kl.push(kl(dense, p, measured, q));
        self.n_same += usize::from(top(dense) == top(measured));
        let token = token as usize;
        let (p, q) = (p.ln_p(dense[token]), q.ln_p(measured[token]));
        self.dense.add(-p);
        self.measured.add(-q);
        self.lost.add(p - q);
    }
}

fn kl(dense: &[f32], p: LogSoftmax, measured: &[f32], q: LogSoftmax) -> f64 {
    let terms = dense.iter().zip(measured).map(|(&a, &b)| {
        let ln_p = p.ln_p(a);
        f64::from((ln_p as f32).exp()) * (ln_p - q.ln_p(b))
    });
    terms.sum::<f64>().max(0.0)
}

/// The smallest value that is not exceeded by the share `q` of all; `sorted` is not empty.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = (q * sorted.len() as f64).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

pub fn run(args: &KlArgs) -> Outcome {
    let model = locate::load(&args.model)?;
    let windows = Windows::open(&model, &args.windows)?;
    let n_vocab = model.info().config.n_vocab;
    let options = args.scoring.options(args.windows.ctx);
    let mut measured = Session::new(&model, &options)?;
    let mut dense = Session::new(&model, &args.scoring.dense(args.windows.ctx))?;

    let _busy = interrupt::busy();
    let count = "{pos}/{len} windows {prefix}";
    let bar = ui::progress("comparing", windows.len() as u64, count);
    let mut found = Found::default();
    let mut held = Vec::with_capacity(STEP * n_vocab);
    let compared = windows
        .iter()
        .try_for_each(|(unscored, scored, next)| -> Outcome {
            for session in [&mut dense, &mut measured] {
                session.truncate(0)?;
                session.prefill(&unscored, &mut |_, _| flow())?;
            }
            for (tokens, next) in scored.chunks(STEP).zip(next.chunks(STEP)) {
                held.clear();
                dense.score(tokens, &mut |_, logits| {
                    held.extend_from_slice(logits);
                    flow()
                })?;
                let mut pairs = held.chunks_exact(n_vocab).zip(next);
                measured.score(tokens, &mut |_, logits| {
                    let (held, token) = pairs.next().expect("a row for each token");
                    found.add(held, logits, *token);
                    flow()
                })?;
                go_on()?;
            }
            bar.inc(1);
            bar.set_prefix(format!("KL {:.5}", mean(found.kl.iter().copied())));
            Ok(())
        });
    bar.finish_and_clear();
    compared?;

    let Found { mut kl, lost, .. } = found;
    kl.sort_by(f64::total_cmp);
    let average = mean(kl.iter().copied());
    let (p99, max) = (quantile(&kl, 0.99), kl[kl.len() - 1]);
    let same = found.n_same as f64 / kl.len() as f64;
    let mut out = io::stdout().lock();
    if args.scoring.json {
        let json = json!({
            "kl_mean": average,
            "kl_p99": p99,
            "kl_max": max,
            "top1_same": same,
            "ln_p_lost": lost.mean(),
            "ln_p_lost_error": lost.mean_error(),
            "ppl_dense": found.dense.ppl(),
            "ppl": found.measured.ppl(),
            "scored_tokens": kl.len(),
            "windows": windows.len(),
            "ctx": args.windows.ctx,
            "lossy": lossy(&options),
            "saved": saved(&measured),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "{}", lossy_line(&options))?;
        writeln!(
            out,
            "KL mean {average:.6}, p99 {p99:.5}, max {max:.4}; same top token {:.2} %",
            100.0 * same
        )?;
        writeln!(
            out,
            "PPL {:.4}, dense {:.4}; lost {:+.5} ± {:.5} nats a token, {} tokens",
            found.measured.ppl(),
            found.dense.ppl(),
            lost.mean(),
            lost.mean_error(),
            kl.len()
        )?;
        if let Some(line) = ui::delta_line(&measured.work().delta) {
            writeln!(out, "{line}")?;
        }
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kl_of(a: &[f32], b: &[f32]) -> f64 {
        kl(a, LogSoftmax::of(a), b, LogSoftmax::of(b))
    }

    #[test]
    fn divergence_of_two_coins() {
        // p = 1/2, q = 1/4: ln 2 / 2 + ln(2/3) / 2
        let ln3 = 3f32.ln();
        let expected = 0.5 * (2f64.ln() + (2.0f64 / 3.0).ln());
        assert!((kl_of(&[0.0, 0.0], &[0.0, ln3]) - expected).abs() < 1e-6);
        // What is the same is nothing apart, to the bit, and shifts do not matter.
        assert_eq!(kl_of(&[0.3, -1.7, 5.0], &[0.3, -1.7, 5.0]), 0.0);
        assert!(kl_of(&[0.0, 1.0], &[2.0, 3.0]) < 1e-7);
    }

    #[test]
    fn quantiles_are_values_that_occur() {
        let sorted: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&sorted, 0.99), 99.0);
        assert_eq!(quantile(&sorted, 1.0), 100.0);
        assert_eq!(quantile(&sorted[..1], 0.5), 1.0);
    }
}
