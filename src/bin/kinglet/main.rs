//! The command line: verbs, each in a file of its own, on the public API of the library.
//!
//! What a model says and what machines read goes to stdout, everything else to stderr.

mod args;
mod attention;
mod bench;
mod calibrate;
mod chat;
mod completions;
mod device;
mod doctor;
mod embed;
mod eval;
mod experts;
mod failure;
mod inspect;
mod interrupt;
mod limits;
mod locate;
mod plan;
mod profile;
mod quantize;
mod run;
mod show;
mod store;
mod tokenize;
mod ui;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::Outcome;

fn main() -> ExitCode {
    let arguments = args::spelled_out(std::env::args_os().collect());
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print(); // nobody is left to tell
            return ExitCode::from(if error.use_stderr() {
                failure::USAGE
            } else {
                0
            });
        }
    };
    interrupt::install();
    match dispatch(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn dispatch(command: Command) -> Outcome {
    match command {
        Command::Chat(args) => chat::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Embed(args) => embed::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Show(args) => show::run(&args),
        Command::Tokenize(args) => tokenize::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Spin => bench::spin(),
        Command::Profile(args) => profile::run(&args),
        Command::Experts(command) => experts::run(&command),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}
