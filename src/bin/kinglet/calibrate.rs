//! `kinglet calibrate delta|chunks MODEL -f TEXT -o FILE`

use std::io::{self, Write};
use std::ops::ControlFlow;

use kinglet::session::{calibration, chunks};
use kinglet::tokenizer::Special;
use kinglet::{Model, Result};
use serde_json::json;

use crate::args::{CalibrateArgs, CalibrateCommand, CalibrationArgs};
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

pub fn run(args: &CalibrateArgs) -> Outcome {
    match &args.what {
        CalibrateCommand::Delta(args) => delta(args),
        CalibrateCommand::Chunks(args) => chunks(args),
    }
}

/// Told how much of how much is done; may stop it.
type Progress<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

/// What `find` finds in the first tokens of the text, and how many these are.
fn found<T>(
    args: &CalibrationArgs,
    n_tokens: usize,
    find: fn(&Model, &[u32], Progress) -> Result<T>,
) -> Outcome<(T, usize)> {
    let text = ui::read_prompt(&args.text)?;
    let model = locate::load(&args.model)?;
    let mut tokens = model.tokenizer()?.encode_with_bos(&text, Special::Text);
    tokens.truncate(args.tokens.unwrap_or(n_tokens));
    let _busy = interrupt::busy();
    let bar = ui::progress("calibrating", tokens.len() as u64, "{pos}/{len}");
    let found = find(&model, &tokens, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
        match interrupt::hit() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    bar.finish_and_clear();
    if interrupt::hit() {
        return Err(Failure::Interrupted);
    }
    Ok((found?, tokens.len()))
}

fn chunks(args: &CalibrationArgs) -> Outcome {
    let (trained, n_tokens) = found(args, chunks::DEFAULT_TOKENS, chunks::train)?;
    chunks::write(&trained.predictor, &args.output)?;
    let mut out = io::stdout().lock();
    if args.json {
        let json = json!({
            "tokens": n_tokens,
            "gaps": trained.n_gaps,
            "losses": trained.losses,
            "held_out": {
                "gaps": trained.n_held_out,
                "loss": trained.loss,
                "labels": trained.labels,
                "accuracy": trained.accuracy,
            },
            "file": args.output,
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "gaps learnt from: {}", trained.n_gaps)?;
        for (epoch, loss) in trained.losses.iter().enumerate() {
            writeln!(out, "loss, epoch {}: {loss:.4}", epoch + 1)?;
        }
        writeln!(
            out,
            "of {} others: loss {:.4}, {:.1} % told right, {:.1} % are boundaries",
            trained.n_held_out,
            trained.loss,
            100.0 * trained.accuracy,
            100.0 * trained.labels
        )?;
    }
    out.flush()?;
    Ok(())
}

fn delta(args: &CalibrationArgs) -> Outcome {
    let (factors, n_tokens) = found(args, 2048, calibration::calibrate)?;
    calibration::write(&factors, &args.output)?;
    let mut out = io::stdout().lock();
    let mean = |of: &[f32]| of.iter().sum::<f32>() / of.len().max(1) as f32;
    if args.json {
        let means: Vec<f32> = factors.layers.iter().map(|of| mean(of)).collect();
        let json = json!({ "tokens": n_tokens, "layers": means, "file": args.output });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out, "thresholds at a rate of 1, means of layers:")?;
        for (i, of_layer) in factors.layers.iter().enumerate() {
            if !of_layer.is_empty() {
                writeln!(out, "{i:>5} {:.3}", mean(of_layer))?;
            }
        }
    }
    out.flush()?;
    Ok(())
}
