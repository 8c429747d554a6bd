//! A profile in the Trace Event Format, which Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing) open.
//!
//! One track has the caller of the token loop: phases, in them tokens and passes, in these layers, in these operations.
//! Counters follow memory and how busy the other threads are. Times are microseconds.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::report::Profile;
use super::span::{PassRecord, Span};

/// Where events come from: one process, one thread that is traced.
const PID: u32 = 1;
const CALLER: u32 = 1;

struct Events<W> {
    out: W,
    n: usize,
}

impl<W: Write> Events<W> {
    fn event(&mut self, event: &Value) -> io::Result<()> {
        let comma = if self.n == 0 { "" } else { "," };
        self.n += 1;
        write!(self.out, "{comma}\n{event}")
    }

    fn complete(
        &mut self,
        category: &str,
        name: &str,
        times: (u64, u64),
        args: Value,
    ) -> io::Result<()> {
        let (start, end) = times;
        self.event(&json!({
            "name": name, "cat": category, "ph": "X", "ts": micros(start), "dur": micros(end - start),
            "pid": PID, "tid": CALLER, "args": args,
        }))
    }

    fn counter(&mut self, name: &str, at: u64, args: Value) -> io::Result<()> {
        let ts = micros(at);
        self.event(&json!({ "name": name, "ph": "C", "ts": ts, "pid": PID, "args": args }))
    }

    fn name(&mut self, kind: &str, name: &str) -> io::Result<()> {
        let args = json!({ "name": name });
        let event = json!({ "name": kind, "ph": "M", "pid": PID, "tid": CALLER, "args": args });
        self.event(&event)
    }
}

/// A quarter of a nanosecond more: Perfetto multiplies by 1000 and cuts off, and the float that is nearest to so many
/// thousandths may lie below them; with a nanosecond lost, what ends together with its parent could end after it and
/// would be dropped.
fn micros(nanos: u64) -> f64 {
    (nanos as f64 + 0.25) / 1e3
}

impl Profile {
    /// Writes the trace.
    ///
    /// # Errors
    /// If `out` fails.
    pub fn write_chrome_trace(&self, mut out: impl Write) -> io::Result<()> {
        let (report, trace) = (&self.report, &self.trace);
        write!(out, "{{\"traceEvents\":[")?;
        let mut events = Events { out, n: 0 };
        events.name("process_name", &format!("kinglet {}", report.about.model))?;
        events.name("thread_name", "token loop")?;
        for phase in &report.phases {
            let args = json!({ "tokens": phase.tokens, "counters": phase.counters });
            events.complete("phase", &phase.name, (phase.start, phase.end), args)?;
        }
        for (i, token) in report.tokens.iter().enumerate() {
            let name = format!("token {}", i + 1);
            let times = (token.start, token.start + token.time);
            events.complete("token", &name, times, json!({}))?;
        }
        let others = report.about.n_threads.saturating_sub(1) as f64;
        for pass in &trace.passes {
            let args = json!({ "tokens": pass.n_tokens });
            events.complete("pass", pass.kind.name(), (pass.start, pass.end), args)?;
            if others > 0.0 {
                let busy = pass.worked as f64 / (others * (pass.end - pass.start).max(1) as f64);
                let args = json!({ "per cent": (100.0 * busy).min(100.0) });
                events.counter("other threads busy", pass.start, args)?;
            }
            for (layer, start, end) in self.layers_of(pass) {
                let name = format!("layer {layer}");
                events.complete("layer", &name, (start, end), json!({}))?;
            }
        }
        for span in &trace.spans {
            let label = trace.label(span);
            let (work, seconds) = (&span.work, span.time().max(1) as f64 / 1e9);
            let mut args = json!({});
            if !label.kernel.is_empty() {
                args["kernel"] = json!(label.kernel);
            }
            if work.bytes() > 0 {
                args["bytes"] = json!(work.bytes());
                args["GB/s"] = json!(work.bytes() as f64 / seconds / 1e9);
            }
            if work.ops() > 0 {
                args["operations"] = json!(work.ops());
                args["GOP/s"] = json!(work.ops() as f64 / seconds / 1e9);
            }
            if span.waited > 0 {
                args["barrier wait us"] = json!(micros(span.waited));
            }
            let category = label.operation.name();
            events.complete(category, &label.name, (span.start, span.end), args)?;
        }
        for sample in &report.memory {
            let mib = |bytes: u64| bytes as f64 / (1 << 20) as f64;
            let args = json!({ "anonymous": mib(sample.anonymous), "file": mib(sample.file) });
            events.counter("resident MiB", sample.at, args)?;
        }
        let about = serde_json::to_string(&report.about)?;
        writeln!(
            events.out,
            "\n],\"displayTimeUnit\":\"ms\",\"otherData\":{about}}}"
        )
    }

    /// The layers of a pass: number, start, end.
    fn layers_of(&self, pass: &PassRecord) -> Vec<(u16, u64, u64)> {
        let spans = self.trace.spans_of(pass);
        let runs = spans.chunk_by(|a: &Span, b: &Span| a.layer == b.layer);
        runs.filter_map(|run| Some((run[0].layer?, run[0].start, run[run.len() - 1].end)))
            .collect()
    }
}
