//! The roofline of this machine: kept in the cache folder, measured when it is missing there.

use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::roofline::{self, Effort};
use kinglet::profile::Roofline;
use kinglet::profile::roofline::{Resource, cache_folder};

use crate::failure::Outcome;
use crate::ui;

/// Thousandths of the time that other programs may take before a measurement is not worth keeping.
const MAX_DISTURBED: u64 = 50;

/// Whether to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Measure {
    /// Again.
    Always,
    /// What is not kept.
    Missing,
    /// Nothing.
    Never,
}

/// The rates with `n_threads`.
pub fn roofline(n_threads: usize, measure: Measure) -> Outcome<Option<Roofline>> {
    let folder = cache_folder();
    let kept = folder
        .as_deref()
        .filter(|_| measure != Measure::Always)
        .and_then(|folder| Roofline::load(folder, &roofline::key(n_threads)));
    if kept.is_some() || measure == Measure::Never {
        return Ok(kept);
    }
    let effort = Effort::for_this_machine();
    ui::note(&format!(
        "measuring this machine with {n_threads} thread{}, once: memory of {}, products of bytes and floats",
        if n_threads == 1 { "" } else { "s" },
        ui::bytes(effort.buffer_bytes as u64)
    ));
    let measured = roofline::measure(n_threads, &effort)?;
    if measured.disturbed > MAX_DISTURBED {
        ui::note(&format!(
            "note: other programs had the cores for {} % of that time, so the measurement is not kept",
            measured.disturbed / 10
        ));
        return Ok(Some(measured));
    }
    match folder.map(|folder| measured.save(&folder)) {
        Some(Ok(_)) => {}
        Some(Err(error)) => ui::note(&format!("note: the measurement is not kept: {error}")),
        None => ui::note("note: the measurement is not kept: no HOME and no XDG_CACHE_HOME"),
    }
    Ok(Some(measured))
}

/// The best rate of `resource`, of computing with the levels that KINGLET_ISA allows.
pub fn best(roofline: &Roofline, resource: Resource) -> Option<f64> {
    let reads = !matches!(resource, Resource::Int8 | Resource::Bf16 | Resource::F32);
    let usable = |level: &str| reads || Isa::from_name(level).is_some_and(Isa::usable);
    let best = roofline.best(resource, usable)?;
    Some(best.per_second as f64)
}

/// A table: a line for each kind of memory and each level that computes, a column for each number of threads.
pub fn table(rooflines: &[Roofline]) -> String {
    let mut lines = Vec::new();
    let mut line = |name: String, cell: &dyn Fn(&Roofline) -> Option<String>, kernel: String| {
        let cells: Vec<Option<String>> = rooflines.iter().map(cell).collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells
                .into_iter()
                .map(|cell| format!("{:>14}", cell.unwrap_or_else(|| "unknown".into())));
            lines.push(format!(
                "  {name:<20}{}  {kernel}",
                cells.collect::<String>()
            ));
        }
    };
    let threads = &|r: &Roofline| Some(r.key.n_threads.to_string());
    line("threads".into(), threads, String::new());
    for (resource, name) in [
        (Resource::Anonymous, "read, memory"),
        (Resource::HugePages, "read, huge pages"),
        (Resource::Mapped, "read, mapped file"),
    ] {
        let best = |r: &Roofline| r.best(resource, |_| true).cloned();
        let kernels: Vec<String> = rooflines
            .iter()
            .filter_map(best)
            .map(|rate| rate.kernel)
            .collect();
        let mut kernels = kernels;
        kernels.dedup();
        let cell =
            &|r: &Roofline| best(r).map(|rate| format!("{:.1} GB/s", rate.per_second as f64 / 1e9));
        line(name.into(), cell, kernels.join(", "));
    }
    for (resource, name, unit) in [
        (Resource::Int8, "int8", "GOP/s"),
        (Resource::Bf16, "bf16", "GFLOP/s"),
        (Resource::F32, "f32", "GFLOP/s"),
    ] {
        for level in Isa::ALL.iter().rev().map(|isa| isa.name()) {
            let best = |r: &Roofline| r.best(resource, |l| l == level).cloned();
            let cell = &|r: &Roofline| {
                best(r).map(|rate| format!("{:.0} {unit}", rate.per_second as f64 / 1e9))
            };
            line(format!("{name}, {level}"), cell, String::new());
        }
    }
    lines
        .iter()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}
