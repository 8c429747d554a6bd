//! `kinglet plan`: what a model will need and how fast it will be, from the header of its file alone.

use std::io::{self, Write};
use std::time::Duration;

#[cfg(feature = "gpu")]
use kinglet::BackendKind;
use kinglet::profile::roofline::Resource;
use kinglet::profile::{Roofline, machine};
#[cfg(feature = "gpu")]
use kinglet::session::GpuPlan;
use kinglet::session::{Plan, Rates, Speed, UNCERTAINTY};
use kinglet::{Error, Model};
use serde_json::{Value, json};

use crate::args::PlanArgs;
use crate::failure::Outcome;
use crate::limits::{self, Measure};
use crate::{locate, ui};

pub fn run(args: &PlanArgs) -> Outcome {
    let path = locate::locate(args.model.name())?;
    let load = locate::options_within(&args.model, &args.budget)?;
    let model = Model::outline(&path, &load)?;
    let asked = args.session.options();
    let whole = Plan::new(&model, &asked, args.n_prompt)?;
    let fitted = Plan::within(&model, &asked, args.n_prompt, &load);
    #[cfg(feature = "gpu")]
    let asked_plan = &whole;
    let report = Report {
        // What is told is what would run; where nothing would, what was asked for.
        plan: match &fitted {
            Ok(_) if args.budget.memory().is_none() => &whole,
            Ok(plan) => plan,
            Err(Error::OverBudget { .. }) => &whole,
            Err(_) => return Err(fitted.map(drop).expect_err("just seen").into()),
        },
        needed: whole.footprint.total(),
        memory: args.budget.memory(),
        available: machine::memory_available(),
        rates: rates(&model)?,
        #[cfg(feature = "gpu")]
        gpu: (load.backend == BackendKind::Gpu)
            .then(|| GpuPlan::new(&model, asked_plan, &load))
            .transpose()?,
        model: &model,
    };
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", report.json(fitted.is_ok()))?;
    } else {
        write!(out, "{}", report.text())?;
    }
    out.flush()?;
    // The plan is told in any case; the exit code says whether it would run.
    Ok(fitted.map(drop)?)
}

/// What `doctor` has measured, if it has.
fn rates(model: &Model) -> Outcome<Option<Rates>> {
    let roofline = limits::roofline(model.n_threads(), Measure::Never)?;
    let rates = |roofline: &Roofline| {
        let best = |resource| limits::best(roofline, resource);
        Some(Rates {
            read: best(Resource::Anonymous)?,
            int8: best(Resource::Int8)?,
            bf16: best(Resource::Bf16),
            f32: best(Resource::F32)?,
        })
    };
    Ok(roofline.as_ref().and_then(rates))
}

struct Report<'a> {
    model: &'a Model,
    plan: &'a Plan,
    /// Bytes of what was asked for.
    needed: u64,
    memory: Option<u64>,
    available: Option<u64>,
    rates: Option<Rates>,
    #[cfg(feature = "gpu")]
    gpu: Option<GpuPlan>,
}

impl Report<'_> {
    fn rows(&self) -> [(&'static str, u64, &'static str); 9] {
        let bytes = &self.plan.footprint;
        [
            ("weights", bytes.weights, "file"),
            ("copied weights", bytes.own_weights, "anonymous"),
            ("experts", bytes.experts, "anonymous"),
            ("keys and values", bytes.kv, "anonymous"),
            ("convolutions", bytes.conv, "anonymous"),
            ("scratch", bytes.scratch, "anonymous"),
            ("tokenizer", bytes.tokenizer, "anonymous"),
            ("runtime", bytes.runtime, "anonymous"),
            ("program", bytes.program, "file"),
        ]
    }

    fn text(&self) -> String {
        let (plan, bytes) = (self.plan, &self.plan.footprint);
        let options = &plan.options;
        let mut text = format!(
            "Memory: {}, context of {} full, steps of {}, {} keys and values, {} threads\n",
            ui::one_line(&self.model.info().name),
            options.n_ctx,
            options.batch,
            options.kv,
            self.model.n_threads()
        );
        for (name, n, kind) in self.rows().iter().filter(|row| row.1 > 0) {
            text += &format!("  {name:<16} {:>11}  {kind}\n", ui::bytes(*n));
        }
        text += &format!(
            "  {:<16} {:>11}  {} anonymous, {} file\n",
            "total",
            ui::bytes(bytes.total()),
            ui::bytes(bytes.anonymous()),
            ui::bytes(bytes.file())
        );
        self.gpu_text(&mut text);
        text += "Speed, the file in the system's cache\n";
        match self.rates.map(|rates| plan.speed(&rates)) {
            Some(speed) => {
                for (name, value) in speeds(plan, &speed) {
                    text += &format!("  {name:<16} {value}\n");
                }
            }
            None => text += "  not known: `kinglet doctor` measures this machine once\n",
        }
        text += &format!("Verdict: {}\n", self.verdict());
        let changes = plan.concessions.iter();
        changes.for_each(|change| text += &format!("  {change}\n"));
        text
    }

    /// What lies on the GPU.
    #[cfg(feature = "gpu")]
    fn gpu_text(&self, text: &mut String) {
        let Some(gpu) = &self.gpu else {
            return;
        };
        let (n, all) = (gpu.layers, gpu.n_layers);
        *text += &format!("Memory of the GPU, {n} of {all} layers\n");
        for (name, n) in gpu_rows(gpu) {
            *text += &format!("  {name:<16} {:>11}\n", ui::bytes(n));
        }
    }

    #[cfg(not(feature = "gpu"))]
    fn gpu_text(&self, _: &mut String) {}

    #[cfg(feature = "gpu")]
    fn gpu_json(&self) -> Value {
        let Some(gpu) = &self.gpu else {
            return Value::Null;
        };
        json!({
            "layers": gpu.layers,
            "n_layers": gpu.n_layers,
            "weights": gpu.weights,
            "kv": gpu.kv,
            "conv": gpu.conv,
            "scratch": gpu.scratch,
            "total": gpu.total(),
        })
    }

    #[cfg(not(feature = "gpu"))]
    fn gpu_json(&self) -> Value {
        Value::Null
    }

    fn verdict(&self) -> String {
        let needed = ui::bytes(self.needed);
        match (self.memory, self.available) {
            (Some(memory), _) if self.needed <= memory => {
                format!("fits: {needed} of {}", ui::bytes(memory))
            }
            (Some(memory), _) if !self.plan.concessions.is_empty() => {
                format!("{needed} are more than {}; it fits with", ui::bytes(memory))
            }
            (Some(memory), _) => {
                format!("does not fit: {needed} are more than {}", ui::bytes(memory))
            }
            (None, Some(available)) if self.needed > available => format!(
                "{needed} are more than the {} that programs can have here; --memory makes it fit",
                ui::bytes(available)
            ),
            (None, Some(available)) => format!(
                "fits: {needed} of {} that programs can have here",
                ui::bytes(available)
            ),
            (None, None) => format!("needs {needed}"),
        }
    }

    fn json(&self, fits: bool) -> Value {
        let (plan, bytes) = (self.plan, &self.plan.footprint);
        let range = |x: f64| json!([x / UNCERTAINTY, x, x * UNCERTAINTY]);
        let tallies = |tallies: &[kinglet::backend::planner::Tally]| -> Vec<Value> {
            let row = |t: &kinglet::backend::planner::Tally| {
                json!({
                    "op": t.op.name(),
                    "arithmetic": t.resource,
                    "count": t.count,
                    "weight_bytes": t.work.weight_bytes,
                    "kv_bytes": t.work.kv_bytes,
                    "ops": t.work.ops(),
                    "values": t.values,
                })
            };
            tallies.iter().map(row).collect()
        };
        json!({
            "model": self.model.info().name,
            "file": self.model.gguf().path().display().to_string(),
            "n_ctx": plan.options.n_ctx,
            "batch": plan.options.batch,
            "cache_type_k": plan.options.kv.keys.name(),
            "cache_type_v": plan.options.kv.values.name(),
            "threads": self.model.n_threads(),
            "bytes": {
                "weights": bytes.weights,
                "own_weights": bytes.own_weights,
                "experts": bytes.experts,
                "kv": bytes.kv,
                "conv": bytes.conv,
                "scratch": bytes.scratch,
                "tokenizer": bytes.tokenizer,
                "runtime": bytes.runtime,
                "program": bytes.program,
                "anonymous": bytes.anonymous(),
                "file": bytes.file(),
                "total": bytes.total(),
            },
            "gpu_bytes": self.gpu_json(),
            "asked_bytes": self.needed,
            "memory": self.memory,
            "fits": fits,
            "concessions": plan.concessions.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "kept_weights": plan.kept_weights,
            "experts": plan.experts.as_ref().map(|experts| json!({
                "slots": experts.n_slots,
                "all": experts.n_experts,
                "bytes_per_token": experts.token_bytes,
            })),
            "n_prompt": plan.n_prompt,
            "speed": self.rates.map(|rates| plan.speed(&rates)).map(|speed| json!({
                "load_s": range(speed.load),
                "first_token_s": range(speed.load + speed.prefill),
                "decode_tokens_per_second": range(1.0 / speed.decode),
            })),
            "prefill": tallies(&plan.prefill),
            "decode": tallies(&plan.decode),
        })
    }
}

#[cfg(feature = "gpu")]
fn gpu_rows(gpu: &GpuPlan) -> [(&'static str, u64); 5] {
    [
        ("weights", gpu.weights),
        ("keys and values", gpu.kv),
        ("convolutions", gpu.conv),
        ("scratch, at most", gpu.scratch),
        ("total", gpu.total()),
    ]
}

/// Times and rates with their ranges.
fn speeds(plan: &Plan, speed: &Speed) -> [(&'static str, String); 3] {
    let time = |seconds: f64| {
        let text = |s: f64| ui::duration(Duration::from_secs_f64(s));
        let (low, high) = (seconds / UNCERTAINTY, seconds * UNCERTAINTY);
        format!("{} ({} to {})", text(seconds), text(low), text(high))
    };
    let rate = 1.0 / speed.decode;
    [
        ("load", time(speed.load)),
        (
            "first token",
            format!(
                "{}, of a new process, after a prompt of {}",
                time(speed.load + speed.prefill),
                plan.n_prompt
            ),
        ),
        (
            "decode",
            format!(
                "{rate:.1} tok/s ({:.1} to {:.1})",
                rate / UNCERTAINTY,
                rate * UNCERTAINTY
            ),
        ),
    ]
}
