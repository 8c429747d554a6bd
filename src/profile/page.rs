//! A profile as one page that needs nothing else: numbers, plots and the code that draws them.

use std::io::{self, Write};

use serde_json::{Value, json};

use super::report::Profile;
use super::span::{PassKind, Span};

/// The page around the numbers.
const PAGE: &str = include_str!("page.html");

/// What the numbers take the place of.
const MARK: &str = "/*DATA*/null";

/// Tokens whose operations are on the page; more make it heavy.
const MAX_TOKENS: usize = 64;

impl Profile {
    /// Writes the page.
    ///
    /// # Errors
    /// If `out` fails.
    pub fn write_html(&self, mut out: impl Write) -> io::Result<()> {
        let data = json!({
            "report": self.report,
            "labels": self.trace.labels,
            "charts": self.charts(),
        });
        // Inside a script element a name could end it.
        let data = data.to_string().replace('<', "\\u003c");
        let (before, after) = PAGE
            .split_once(MARK)
            .expect("the page has a place for data");
        out.write_all(before.as_bytes())?;
        out.write_all(data.as_bytes())?;
        out.write_all(after.as_bytes())
    }

    /// Passes of the prompt, and tokens, with their operations.
    fn charts(&self) -> Vec<Value> {
        let (report, trace) = (&self.report, &self.trace);
        let mut spans: Vec<&Span> = trace.spans.iter().collect();
        spans.sort_by_key(|span| span.start);
        let inside = |start: u64, end: u64| {
            let first = spans.partition_point(|span| span.start < start);
            let last = spans.partition_point(|span| span.start < end);
            packed(&spans[first..last], start)
        };
        let prompts = trace.passes.iter().filter(|p| p.kind == PassKind::Prefill);
        let prompts = prompts.take(MAX_TOKENS / 4).map(|pass| {
            json!({
                "name": format!("prompt, {} tokens", pass.n_tokens),
                "time": pass.end - pass.start,
                "spans": inside(pass.start, pass.end),
            })
        });
        let chosen = self.chosen_tokens();
        let tokens = chosen.into_iter().map(|i| {
            let token = &report.tokens[i];
            json!({
                "name": format!("token {}", i + 1),
                "token": i,
                "time": token.time,
                "spans": inside(token.start, token.start + token.time),
            })
        });
        prompts.chain(tokens).collect()
    }

    /// The first token, the slowest, those at the percentiles, and others evenly.
    fn chosen_tokens(&self) -> Vec<usize> {
        let tokens = &self.report.tokens;
        let n = tokens.len();
        if n <= MAX_TOKENS {
            return (0..n).collect();
        }
        let latency = self.report.latency;
        let marked = latency.map_or(Vec::new(), |l| vec![l.p50, l.p95, l.p99, l.max]);
        let at = |time: &u64| (1..n).find(|i| tokens[*i].time == *time);
        let even = (0..MAX_TOKENS - 4).map(|i| i * (n - 1) / (MAX_TOKENS - 5));
        let mut chosen: Vec<usize> = marked.iter().filter_map(at).chain(even).collect();
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }
}

/// Four numbers a span: label, layer or -1, nanoseconds since the end of the one before, nanoseconds it took.
fn packed(spans: &[&Span], start: u64) -> Vec<i64> {
    let mut end = start;
    let mut numbers = Vec::with_capacity(4 * spans.len());
    for span in spans {
        let layer = span.layer.map_or(-1, i64::from);
        let gap = span.start as i64 - end as i64;
        numbers.extend([i64::from(span.label), layer, gap, span.time() as i64]);
        end = span.end;
    }
    numbers
}
