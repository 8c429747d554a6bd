//! `kinglet bench`: speed of models, with llama-bench's flags, test names and columns.
//!
//! Each test is run once untimed, then `-r` times. A past (`-d`) is read once and the session cut back to it before
//! each repetition. Times of tokenizing and sampling are not in it.

mod busy;
mod kernel;
pub mod output;
mod plan;
mod report;
mod start;
mod stats;
mod sustained;
pub mod timeline;

pub use self::busy::spin;

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::cpu::roofline;
use kinglet::backend::cpu::table::{self, Operations};
use kinglet::model::quantize::Mix;
use kinglet::profile::machine::{self, Resident};
use kinglet::profile::roofline::Resource;
use kinglet::{BackendKind, KvType, KvTypes, LoadOptions, Model, Session, SessionOptions};

use crate::args::BenchArgs;
use crate::failure::{Failure, Outcome};
use crate::limits::{self, Measure};
use crate::{interrupt, locate, ui};

use self::busy::Busy;
use self::output::Printer;
use self::plan::{Group, Test};
use self::report::{Limits, ModelCard, Row, Shown};
use self::timeline::{Runner, Sample};

pub fn run(args: &BenchArgs) -> Outcome {
    if args.list_kernels || args.kernel.iter().any(|name| name == "list") {
        return kernel::list();
    }
    if !args.kernel.is_empty() {
        return kernel::run(args);
    }
    let groups = plan::groups(args)?;
    let _watched = interrupt::busy();
    if let Some(n_prompt) = args.first_token {
        return run_starts(&groups, n_prompt, args);
    }
    if let Some(total) = args.sustained {
        return run_sustained(&groups, total, args);
    }
    let details = if args.details {
        report::details()
    } else {
        Vec::new()
    };
    for engine in plan::engines(args)? {
        let sets = engine.built_for();
        if !sets.is_empty() {
            ui::note(&format!(
                "{} is built for {}",
                engine.name(),
                sets.join(", ")
            ));
        }
    }
    let mut printer = Printer::new(args.output, report::columns(&groups), details);
    let shown = Shown::new(&groups);
    let measured = groups
        .iter()
        .try_for_each(|group| run_group(group, args, &shown, &mut printer));
    // What was measured before an error or Ctrl-C stays readable.
    printer.end()?;
    measured
}

fn run_group(group: &Group, args: &BenchArgs, shown: &Shown, printer: &mut Printer) -> Outcome {
    let engines = plan::engines(args)?;
    let mut sessions = engines
        .iter()
        .map(|engine| open(group, *engine, args))
        .collect::<Outcome<Vec<_>>>()?;
    let model = sessions[0].model().clone();
    let card = card(&model, group.kv);
    let limits = limits(&model, group, args)?;
    let mut runners: Vec<Runner> = sessions
        .iter_mut()
        .map(|session| {
            Runner::new(session, &model, group.n_batch, args.stretch).greedy(args.greedy)
        })
        .collect();
    let _busy = Busy::start(args.n_busy())?;
    for test in &group.tests {
        wait(args.delay)?;
        let time = rfc3339(SystemTime::now());
        Resident::reset_peak(); // else the peak is that of all tests so far
        let start = Instant::now();
        let (samples, memory) = samples(&mut runners, test, args, &card.kind)?;
        let wall = start.elapsed();
        for (engine, samples) in engines.iter().zip(samples) {
            let row = Row {
                group,
                engine: *engine,
                model: &card,
                limits: &limits,
                test: *test,
                time: time.clone(),
                wall,
                samples,
                memory,
                n_busy: args.n_busy(),
            };
            printer.row(row.record(shown))?;
        }
    }
    Ok(())
}

/// A session with room for all tests of a group.
fn open(group: &Group, backend: BackendKind, args: &BenchArgs) -> Outcome<Session> {
    let chosen = args.device.chosen()?;
    let mut load = LoadOptions {
        device: chosen.and_then(|(_, device)| device),
        threads: group.n_threads,
        threads_batch: group.n_threads_batch,
        backend,
        memory: args.budget.memory(),
        on_exceed: args.budget.on_exceed(),
        experts: args.budget.experts(),
        repack: args.budget.repack(),
        ..LoadOptions::default()
    };
    let n_ctx = group
        .tests
        .iter()
        .map(|test| test.n_depth + test.n_tokens());
    let options = SessionOptions {
        n_ctx: n_ctx.max().unwrap_or(0),
        kv: group.kv,
        sparsity: group.sparsity,
        predictor: group.predictor.clone(),
        delta: group.delta.clone(),
        batch: group.n_ubatch,
    };
    args.device.share(&mut load);
    locate::fit_gpu(&group.model, &mut load, &options)?;
    let session = Session::new(&Model::load(&group.model, &load)?, &options)?;
    for concession in session.concessions() {
        ui::note(&format!("{}: {concession}", backend.name()));
    }
    Ok(session)
}

/// Decoding for a long time, instead of the tests.
fn run_sustained(groups: &[Group], total: Duration, args: &BenchArgs) -> Outcome {
    let mut printer = Printer::new(args.output, sustained::columns(), Vec::new());
    let mut measured = groups.iter().try_for_each(|group| -> Outcome {
        let mut session = open(group, BackendKind::Cpu, args)?;
        let model = session.model().clone();
        let card = card(&model, group.kv);
        let runner = Runner::new(&mut session, &model, group.n_batch, args.stretch);
        let mut runner = runner.greedy(args.greedy);
        let _busy = Busy::start(args.n_busy())?;
        for test in group.tests.iter().filter(|test| test.n_prompt == 0) {
            wait(args.delay)?;
            let time = rfc3339(SystemTime::now());
            if !args.no_warmup {
                runner.warm_up(test)?;
            }
            let stretches = sustained::run(&mut runner, test, total)?;
            for i in 0..stretches.len() {
                let row = sustained::record(group, &card, test, &time, total, &stretches, i);
                printer.row(row)?;
            }
        }
        Ok(())
    });
    if measured.is_ok()
        && !groups
            .iter()
            .any(|g| g.tests.iter().any(|t| t.n_prompt == 0))
    {
        measured = Err(Failure::usage("--sustained: expected a -n above 0"));
    }
    printer.end()?;
    measured
}

/// New processes up to their first token, instead of the tests.
fn run_starts(groups: &[Group], n_prompt: usize, args: &BenchArgs) -> Outcome {
    let mut printer = Printer::new(args.output, start::columns(), Vec::new());
    let measured = groups.iter().try_for_each(|group| -> Outcome {
        let model = Model::load(&group.model, &LoadOptions::default())?;
        let prompt = start::prompt(&model, n_prompt)?;
        let card = card(&model, group.kv);
        drop(model);
        let time = rfc3339(SystemTime::now());
        let _busy = Busy::start(args.n_busy())?;
        let once = || -> Outcome<Duration> {
            if interrupt::hit() {
                return Err(Failure::Interrupted);
            }
            start::first_token(group, &prompt)
        };
        if !args.no_warmup {
            once()?; // the file may not be in memory yet
        }
        let times = (0..args.repetitions).map(|_| once());
        let times = times.collect::<Outcome<Vec<_>>>()?;
        printer.row(start::record(
            group,
            &card,
            n_prompt,
            args.n_busy(),
            time,
            &times,
        ))
    });
    printer.end()?;
    measured
}

/// All repetitions of each runner, which take turns, and the most memory that was held after one.
fn samples(
    runners: &mut [Runner],
    test: &Test,
    args: &BenchArgs,
    what: &str,
) -> Outcome<(Vec<Vec<Sample>>, Option<Resident>)> {
    let bar = ui::progress("measuring", args.repetitions as u64, "{pos}/{len} {prefix}");
    bar.set_prefix(format!("{test} {}", ui::one_line(what)));
    let mut samples = vec![Vec::new(); runners.len()];
    let mut memory: Option<Resident> = None;
    let mut run = || -> Outcome {
        if !args.no_warmup {
            runners
                .iter_mut()
                .try_for_each(|runner| runner.warm_up(test))?;
        }
        for _ in 0..args.repetitions {
            for (runner, samples) in runners.iter_mut().zip(&mut samples) {
                samples.push(runner.repeat(test)?);
                let now = Resident::now();
                memory = memory.into_iter().chain(now).reduce(Resident::most);
            }
            bar.inc(1);
        }
        Ok(())
    };
    let measured = run();
    bar.finish_and_clear();
    measured.map(|()| (samples, memory))
}

/// The roofline, and how fast this very file is read by the same loops: small models lie in a cache.
fn limits(model: &Model, group: &Group, args: &BenchArgs) -> Outcome<Limits> {
    let measure = if args.no_measure {
        Measure::Never
    } else {
        Measure::Missing
    };
    let roofline = limits::roofline(group.n_threads, measure)?;
    let best = |resource| roofline.as_ref().and_then(|r| limits::best(r, resource));
    // Reading the file would make warm what is to be timed cold.
    let read_model = if args.no_measure || args.no_warmup {
        None
    } else {
        read_model(model, group.n_threads)?
    };
    Ok(Limits {
        read: best(Resource::Mapped).or_else(|| best(Resource::Anonymous)),
        read_model,
        int8: best(Resource::Int8),
        bf16: best(Resource::Bf16),
        f32: best(Resource::F32),
        cache_bytes: machine::last_level_cache(),
    })
}

/// How fast the file of a model is read by the loops of the roofline.
pub fn read_model(model: &Model, n_threads: usize) -> Outcome<Option<f64>> {
    let gguf = model.gguf();
    let tensors = gguf.tensors().map(|tensor| gguf.raw(&tensor.name));
    let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
    let parts: Vec<&[u8]> = tensors.iter().map(|bytes| &**bytes).collect();
    let pool = Pool::new(n_threads)?;
    let rates = roofline::read_rates(Resource::Mapped, &pool, &parts, Duration::from_millis(200));
    Ok(rates
        .iter()
        .map(|rate| rate.per_second as f64)
        .reduce(f64::max))
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

fn card(model: &Model, kv: KvTypes) -> ModelCard {
    let info = model.info();
    let meta = model.gguf().metadata();
    let id = meta.get("general.file_type").and_then(|v| v.as_integer());
    let mix = Mix::ALL
        .iter()
        .find(|mix| id == Some(i128::from(mix.file_type())));
    let mix = mix.map_or("mixed", |mix| mix.name());
    let millions = info.n_params as f64 / 1e6;
    let size = if millions < 1000.0 {
        format!("{millions:.0}M")
    } else {
        format!("{:.1}B", millions / 1e3)
    };
    ModelCard {
        kind: format!("{} {size} {mix}", info.config.architecture),
        bytes: info.weight_bytes,
        n_params: info.n_params,
        kernels: kernels(model, kv),
    }
}

/// The rows of the kernel table that a model uses: for each format of its matrices, then of the other operations.
fn kernels(model: &Model, kv: KvTypes) -> Vec<&'static str> {
    let tensors = model.gguf().tensors();
    // The taps of a convolution are a table, not a matrix that something is multiplied with.
    let matrices = tensors.filter(|t| t.dims().len() > 1 && !t.name.contains("shortconv.conv"));
    let formats: BTreeSet<_> = matrices
        .filter_map(|t| t.dtype.dtype())
        .map(|dtype| (dtype as u32, dtype.name()))
        .collect();
    let mut rows = Vec::new();
    for (id, _) in formats {
        let dtype = kinglet::quant::DType::from_id(id).expect("the number of a format");
        let panels = (model.copied_bytes() > 0).then(|| table::gemv_panels(dtype));
        let one = panels.flatten().or_else(|| table::gemv(dtype));
        rows.extend(one.map(|row| row.name()));
        let many = table::tiles(dtype).or_else(|| table::gemm(dtype));
        rows.extend(many.map(|row| row.name()));
        rows.extend(table::gated(dtype).map(|row| row.name()));
    }
    let ops = Operations::best();
    rows.push(ops.quantize.name());
    rows.push(ops.attend.name());
    let floats = kv.keys == KvType::F32 || kv.values == KvType::F32;
    if !floats && model.info().config.head_dim.is_multiple_of(64) {
        rows.extend(ops.attend_tiles.map(|row| row.name()));
    }
    if model.info().config.conv_reach > 0 {
        rows.push(ops.short_conv.name());
    }
    rows
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
