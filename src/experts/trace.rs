//! The trace of a run: which experts were asked for, in lines of text.
//!
//! ```text
//! kinglet-experts 1                       format
//! layer 32 4 1990656                      experts, used by a token, bytes of an expert; one line for each layer
//! begin 0 0 7:0.31:m 2:0.28:h …           token, layer, then expert:weight:hit or miss
//! end 0                                   the request of that number, from 0, has let go of its experts
//! ```

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use super::{Key, Layout};
use crate::{Error, Result};

const FORMAT: &str = "kinglet-experts 1";

/// Experts of a trace at most, as of a layout.
const MAX_EXPERTS: usize = 1 << 20;

/// Writes a trace. What cannot be written is lost, and the run goes on.
pub(super) struct Recorder {
    out: Option<BufWriter<File>>,
}

impl Recorder {
    pub fn create(path: &Path, layout: &Layout) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let mut out = BufWriter::with_capacity(1 << 18, File::create(path).map_err(io)?);
        let mut head = || {
            writeln!(out, "{FORMAT}")?;
            for (idx, layer) in layout.layers().iter().enumerate() {
                let bytes = layout.expert_bytes(idx);
                writeln!(out, "layer {} {} {bytes}", layer.n_experts, layer.n_used)?;
            }
            Ok(())
        };
        head().map_err(io)?;
        Ok(Self { out: Some(out) })
    }

    fn write(&mut self, line: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) {
        if let Some(out) = &mut self.out
            && line(out).is_err()
        {
            self.out = None;
        }
    }

    pub fn begin(&mut self, token: u64, layer: usize, ids: impl Iterator<Item = (u32, f32, bool)>) {
        self.write(|out| {
            write!(out, "begin {token} {layer}")?;
            for (id, weight, hit) in ids {
                write!(out, " {id}:{weight}:{}", if hit { 'h' } else { 'm' })?;
            }
            writeln!(out)
        });
    }

    pub fn end(&mut self, request: u64) {
        self.write(|out| writeln!(out, "end {request}"));
    }

    pub fn flush(&mut self) {
        self.write(|out| out.flush());
    }
}

/// A layer in a trace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TraceLayer {
    /// Experts of the layer.
    pub n_experts: usize,
    /// How many a token uses.
    pub n_used: usize,
    /// Bytes of an expert.
    pub expert_bytes: u64,
}

/// One expert that was asked for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Use {
    /// Of all layers.
    pub key: Key,
    /// Of the router.
    pub weight: f32,
    /// Whether it was there.
    pub hit: bool,
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Experts were asked for.
    Begin {
        /// Of the run, from 0.
        token: u64,
        /// Of the layers with experts.
        layer: usize,
        /// In [`Trace::uses`].
        uses: Range<usize>,
    },
    /// The request of that number has let go of its experts.
    End(usize),
}

/// A trace that was read.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// The layers.
    pub layers: Vec<TraceLayer>,
    /// In the order of the run.
    pub events: Vec<Event>,
    /// All uses, one request after the other.
    pub uses: Vec<Use>,
}

impl Trace {
    /// The trace in the file at `path`. The last line may be cut off: a run that was killed leaves such a file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::BadFile`] that names the line.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let mut file = BufReader::new(file);
        let mut trace = Reader::default();
        let mut line = Vec::new();
        for n in 1.. {
            line.clear();
            let read = io::Read::take(&mut file, MAX_LINE).read_until(b'\n', &mut line);
            read.map_err(|e| Error::io(path, e))?;
            if line.is_empty() {
                break;
            }
            let n_uses = trace.trace.uses.len();
            let whole = line.pop_if(|byte| *byte == b'\n').is_some();
            let what = match std::str::from_utf8(&line) {
                Ok(text) => trace.line(text, n),
                Err(_) => Err("expected text".into()),
            };
            if let Err(what) = what {
                if !whole && n > 1 && (line.len() as u64) < MAX_LINE {
                    trace.trace.uses.truncate(n_uses);
                    break;
                }
                return Err(Error::BadFile {
                    path: path.to_owned(),
                    what: format!("line {n}: {what}"),
                });
            }
        }
        if trace.trace.layers.is_empty() {
            return Err(Error::BadFile {
                path: path.to_owned(),
                what: "a trace without layers".into(),
            });
        }
        Ok(trace.trace)
    }

    /// Experts of all layers.
    pub fn n_experts(&self) -> usize {
        self.layers.iter().map(|layer| layer.n_experts).sum()
    }

    /// Tokens of the run.
    pub fn n_tokens(&self) -> u64 {
        let (mut n, mut last) = (0, None);
        for event in &self.events {
            if let Event::Begin { token, .. } = event
                && last != Some(*token)
            {
                last = Some(*token);
                n += 1;
            }
        }
        n
    }
}

/// A longer line is none of ours.
const MAX_LINE: u64 = 64 << 20;

#[derive(Default)]
struct Reader {
    trace: Trace,
    /// First key of each layer.
    base: Vec<usize>,
    n_experts: usize,
    ended: Vec<bool>,
    /// The number of the last request for each expert, from 1.
    seen: Vec<usize>,
    token: u64,
}

fn number<T: std::str::FromStr>(word: Option<&str>, name: &str) -> Result<T, String> {
    let word = word.unwrap_or_default();
    word.parse()
        .map_err(|_| format!("{name}: expected a number, found `{word:.40}`"))
}

impl Reader {
    fn line(&mut self, line: &str, n: u64) -> Result<(), String> {
        if n == 1 {
            return (line == FORMAT)
                .then_some(())
                .ok_or_else(|| format!("expected `{FORMAT}`, found `{line:.40}`"));
        }
        let mut words = line.split(' ');
        match words.next() {
            Some("layer") if self.trace.events.is_empty() => {
                let layer = TraceLayer {
                    n_experts: number(words.next(), "experts")?,
                    n_used: number(words.next(), "used")?,
                    expert_bytes: number(words.next(), "bytes")?,
                };
                if layer.n_used == 0 || layer.n_used > layer.n_experts {
                    let TraceLayer {
                        n_experts, n_used, ..
                    } = layer;
                    return Err(format!("expected 1 to {n_experts} used, found {n_used}"));
                }
                self.base.push(self.n_experts);
                self.n_experts = self.n_experts.saturating_add(layer.n_experts);
                if self.n_experts > MAX_EXPERTS {
                    return Err(format!("expected at most {MAX_EXPERTS} experts"));
                }
                self.trace.layers.push(layer);
            }
            Some("begin") => {
                let token: u64 = number(words.next(), "token")?;
                if token < self.token || token > 1 << 52 {
                    return Err(format!("token {token} after {}", self.token));
                }
                self.token = token;
                let layer: usize = number(words.next(), "layer")?;
                let n_layers = self.trace.layers.len();
                let known = self.trace.layers.get(layer);
                let n_experts = known
                    .ok_or_else(|| format!("layer: expected one below {n_layers}, found {layer}"))?
                    .n_experts;
                let start = self.trace.uses.len();
                let begun = self.ended.len() + 1;
                self.seen.resize(self.n_experts, 0);
                for word in words {
                    let mut fields = word.split(':');
                    let id: usize = number(fields.next(), "expert")?;
                    if id >= n_experts {
                        return Err(format!(
                            "expert: expected one below {n_experts}, found {id}"
                        ));
                    }
                    if std::mem::replace(&mut self.seen[self.base[layer] + id], begun) == begun {
                        return Err(format!("expert {id} twice"));
                    }
                    let weight = number(fields.next(), "weight")?;
                    let hit = match fields.next() {
                        Some("h") => true,
                        Some("m") => false,
                        _ => return Err("expected h or m".into()),
                    };
                    let key = (self.base[layer] + id) as Key;
                    self.trace.uses.push(Use { key, weight, hit });
                }
                let uses = start..self.trace.uses.len();
                self.trace.events.push(Event::Begin { token, layer, uses });
                self.ended.push(false);
            }
            Some("end") => {
                let request: usize = number(words.next(), "request")?;
                match self.ended.get_mut(request) {
                    Some(ended) if !*ended => *ended = true,
                    _ => return Err(format!("request {request} is not open")),
                }
                self.trace.events.push(Event::End(request));
            }
            word => {
                return Err(format!(
                    "expected layer, begin or end, found `{:.40}`",
                    word.unwrap_or_default()
                ));
            }
        }
        Ok(())
    }
}
