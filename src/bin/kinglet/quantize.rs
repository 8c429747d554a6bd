//! `kinglet quantize IN OUT TYPE`

use std::ops::ControlFlow;

use kinglet::model::quantize::{Mix, Options, quantize_file};

use crate::args::QuantizeArgs;
use crate::failure::{Failure, Outcome};
use crate::{interrupt, ui};

pub fn run(args: &QuantizeArgs) -> Outcome {
    let Some(to) = Mix::from_name(&args.to) else {
        let names: Vec<_> = Mix::ALL.iter().map(|mix| mix.name()).collect();
        let found = &args.to;
        return Err(Failure::usage(format!(
            "no format `{found}`; there are {}",
            names.join(", ")
        )));
    };
    let options = Options {
        to,
        threads: args.threads.unwrap_or(0).into(),
        allow_requantize: args.allow_requantize,
    };
    let _busy = interrupt::busy();
    let bar = ui::progress("quantizing", 0, "{bytes}/{total_bytes}");
    let summary = quantize_file(&args.input, &args.output, &options, &mut |progress| {
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
        if interrupt::hit() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    bar.finish_and_clear();
    let summary = summary?;
    ui::note(&format!(
        "{}: {} tensors, {} to {}",
        args.output.display(),
        summary.tensors,
        ui::bytes(summary.bytes_in),
        ui::bytes(summary.bytes_out),
    ));
    if summary.fallbacks > 0 {
        let n = summary.fallbacks;
        ui::note(&format!(
            "{n} tensors got a larger format: their rows are no whole number of blocks"
        ));
    }
    Ok(())
}
