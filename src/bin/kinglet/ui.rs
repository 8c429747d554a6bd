//! Terminals: what goes where, in which colours, and what must not reach them.

use std::borrow::Cow;
use std::io::{self, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use kinglet::profile::{DeltaWork, ExpertWork};
use kinglet::session::{Event, Stats};
use kinglet::{Error, Session};

use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// The largest text that is read from a file or from stdin.
const MAX_TEXT_BYTES: u64 = 1 << 30;

/// Whether to colour what goes to a stream.
fn coloured(stream: &impl IsTerminal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !set("NO_COLOR") && !dumb
}

/// Colours for stderr: escapes, or nothing.
#[derive(Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// For stderr.
    pub fn stderr() -> Self {
        Self(coloured(&io::stderr()))
    }

    fn wrap<'a>(&self, escape: &str, text: &'a str) -> Cow<'a, str> {
        if self.0 {
            format!("\x1b[{escape}m{text}\x1b[0m").into()
        } else {
            text.into()
        }
    }

    /// What is less important.
    pub fn dim<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.wrap("2", text)
    }

    /// What the person is asked.
    pub fn prompt<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.wrap("1;36", text)
    }

    /// What went wrong.
    pub fn error<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.wrap("31", text)
    }
}

/// A line to stderr, without what would steer a terminal.
pub fn note(line: &str) {
    note_raw(&printable(line));
}

/// That a session has left its GPU, if it has.
pub fn note_fault(session: &Session) {
    if let Some(fault) = session.device_fault() {
        note(&format!("note: {}; it goes on on the CPU", one_line(fault)));
    }
}

/// A line to stderr with our own colours in it.
pub fn note_raw(line: &str) {
    let _ = writeln!(io::stderr(), "{line}"); // a closed stderr is no reason to stop
}

/// Without control characters but newline and tab: names, texts and errors may come from a file that means harm.
pub fn printable(text: &str) -> Cow<'_, str> {
    let harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(harmful) {
        text.replace(harmful, "\u{fffd}").into()
    } else {
        text.into()
    }
}

/// `text` on one line.
pub fn one_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], " ")
}

/// A reply on its way to stdout: shown as it comes.
pub struct ReplyPrinter {
    text: bool,
    terminal: bool,
    progress: Option<ProgressBar>,
    failed: Option<io::Error>,
    /// Whether what was printed last ends a line.
    at_line_start: bool,
}

impl ReplyPrinter {
    /// Prints the text as it comes if `text`, and progress of long prefills on a terminal.
    pub fn new(text: bool) -> Self {
        Self {
            text,
            terminal: io::stdout().is_terminal(),
            progress: None,
            failed: None,
            at_line_start: true,
        }
    }

    /// What [`kinglet::session::generate`] calls: breaks on Ctrl-C, and when stdout fails.
    pub fn on(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Prefill { done, total } => self.prefill(done, total),
            Event::Text(text) => {
                self.clear_progress();
                if self.text
                    && let Err(error) = self.print(text)
                {
                    self.failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
            Event::Call(call) => {
                self.clear_progress();
                // A line of its own: text and calls can be told apart by who reads lines.
                let start = if self.at_line_start { "" } else { "\n" };
                let json = serde_json::to_string(call).expect("strings and values become JSON");
                if self.text
                    && let Err(error) = self.print(&format!("{start}{json}\n"))
                {
                    self.failed = Some(error);
                    return ControlFlow::Break(());
                }
            }
        }
        if interrupt::hit() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn prefill(&mut self, done: usize, total: usize) {
        // A prompt of one step is read before a bar could be.
        if done < total && self.progress.is_none() {
            self.progress = Some(progress("reading", total as u64, "{pos}/{len} tokens"));
        }
        if let Some(bar) = &self.progress {
            bar.set_position(done as u64);
        }
        if done == total {
            self.clear_progress();
        }
    }

    fn clear_progress(&mut self) {
        if let Some(bar) = self.progress.take() {
            bar.finish_and_clear();
        }
    }

    fn print(&mut self, text: &str) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let text = if self.terminal {
            printable(text)
        } else {
            text.into()
        };
        self.at_line_start = text.ends_with('\n');
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Ends the line. The error is the first that stdout gave.
    pub fn end(mut self) -> Outcome {
        self.clear_progress();
        if let Some(error) = self.failed.take() {
            return Err(error.into());
        }
        if self.text && !self.at_line_start {
            self.print("\n")?;
        }
        Ok(())
    }
}

/// A bar on stderr; hidden where that is no terminal.
pub fn progress(what: &'static str, total: u64, count: &str) -> ProgressBar {
    let template = format!("{{msg}} {{wide_bar}} {count} {{eta}}");
    let style =
        ProgressStyle::with_template(&template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::new(total).with_style(style).with_message(what);
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// What was read of experts for `n` tokens: `71.3 % in memory of 128 a token, 78.20 MB read a token, …`.
pub fn expert_line(experts: &ExpertWork, n: usize) -> Option<String> {
    let n = n.max(1) as f64;
    let hits = 100.0 * experts.hit_rate()?;
    let hidden = experts.hidden().map_or(String::new(), |hidden| {
        format!(" ({:.0} % hidden)", 100.0 * hidden)
    });
    let guesses = match experts.guesses {
        0 => String::new(),
        guesses => format!(
            ", {:.1} guessed, {:.0} % of them used",
            guesses as f64 / n,
            100.0 * experts.guesses_used as f64 / guesses as f64
        ),
    };
    Some(format!(
        "{hits:.1} % in memory of {:.1} a token, {:.2} MB read a token, {:.2} ms waited of {:.2} ms reading a token{hidden}{guesses}",
        experts.used as f64 / n,
        experts.bytes as f64 / 1e6 / n,
        experts.waited as f64 / 1e6 / n,
        experts.reading as f64 / 1e6 / n,
    ))
}

/// Counts and times of a reply on one line.
pub fn stats_line(stats: &Stats) -> String {
    let read = stats.prompt_tokens - stats.reused_tokens;
    let kept = match stats.reused_tokens {
        0 => String::new(),
        n if stats.replayed_tokens == 0 => format!(" (+{n} kept)"),
        n => format!(" (+{n} kept, {} replayed)", stats.replayed_tokens),
    };
    let mut line = format!(
        "prefill {read} tokens{kept} {:.1} tok/s",
        stats.prefill_rate()
    );
    if !stats.first_token.is_zero() {
        line += &format!(" · first token {}", duration(stats.first_token));
    }
    if stats.decode_tokens > 0 {
        let (n, rate) = (stats.decode_tokens, stats.decode_rate());
        line += &format!(" · decode {n} tokens {rate:.1} tok/s");
        if let Some(hits) = stats.experts.hit_rate() {
            let read = bytes(stats.experts.bytes / n as u64);
            let hits = 100.0 * hits;
            line += &format!(" · experts {hits:.0} % in memory, {read} read a token");
        }
    }
    if let Some(share) = stats.work.share_read().filter(|share| *share < 1.0) {
        line += &format!(" · {:.1} % of keys read", 100.0 * share);
    }
    if let Some(saved) = stats.work.delta.sparsity() {
        let saved = 100.0 * saved.products;
        line += &format!(" · {saved:.1} % of scores' products saved");
    }
    line
}

/// `12 ms`, `3.4 s`.
pub fn duration(time: Duration) -> String {
    match time.as_secs_f64() {
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

/// `52.4 MiB`.
pub fn bytes(n: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut size = n as f64;
    let mut unit = "bytes";
    for larger in units {
        if size < 1024.0 {
            break;
        }
        (size, unit) = (size / 1024.0, larger);
    }
    match unit {
        "bytes" => format!("{n} bytes"),
        _ => format!("{size:.1} {unit}"),
    }
}

/// `89.4 M`.
pub fn count(n: u64) -> String {
    match n as f64 {
        x if x >= 1e9 => format!("{:.2} G", x / 1e9),
        x if x >= 1e6 => format!("{:.1} M", x / 1e6),
        x if x >= 1e4 => format!("{:.1} k", x / 1e3),
        _ => n.to_string(),
    }
}

/// A prompt or a text to score: as llama.cpp reads it, without the newline at the end of the file.
pub fn read_prompt(path: &Path) -> Outcome<String> {
    let mut text = read_text(path)?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

/// The text of a file; `-` is stdin.
pub fn read_text(path: &Path) -> Outcome<String> {
    if path == Path::new("-") {
        return read_stdin();
    }
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::io(path, e))?;
    as_text(bytes, &path.display().to_string())
}

/// All of stdin.
pub fn read_stdin() -> Outcome<String> {
    let mut bytes = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_TEXT_BYTES + 1)
        .read_to_end(&mut bytes)?;
    as_text(bytes, "standard input")
}

fn as_text(bytes: Vec<u8>, name: &str) -> Outcome<String> {
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(Failure::usage(format!(
            "{name}: expected at most {}",
            self::bytes(MAX_TEXT_BYTES)
        )));
    }
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Failure::usage(format!(
            "{name}: expected UTF-8 text, found other bytes at offset {at}"
        ))
    })
}

/// What differences of keys saved.
pub fn delta_line(delta: &DeltaWork) -> Option<String> {
    let saved = delta.sparsity()?;
    Some(format!(
        "{:.1} % of keys' elements unchanged, {:.1} % of them far back (as published); saved {:.1} % of products of \
         queries and keys, {:.1} % of all of attention",
        100.0 * saved.unchanged,
        100.0 * saved.published,
        100.0 * saved.products,
        100.0 * saved.attention
    ))
}
