//! `kinglet bench`: speed of models, with llama-bench's flags, test names and columns.
//!
//! Each test is run once untimed, then `-r` times. A past (`-d`) is read once and the session cut back to it before
//! each repetition. Times of tokenizing and sampling are not in it.

mod plan;
mod report;
mod stats;
mod timeline;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kinglet::model::quantize::Mix;
use kinglet::{LoadOptions, Model, Session, SessionOptions};

use crate::args::BenchArgs;
use crate::failure::{Failure, Outcome};
use crate::{interrupt, ui};

use self::plan::{Engine, Group, Test};
use self::report::{ModelCard, Printer, Row};
use self::timeline::{Runner, Timeline, Tokens};

pub fn run(args: &BenchArgs) -> Outcome {
    let groups = plan::groups(args)?;
    let _busy = interrupt::busy();
    let mut printer = Printer::new(args.output, &groups, kinglet::profile::machine::cpu_name());
    let measured = groups
        .iter()
        .try_for_each(|group| run_group(group, args, &mut printer));
    // What was measured before an error or Ctrl-C stays readable.
    printer.end()?;
    measured
}

fn run_group(group: &Group, args: &BenchArgs, printer: &mut Printer) -> Outcome {
    let threads = group.n_threads;
    let model = Model::load(
        &group.model,
        &LoadOptions {
            threads,
            ..LoadOptions::default()
        },
    )?;
    let tokenizer = model.tokenizer().ok();
    let bos = tokenizer.and_then(|t| t.bos().filter(|_| t.add_bos()));
    let n_ctx = group
        .tests
        .iter()
        .map(|test| test.n_depth + test.n_tokens());
    let card = card(&model);
    for engine in [Engine::Cpu] {
        let mut timeline: Box<dyn Timeline> = match engine {
            Engine::Cpu => Box::new(Session::new(
                &model,
                &SessionOptions {
                    n_ctx: n_ctx.clone().max().unwrap_or(0),
                    kv: group.kv,
                    batch: group.n_ubatch,
                },
            )?),
        };
        let mut runner = Runner {
            timeline: &mut *timeline,
            tokens: Tokens::new(bos, model.info().config.n_vocab),
            n_batch: group.n_batch,
            depth: 0,
        };
        for test in &group.tests {
            wait(args.delay)?;
            let time = rfc3339(SystemTime::now());
            let samples = samples(&mut runner, test, args, &card.kind)?;
            printer.row(&Row {
                group,
                engine,
                model: &card,
                test: *test,
                time,
                samples,
            })?;
        }
    }
    Ok(())
}

fn samples(
    runner: &mut Runner,
    test: &Test,
    args: &BenchArgs,
    what: &str,
) -> Outcome<Vec<timeline::Sample>> {
    let bar = ui::progress("measuring", args.repetitions as u64, "{pos}/{len} {prefix}");
    bar.set_prefix(format!("{test} {}", ui::one_line(what)));
    let mut run = || -> Outcome<Vec<timeline::Sample>> {
        if !args.no_warmup {
            runner.warm_up(test)?;
        }
        let repeat = |_| {
            bar.inc(1);
            runner.repeat(test)
        };
        (0..args.repetitions).map(repeat).collect()
    };
    let samples = run();
    bar.finish_and_clear();
    samples
}

/// Lets the machine cool off.
fn wait(seconds: u64) -> Outcome {
    for _ in 0..10 * seconds {
        if interrupt::hit() {
            return Err(Failure::Interrupted);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn card(model: &Model) -> ModelCard {
    let info = model.info();
    let meta = model.gguf().metadata();
    let id = meta.get("general.file_type").and_then(|v| v.as_integer());
    let mix = Mix::ALL
        .iter()
        .find(|mix| id == Some(i128::from(mix.file_type())));
    let mix = mix.map_or("mixed", |mix| mix.name());
    let millions = info.n_params as f64 / 1e6;
    let size = match meta.opt_str("general.size_label") {
        Ok(Some(label)) => label.to_owned(),
        _ if millions < 1000.0 => format!("{millions:.0}M"),
        _ => format!("{:.1}B", millions / 1e3),
    };
    ModelCard {
        kind: format!("{} {size} {mix}", info.config.architecture),
        bytes: info.weight_bytes,
        n_params: info.n_params,
    }
}

/// `2026-03-01T12:00:00Z`.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Howard Hinnant, "chrono-compatible low-level date algorithms": years begin in March, 400 of them are an era.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day + 2) / 153;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year + u64::from(month <= 2);
    let day = day - (153 * from_march + 2) / 5 + 1;
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, date) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_799, "2000-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), date);
        }
    }
}
