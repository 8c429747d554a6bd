//! The arguments that tell how attention is computed. Each needs another that uses it: one that nobody uses is an error, not
//! a run that is not what was asked for.

use std::path::Path;
use std::sync::Arc;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum};
use kinglet::backend::delta::{Delta, Exact, Factors};
use kinglet::backend::predictor::Predictor;
use kinglet::backend::select::Chunking;
use kinglet::session::{calibration, chunks};
use kinglet::sparsity::{Heads, Layers, Policy, Repair, Sparsity};

use crate::args::positive;

/// Which keys attention reads. All but `dense` lose something: `kinglet eval` tells how much.
#[derive(Args)]
#[command(next_help_heading = "Sparse attention")]
struct Given {
    /// DHSA: each token reads the chunks of keys that score best
    #[arg(long, value_name = "WHAT", default_value = "off", conflicts_with_all = ["block_topk", "window_sink"])]
    dhsa: Switch,
    /// Keys that a token reads with it, the first and the last included [default: 1024]
    #[arg(long, value_name = "N", value_parser = positive)]
    dhsa_budget: Option<usize>,
    /// Keys of a chunk: N, or some N up to where keys change the most, `shift:N`, or up to where it changes the most how
    /// later queries attend, `labels:N`, or up to where a predictor says so, `predict:N` [default: 16]
    #[arg(long, value_name = "N", value_parser = chunking)]
    dhsa_chunk: Option<Chunking>,
    /// A predictor from `calibrate chunks`
    #[arg(long, value_name = "FILE", value_parser = predictor)]
    dhsa_predictor: Option<Arc<Predictor>>,
    /// Whether heads of keys choose each by the mean of their queries, share one choice, let their queries vote, or go by
    /// the best query [default: each]
    #[arg(long, value_name = "WHAT")]
    dhsa_heads: Option<DhsaHeads>,
    /// What is done about keys that are left out: `off`, `pooled` for the means of each chunk with the weight of all of it,
    /// `delta:N` to read everything every N tokens and to add the difference to those after it [default: off]
    #[arg(long, visible_alias = "dhsa-repair", value_name = "WHAT", value_parser = repair)]
    repair: Option<Repair>,
    /// Each token reads the blocks of 64 keys whose pooled keys score best, N keys in all
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "window_sink")]
    block_topk: Option<usize>,
    /// Each token reads the first keys and the last, N in all
    #[arg(long, value_name = "N", value_parser = positive)]
    window_sink: Option<usize>,
    /// Of the keys that it sees a token reads this many per cent, where that is more than N [default: 0]
    #[arg(long, value_name = "PERCENT")]
    budget_share: Option<usize>,
    /// Layers that read everything all the same, such as 0,7
    #[arg(long, value_name = "LAYERS")]
    dense_layers: Option<Layers>,
    /// DeltaLLM: scores with keys far back from what changes from key to key by more than this in a channel; 0: all
    #[arg(long, value_name = "RATE", value_parser = rate, conflicts_with_all = ["dhsa", "block_topk", "window_sink"])]
    delta: Option<f32>,
    /// Thresholds from `calibrate delta`, times RATE
    #[arg(long, value_name = "FILE", value_parser = factors)]
    delta_file: Option<Arc<Factors>>,
    /// Keys up to a token that it scores exactly, or `block:N`: those of its own block of N [default: 64]
    #[arg(long, value_name = "N", value_parser = exact)]
    delta_exact: Option<Exact>,
    /// Keys from one that is kept whole to the next: 32, 64, 128 or 256 [default: 64]
    #[arg(long, value_name = "N", value_parser = positive)]
    delta_frame: Option<usize>,
    /// Also where that is slower than dense attention: to measure what it costs
    #[arg(long)]
    delta_always: bool,
    /// First keys that are always read [default: 4]
    #[arg(long, value_name = "N")]
    sink: Option<usize>,
    /// Last keys that are always read [default: 128]
    #[arg(long, value_name = "N", value_parser = positive)]
    local: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DhsaHeads {
    Each,
    Shared,
    Vote,
    Best,
}

fn rate(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(x) if x >= 0.0 && f32::is_finite(x) => Ok(x),
        _ => Err("expected a number from 0".into()),
    }
}

fn factors(path: &str) -> Result<Arc<Factors>, String> {
    let factors = calibration::read(Path::new(path)).map_err(|e| e.to_string())?;
    Ok(Arc::new(factors))
}

/// `64` or `block:64`.
fn exact(text: &str) -> Result<Exact, String> {
    match text.strip_prefix("block:") {
        Some(n) => Ok(Exact::Block(positive(n)?)),
        None => Ok(Exact::Last(positive(text)?)),
    }
}

fn predictor(path: &str) -> Result<Arc<Predictor>, String> {
    let predictor = chunks::read(Path::new(path)).map_err(|e| e.to_string())?;
    Ok(Arc::new(predictor))
}

/// `16`, `shift:16`, `labels:16` or `predict:16`.
fn chunking(text: &str) -> Result<Chunking, String> {
    match text.split_once(':') {
        Some(("shift", n)) => Ok(Chunking::Shift(positive(n)?)),
        Some(("labels", n)) => Ok(Chunking::Labels(positive(n)?)),
        Some(("predict", n)) => Ok(Chunking::Predict(positive(n)?)),
        Some(_) => Err("expected a number N, shift:N, labels:N or predict:N".into()),
        None => Ok(Chunking::Fixed(positive(text)?)),
    }
}

/// `off`, `pooled`, `delta` or `delta:64`.
fn repair(text: &str) -> Result<Repair, String> {
    match (text, text.strip_prefix("delta:")) {
        ("off", _) => Ok(Repair::None),
        ("pooled", _) => Ok(Repair::Pooled),
        ("delta", _) => Ok(Repair::Delta(Repair::DEFAULT_EVERY)),
        (_, Some(every)) => Ok(Repair::Delta(positive(every)?)),
        _ => Err("expected off, pooled or delta:N".into()),
    }
}

impl Given {
    /// An argument that nothing uses, and what would use it.
    fn unused(&self) -> Option<(&'static str, &'static str)> {
        const DHSA: &str = "--dhsa on";
        const CHOICE: &str = "--dhsa on or --block-topk";
        const POLICY: &str = "--dhsa on, --block-topk or --window-sink";
        const DELTA: &str = "--delta";
        const PREDICT: &str = "--dhsa-chunk predict:N";
        const PREDICTOR: &str = "--dhsa-predictor";
        let predicts = matches!(self.dhsa_chunk, Some(Chunking::Predict(_)));
        let predictor = self.dhsa_predictor.is_some();
        let dhsa = self.dhsa == Switch::On;
        let choice = dhsa || self.block_topk.is_some();
        let policy = choice || self.window_sink.is_some();
        let delta = self.delta.is_some();
        let given = [
            ("--dhsa-budget", self.dhsa_budget.is_some(), dhsa, DHSA),
            ("--dhsa-chunk", self.dhsa_chunk.is_some(), dhsa, DHSA),
            ("--dhsa-heads", self.dhsa_heads.is_some(), dhsa, DHSA),
            (PREDICT, predicts, predictor, PREDICTOR),
            (PREDICTOR, predictor, predicts, PREDICT),
            ("--repair", self.repair.is_some(), policy, POLICY),
            (
                "--budget-share",
                self.budget_share.is_some(),
                policy,
                POLICY,
            ),
            (
                "--dense-layers",
                self.dense_layers.is_some(),
                policy,
                POLICY,
            ),
            ("--sink", self.sink.is_some(), policy, POLICY),
            ("--local", self.local.is_some(), choice, CHOICE),
            ("--delta-file", self.delta_file.is_some(), delta, DELTA),
            ("--delta-exact", self.delta_exact.is_some(), delta, DELTA),
            ("--delta-frame", self.delta_frame.is_some(), delta, DELTA),
            ("--delta-always", self.delta_always, delta, DELTA),
        ];
        let mut unused = given
            .into_iter()
            .filter(|(_, is_given, is_used, _)| *is_given && !is_used);
        unused.next().map(|(name, _, _, needed)| (name, needed))
    }

    fn sparsity(&self) -> Sparsity {
        let (policy, budget) = match (self.dhsa, self.block_topk, self.window_sink) {
            (Switch::On, ..) => {
                let heads = match self.dhsa_heads {
                    Some(DhsaHeads::Each) | None => Heads::Each,
                    Some(DhsaHeads::Shared) => Heads::Shared,
                    Some(DhsaHeads::Vote) => Heads::Vote,
                    Some(DhsaHeads::Best) => Heads::Best,
                };
                let chunking = self.dhsa_chunk.unwrap_or(Chunking::Fixed(16));
                let budget = self.dhsa_budget.unwrap_or(1024);
                (Policy::Dhsa { chunking, heads }, budget)
            }
            (_, Some(budget), _) => (Policy::Blocks, budget),
            (_, _, Some(budget)) => (Policy::Window, budget),
            _ => return Sparsity::default(),
        };
        let usual = Sparsity::new(policy, budget);
        Sparsity {
            per_cent: self.budget_share.unwrap_or(usual.per_cent),
            dense_layers: self.dense_layers.unwrap_or_default(),
            repair: self.repair.unwrap_or_default(),
            sink: self.sink.unwrap_or(usual.sink),
            local: self.local.unwrap_or(usual.local),
            ..usual
        }
    }

    fn delta(&self) -> Option<Arc<Delta>> {
        let delta = Delta::new(self.delta?);
        Some(Arc::new(Delta {
            factors: self.delta_file.clone(),
            exact: self.delta_exact.unwrap_or(delta.exact),
            frame: self.delta_frame.unwrap_or(delta.frame),
            always: self.delta_always,
            ..delta
        }))
    }
}

/// How attention is computed.
pub struct AttentionArgs {
    pub sparsity: Sparsity,
    pub predictor: Option<Arc<Predictor>>,
    pub delta: Option<Arc<Delta>>,
}

impl Args for AttentionArgs {
    fn augment_args(command: Command) -> Command {
        Given::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Given::augment_args_for_update(command)
    }
}

impl FromArgMatches for AttentionArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = Given::from_arg_matches(matches)?;
        match given.unused() {
            None => Ok(Self {
                sparsity: given.sparsity(),
                predictor: given.dhsa_predictor.clone(),
                delta: given.delta(),
            }),
            Some((name, needed)) => Err(clap::Error::raw(
                ErrorKind::MissingRequiredArgument,
                format!("{name}: expected {needed} beside it, found none"),
            )),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
