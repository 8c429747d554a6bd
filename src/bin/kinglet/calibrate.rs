//! `kinglet calibrate delta MODEL TEXT`

use std::io::{self, Write};
use std::ops::ControlFlow;

use kinglet::session::calibration;
use kinglet::tokenizer::Special;
use serde_json::json;

use crate::args::{CalibrateArgs, CalibrateCommand, DeltaArgs};
use crate::failure::{Failure, Outcome};
use crate::{interrupt, locate, ui};

pub fn run(args: &CalibrateArgs) -> Outcome {
    match &args.what {
        CalibrateCommand::Delta(args) => delta(args),
    }
}

fn delta(args: &DeltaArgs) -> Outcome {
    let text = ui::read_prompt(&args.text)?;
    let model = locate::load(&args.model)?;
    let mut tokens = model.tokenizer()?.encode_with_bos(&text, Special::Text);
    tokens.truncate(args.tokens);
    let _busy = interrupt::busy();
    let bar = ui::progress("calibrating", tokens.len() as u64, "{pos}/{len}");
    let factors = calibration::calibrate(&model, &tokens, &mut |done, of| {
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
    let factors = factors?;
    calibration::write(&factors, &args.output)?;
    let mut out = io::stdout().lock();
    let mean = |of: &[f32]| of.iter().sum::<f32>() / of.len().max(1) as f32;
    if args.json {
        let means: Vec<f32> = factors.layers.iter().map(|of| mean(of)).collect();
        let json = json!({ "tokens": tokens.len(), "layers": means, "file": args.output });
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
