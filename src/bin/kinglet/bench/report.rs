//! Results as llama-bench prints them, with our own fields after its: a table for people, CSV, JSON, JSON lines.

use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::args::Format;
use crate::bench::plan::{Engine, Group, Test};
use crate::bench::stats::{deviation, mean, median, percentile};
use crate::bench::timeline::Sample;
use crate::failure::Outcome;
use crate::ui;

/// The measured speed of one test, and what it ran on.
pub struct Row<'a> {
    pub group: &'a Group,
    pub engine: Engine,
    pub model: &'a ModelCard,
    pub test: Test,
    /// Of the start, as RFC 3339 has it.
    pub time: String,
    pub samples: Vec<Sample>,
}

/// What a table says of a model.
#[derive(Clone)]
pub struct ModelCard {
    /// Architecture, size, format.
    pub kind: String,
    pub bytes: u64,
    pub n_params: u64,
}

/// The fields of one result. All are scalars, so that every output can have them.
type Fields = Vec<(&'static str, Value)>;

impl Row<'_> {
    /// Tokens per second of each repetition.
    fn rates(&self) -> Vec<f64> {
        let n = self.test.n_tokens() as f64;
        let rate = |sample: &Sample| n / sample.total.as_secs_f64();
        self.samples.iter().map(rate).collect()
    }

    /// Times of all decoded tokens.
    fn token_times(&self) -> Vec<Duration> {
        let times = self.samples.iter().flat_map(|sample| &sample.tokens);
        times.copied().collect()
    }

    fn first_token(&self) -> Option<Duration> {
        let times = self.samples.iter().filter_map(|sample| sample.prompt);
        median(&times.collect::<Vec<_>>())
    }

    fn fields(&self, cpu: Option<&str>) -> Fields {
        let ns: Vec<f64> = self
            .samples
            .iter()
            .map(|sample| sample.total.as_nanos() as f64)
            .collect();
        let rates = self.rates();
        let tokens = self.token_times();
        let token_ms = |share| percentile(&tokens, share).map(ms);
        vec![
            ("build_commit", json!(env!("KINGLET_COMMIT"))),
            ("build_version", json!(env!("CARGO_PKG_VERSION"))),
            ("cpu_info", json!(cpu)),
            ("backends", json!(self.engine.name())),
            (
                "model_filename",
                json!(self.group.model.display().to_string()),
            ),
            ("model_type", json!(self.model.kind)),
            ("model_size", json!(self.model.bytes)),
            ("model_n_params", json!(self.model.n_params)),
            ("n_batch", json!(self.group.n_batch)),
            ("n_ubatch", json!(self.group.n_ubatch)),
            ("n_threads", json!(self.group.n_threads)),
            ("type_k", json!(self.group.kv.name())),
            ("type_v", json!(self.group.kv.name())),
            ("n_prompt", json!(self.test.n_prompt)),
            ("n_gen", json!(self.test.n_gen)),
            ("n_depth", json!(self.test.n_depth)),
            ("test_time", json!(self.time)),
            ("avg_ns", json!(mean(&ns) as u64)),
            ("stddev_ns", json!(deviation(&ns) as u64)),
            ("avg_ts", json!(mean(&rates))),
            ("stddev_ts", json!(deviation(&rates))),
            ("test", json!(self.test.to_string())),
            ("token_ms_p50", json!(token_ms(0.5))),
            ("token_ms_p95", json!(token_ms(0.95))),
            ("token_ms_p99", json!(token_ms(0.99))),
            ("first_token_ms", json!(self.first_token().map(ms))),
        ]
    }
}

/// Milliseconds, to a microsecond.
fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// Writes results as they come.
pub struct Printer {
    format: Format,
    /// Columns of the table that are there because the arguments ask for them.
    columns: Vec<Column>,
    cpu: Option<String>,
    n_rows: usize,
}

/// A column of the table.
#[derive(Clone, Copy)]
struct Column {
    name: &'static str,
    /// Negative: text, to the left.
    width: isize,
    value: fn(&Row) -> String,
}

impl Column {
    const fn new(name: &'static str, width: isize, value: fn(&Row) -> String) -> Self {
        Self { name, width, value }
    }

    fn cell(&self, text: &str) -> String {
        let width = self.width.unsigned_abs();
        if self.width < 0 {
            format!(" {text:<width$} |")
        } else {
            format!(" {text:>width$} |")
        }
    }

    fn rule(&self) -> String {
        let dashes = "-".repeat(self.width.unsigned_abs() - 1);
        let end = if self.width < 0 { '-' } else { ':' };
        format!(" {dashes}{end} |")
    }
}

impl Printer {
    /// A printer for results of `groups`; columns of what does not vary are left out.
    pub fn new(format: Format, groups: &[Group], cpu: Option<String>) -> Self {
        let varies =
            |of: fn(&Group) -> usize, default: usize| groups.iter().any(|g| of(g) != default);
        let mut columns = vec![
            Column::new("model", -24, |row| ui::one_line(&row.model.kind)),
            Column::new("size", 10, |row| size(row.model.bytes)),
            Column::new("params", 10, |row| params(row.model.n_params)),
            Column::new("backend", -10, |row| row.engine.name().to_owned()),
            Column::new("threads", 7, |row| row.group.n_threads.to_string()),
        ];
        if varies(|g| g.n_batch, 2048) {
            columns.push(Column::new("n_batch", 7, |row| {
                row.group.n_batch.to_string()
            }));
        }
        if varies(|g| g.n_ubatch, 512) {
            columns.push(Column::new("n_ubatch", 8, |row| {
                row.group.n_ubatch.to_string()
            }));
        }
        if groups.iter().any(|g| g.kv != kinglet::KvType::F16) {
            columns.push(Column::new("type_k", 6, |row| {
                row.group.kv.name().to_owned()
            }));
            columns.push(Column::new("type_v", 6, |row| {
                row.group.kv.name().to_owned()
            }));
        }
        columns.push(Column::new("test", 15, |row| row.test.to_string()));
        columns.push(Column::new("t/s", 20, |row| {
            let rates = row.rates();
            format!("{:.2} ± {:.2}", mean(&rates), deviation(&rates))
        }));
        Self {
            format,
            columns,
            cpu,
            n_rows: 0,
        }
    }

    /// What comes before the first result: nothing, if there will be none.
    fn begin(&self, out: &mut impl Write, row: &Row) -> Outcome {
        match self.format {
            Format::Md => {
                let names = self.columns.iter().map(|c| c.cell(c.name));
                writeln!(out, "|{}", names.collect::<String>())?;
                let rules = self.columns.iter().map(Column::rule);
                writeln!(out, "|{}", rules.collect::<String>())?;
            }
            Format::Csv => {
                let fields = row.fields(self.cpu.as_deref());
                let names: Vec<_> = fields.iter().map(|(name, _)| *name).collect();
                writeln!(out, "{}", names.join(","))?;
            }
            Format::Json => write!(out, "[")?,
            Format::Jsonl => {}
        }
        Ok(())
    }

    /// One result.
    pub fn row(&mut self, row: &Row) -> Outcome {
        let mut out = io::stdout().lock();
        let first = self.n_rows == 0;
        if first {
            self.begin(&mut out, row)?;
        }
        self.n_rows += 1;
        match self.format {
            Format::Md => {
                let cells = self.columns.iter().map(|c| c.cell(&(c.value)(row)));
                writeln!(out, "|{}", cells.collect::<String>())?;
            }
            Format::Csv => {
                let fields = row.fields(self.cpu.as_deref());
                let values = fields.iter().map(|(_, value)| csv(value));
                writeln!(out, "{}", values.collect::<Vec<_>>().join(","))?;
            }
            Format::Json => {
                let comma = if first { "" } else { "," };
                let object = serde_json::to_string_pretty(&self.object(row));
                let object = object.expect("names are strings and numbers are finite");
                write!(out, "{comma}\n{object}")?;
            }
            Format::Jsonl => writeln!(out, "{}", self.object(row))?,
        }
        out.flush()?;
        Ok(())
    }

    /// What comes after the last result, if there was one.
    pub fn end(&self) -> Outcome {
        if self.n_rows == 0 {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match self.format {
            Format::Md => {
                let cpu = self.cpu.as_deref().unwrap_or("unknown CPU");
                let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("KINGLET_COMMIT"));
                writeln!(
                    out,
                    "\nbuild: {version} ({commit}) on {}",
                    ui::one_line(cpu)
                )?;
            }
            Format::Json => writeln!(out, "\n]")?,
            Format::Csv | Format::Jsonl => {}
        }
        out.flush()?;
        Ok(())
    }

    fn object(&self, row: &Row) -> Value {
        let fields = row.fields(self.cpu.as_deref()).into_iter();
        let mut object: Map<_, _> = fields
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let ns = row
            .samples
            .iter()
            .map(|sample| sample.total.as_nanos() as u64);
        object.insert("samples_ns".into(), ns.collect());
        object.insert("samples_ts".into(), json!(row.rates()));
        object.into()
    }
}

/// A field in quotes, as llama-bench writes all of them.
fn csv(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        value => value.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / (1 << 20) as f64;
    if mib < 1024.0 {
        format!("{mib:.2} MiB")
    } else {
        format!("{:.2} GiB", mib / 1024.0)
    }
}

fn params(n: u64) -> String {
    let millions = n as f64 / 1e6;
    if millions < 1000.0 {
        format!("{millions:.2} M")
    } else {
        format!("{:.2} B", millions / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes() {
        assert_eq!(csv(&json!("a \"b\", c")), "\"a \"\"b\"\", c\"");
        assert_eq!(csv(&json!(2)), "\"2\"");
        assert_eq!(csv(&json!(null)), "\"\"");
    }

    #[test]
    fn sizes_in_llama_benchs_units() {
        assert_eq!(size(98_304), "0.09 MiB");
        assert_eq!(size(3 << 29), "1.50 GiB");
        assert_eq!(params(134_515_008), "134.52 M");
        assert_eq!(params(1_170_000_000), "1.17 B");
    }
}
