//! `kinglet experts replay TRACE`: what each policy had kept in memory, for several numbers of slots.

use std::io::{self, Write};

use kinglet::experts::replay::{Outcome, ReplayPolicy, replay, slot_bounds};
use kinglet::experts::trace::Trace;
use serde_json::json;

use crate::args::{ExpertsCommand, ReplayArgs};
use crate::failure::{Failure, Outcome as Done};
use crate::ui;

pub fn run(command: &ExpertsCommand) -> Done {
    match command {
        ExpertsCommand::Replay(args) => replay_all(args),
    }
}

/// One policy with one number of slots.
struct Row {
    n_slots: usize,
    policy: &'static str,
    /// `None`: the run held more experts at once than there are slots.
    outcome: Option<Outcome>,
}

fn replay_all(args: &ReplayArgs) -> Done {
    let trace = Trace::open(&args.trace)?;
    let (least, cycle) = slot_bounds(&trace);
    let all = trace.n_experts();
    let slots = match args.slots.as_slice() {
        [] => some_slots(least, cycle, all),
        given => given.to_vec(),
    };
    if slots.contains(&0) {
        return Err(Failure::usage("--slots: expected at least 1, found 0"));
    }
    let mut rows = Vec::new();
    for n_slots in slots {
        for policy in ReplayPolicy::ALL {
            rows.push(Row {
                n_slots,
                policy: policy.name(),
                outcome: replay(&trace, n_slots, policy).ok(),
            });
        }
    }
    if rows.iter().all(|row| row.outcome.is_none()) {
        return Err(Failure::usage(
            "--slots: the run held more experts at once; give more slots",
        ));
    }
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        for row in &rows {
            writeln!(out, "{}", as_json(row))?;
        }
    } else {
        let hits = trace.uses.iter().filter(|used| used.hit).count();
        writeln!(
            out,
            "{} tokens, {} uses of {all} experts; at least {least} slots, a token takes {cycle}; the run itself hit {:.1} %\n",
            trace.n_tokens(),
            trace.uses.len(),
            100.0 * hits as f64 / trace.uses.len().max(1) as f64
        )?;
        writeln!(out, "  slots  policy           hits  read per token")?;
        for row in &rows {
            let Row {
                n_slots, policy, ..
            } = row;
            match &row.outcome {
                Some(outcome) => writeln!(
                    out,
                    "{n_slots:7}  {policy:<15} {:4.1} %  {}",
                    100.0 * outcome.hit_rate(),
                    ui::bytes(outcome.bytes_per_token() as u64)
                )?,
                None => writeln!(out, "{n_slots:7}  {policy:<15} too few slots")?,
            }
        }
    }
    out.flush()?;
    Ok(())
}

/// The bounds, and what lies between: an eighth, a quarter, a half of all.
fn some_slots(least: usize, cycle: usize, all: usize) -> Vec<usize> {
    let mut slots = vec![least, cycle, all / 8, all / 4, all / 2, all];
    slots.retain(|n| *n >= least);
    slots.sort();
    slots.dedup();
    slots
}

fn as_json(row: &Row) -> serde_json::Value {
    let mut line = json!({ "slots": row.n_slots, "policy": row.policy });
    if let Some(outcome) = &row.outcome {
        line["tokens"] = outcome.tokens.into();
        line["used"] = outcome.used.into();
        line["hits"] = outcome.hits.into();
        line["hit_rate"] = outcome.hit_rate().into();
        line["bytes_per_token"] = outcome.bytes_per_token().into();
        line["evictions"] = outcome.evictions.into();
    }
    line
}
