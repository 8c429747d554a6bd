//! `kinglet profile`: where the time of each token goes, operation by operation, and how near that is to the limits of
//! the machine.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use kinglet::profile::report::{Phase, Row};
use kinglet::profile::roofline::Resource;
use kinglet::profile::{Limits, Profile, Recorder};
use kinglet::session::{load_profiled, run_profiled};
use kinglet::{Error, Model};

use crate::args::ProfileArgs;
use crate::bench::output::{Column, Table};
use crate::bench::timeline::Tokens;
use crate::failure::Outcome;
use crate::limits::{self, Measure};
use crate::{bench, interrupt, locate, ui};

pub fn run(args: &ProfileArgs) -> Outcome {
    let busy = interrupt::busy();
    let profile = profile(args)?;
    drop(busy);
    let write = |path: &Path, what: &dyn Fn(&mut dyn Write) -> io::Result<()>| -> Outcome {
        let file = File::create(path).map_err(|e| Error::io(path, e))?;
        let mut out = BufWriter::new(file);
        let written = what(&mut out).and_then(|()| out.flush());
        written.map_err(|e| Error::io(path, e))?;
        ui::note(&format!("wrote {}", path.display()));
        Ok(())
    };
    if let Some(path) = &args.trace {
        write(path, &|out| profile.write_chrome_trace(out))?;
    }
    if let Some(path) = &args.html {
        write(path, &|out| profile.write_html(out))?;
    }
    let mut out = BufWriter::new(io::stdout().lock());
    if args.json {
        serde_json::to_writer_pretty(&mut out, &profile.report).map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        print(&profile, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

/// Loads the model, reads a prompt, decodes a reply.
fn profile(args: &ProfileArgs) -> Outcome<Profile> {
    let path = locate::locate(args.model.name())?;
    let mut load = locate::options_within(&args.model, &args.budget)?;
    let n_gen = args.n_gen as usize;
    let mut options = args.session.options();
    if options.n_ctx == 0 {
        options.n_ctx = args.n_prompt + n_gen;
    }
    locate::fit_gpu(&path, &mut load, &options)?;
    let mut recorder = Recorder::default();
    let mut session = load_profiled(&mut recorder, &path, &load, &options)?;
    let prompt = Tokens::of(session.model(), None).run(args.n_prompt);
    let stop = &interrupt::hit;
    let about = run_profiled(&mut recorder, &mut session, &prompt, n_gen, stop)?;
    ui::note_fault(&session);
    // Afterwards, as it makes the file warm.
    let limits = limits(session.model(), args.no_measure)?;
    Ok(recorder.finish(about, limits))
}

fn limits(model: &Model, no_measure: bool) -> Outcome<Limits> {
    let measure = if no_measure {
        Measure::Never
    } else {
        Measure::Missing
    };
    let n_threads = model.n_threads();
    let roofline = limits::roofline(n_threads, measure)?;
    let best = |resource| roofline.as_ref().and_then(|r| limits::best(r, resource));
    Ok(Limits {
        memory: best(Resource::Mapped).or_else(|| best(Resource::Anonymous)),
        file: if no_measure {
            None
        } else {
            bench::read_model(model, n_threads)?
        },
        int8: best(Resource::Int8),
        bf16: best(Resource::Bf16),
        f32: best(Resource::F32),
    })
}

fn table() -> Table {
    Table::new(
        "",
        vec![
            Column::text("operation", 13),
            Column::number("count", 6),
            Column::number("ms", 9),
            Column::number("share", 7),
            Column::number("read", 10),
            Column::number("GB/s", 6),
            Column::number("GOP/s", 7),
            Column::number("% roof", 6),
            Column::number("wait ms", 7),
            Column::text("kernel", 26),
        ],
    )
}

fn print(profile: &Profile, out: &mut impl Write) -> Outcome {
    let (report, table) = (&profile.report, table());
    let about = &report.about;
    writeln!(
        out,
        "{}: {} of weights, threads: {}, {}\n",
        ui::one_line(&about.model),
        ui::bytes(about.weight_bytes),
        about.n_threads,
        ui::one_line(about.cpu.as_deref().unwrap_or("unknown CPU")),
    )?;
    for phase in &report.phases {
        writeln!(out, "{}", headline(phase))?;
        writeln!(out, "  {}", system(phase, report.energy_source.as_deref()))?;
        write!(out, "{}", table.head())?;
        for row in &phase.operations {
            write!(out, "{}", table.line(&cells(row)))?;
        }
        let rest = phase.time.saturating_sub(phase.explained);
        let mut cells = vec![String::new(); 10];
        cells[0] = "(between)".into();
        cells[2] = format!("{:.3}", ms(rest));
        cells[3] = percent(rest as f64 / phase.time.max(1) as f64);
        writeln!(out, "{}", table.line(&cells))?;
    }
    let limits = &report.limits;
    let known = [
        ("read from memory", limits.memory, "GB/s"),
        ("from this file", limits.file, "GB/s"),
        ("int8", limits.int8, "GOP/s"),
        ("bf16", limits.bf16, "GOP/s"),
        ("f32", limits.f32, "GOP/s"),
    ];
    let known = known.iter().filter_map(|(name, limit, unit)| {
        limit.map(|limit| format!("{name} {:.1} {unit}", limit / 1e9))
    });
    let known: Vec<String> = known.collect();
    if !known.is_empty() {
        writeln!(out, "limits: {}", known.join(", "))?;
    }
    if let Some(first) = report.first_token {
        writeln!(
            out,
            "time to the first token, from loading on: {:.1} ms",
            ms(first)
        )?;
    }
    if let Some(latency) = report.latency {
        let [p50, p95, p99, max] = [latency.p50, latency.p95, latency.p99, latency.max].map(ms);
        writeln!(
            out,
            "a token takes {p50:.3} ms (p50), {p95:.3} (p95), {p99:.3} (p99), {max:.3} at most"
        )?;
    }
    let peak = report.memory.iter().map(|m| m.anonymous + m.file).max();
    if let (Some(peak), Some(last)) = (peak, report.memory.last()) {
        writeln!(
            out,
            "memory: {} of its own and {} of files at the end, {} together at most",
            ui::bytes(last.anonymous),
            ui::bytes(last.file),
            ui::bytes(peak)
        )?;
    }
    if let Some(experts) = &about.experts {
        let hits = experts.layers.iter().map(|(used, hits)| match used {
            0 => dash(),
            _ => format!("{:.0}", 100.0 * *hits as f64 / *used as f64),
        });
        let hits: Vec<String> = hits.collect();
        writeln!(
            out,
            "experts: {} of {} in memory at once, {} each; {} goes first; read by {} threads, {}\n  in memory by layer, %: {}",
            experts.slots,
            experts.all,
            ui::bytes(experts.slot_bytes as u64),
            experts.policy,
            experts.io_threads,
            experts.disk,
            hits.join(" ")
        )?;
    }
    if report.dropped > 0 {
        writeln!(
            out,
            "{} operations were not written down: no room",
            report.dropped
        )?;
    }
    Ok(())
}

/// `decode: 63 tokens, 88.07 ms, 1.398 ms a token, 715.3 tok/s; 98.1 % in operations, at 61 % of the roofline`.
fn headline(phase: &Phase) -> String {
    let time = ms(phase.time);
    let mut line = format!("{}: ", phase.name);
    if phase.tokens > 0 {
        let (n, each) = (phase.tokens, time / phase.tokens as f64);
        let s = if n == 1 { "" } else { "s" };
        line += &format!("{n} token{s}, {time:.2} ms, {each:.3} ms a token, ");
        line += &format!("{:.1} tok/s; ", 1e3 / each);
    } else {
        line += &format!("{time:.2} ms; ");
    }
    line += &percent(phase.explained as f64 / phase.time.max(1) as f64);
    line += " in operations";
    if let Some(of) = phase.of_roofline {
        line += &format!(", those with weights at {} of the roofline", percent(of));
    }
    line
}

/// What the system says of a phase.
fn system(phase: &Phase, energy_source: Option<&str>) -> String {
    let mut parts = Vec::new();
    let na = || "n/a".to_owned();
    if phase.passes > 0 {
        let barriers = phase.work.regions as f64 / phase.passes as f64;
        let mut waits = format!(
            "{barriers:.0} barriers a pass, caller waited {:.2} ms",
            ms(phase.waited)
        );
        if let Some(idle) = phase.idle {
            waits += &format!(", other threads idle {:.2} ms", ms(idle));
        }
        parts.push(waits);
    }
    if let Some(share) = phase.work.share_read().filter(|share| *share < 1.0) {
        parts.push(format!(
            "attention read {} of the pairs that it might, {:.1} ms of all threads or of the GPU went to deciding which",
            percent(share),
            phase.work.decide_ns as f64 / 1e6
        ));
    }
    parts.extend(ui::delta_line(&phase.work.delta));
    if let Some(line) = ui::expert_line(&phase.work.experts, phase.tokens) {
        parts.push(format!("experts {line}"));
    }
    if phase.work.neurons > 0 {
        let share = phase.work.skipped_neurons as f64 / phase.work.neurons as f64;
        parts.push(format!("neurons skipped {}", percent(share)));
    }
    if let Some(counters) = &phase.counters {
        parts.push(format!(
            "faults {} minor, {} major",
            counters.minor_faults, counters.major_faults
        ));
        parts.push(format!(
            "read {}, I/O wait {}",
            counters.read_bytes.map_or_else(na, ui::bytes),
            counters
                .io_wait
                .map_or_else(na, |t| format!("{:.0} ms", ms(t)))
        ));
    }
    let tokens = phase.tokens.max(1) as f64;
    parts.push(match phase.energy.zip(energy_source) {
        Some((uj, source)) if phase.tokens > 0 => {
            format!(
                "energy {:.2} mJ a token ({source})",
                uj as f64 / 1e3 / tokens
            )
        }
        Some((uj, source)) => format!("energy {:.2} mJ ({source})", uj as f64 / 1e3),
        None => "energy n/a".into(),
    });
    let condition = &phase.condition;
    parts.push(format!(
        "clock {}, temperature {}",
        condition
            .mhz
            .map_or_else(na, |mhz| format!("{:.2} GHz", mhz / 1e3)),
        condition.celsius.map_or_else(na, |c| format!("{c:.0} C"))
    ));
    if let Some(throttled) = condition.throttled.filter(|n| *n > 0) {
        parts.push(format!(
            "throttled {throttled} times since the system began"
        ));
    }
    parts.join("; ")
}

fn cells(row: &Row) -> Vec<String> {
    let giga = |rate: Option<f64>| rate.map_or_else(dash, |rate| format!("{:.1}", rate / 1e9));
    vec![
        row.name.clone(),
        row.count.to_string(),
        format!("{:.3}", ms(row.time)),
        percent(row.share),
        match row.work.bytes() {
            0 => dash(),
            bytes => ui::bytes(bytes),
        },
        giga(row.bytes_per_second),
        giga(row.ops_per_second),
        row.of_roofline
            .map_or_else(dash, |of| format!("{:.1}", 100.0 * of)),
        match row.waited {
            0 => dash(),
            waited => format!("{:.3}", ms(waited)),
        },
        if row.kernel.is_empty() {
            dash()
        } else {
            row.kernel.clone()
        },
    ]
}

fn dash() -> String {
    "-".into()
}

fn ms(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
