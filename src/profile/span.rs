//! What a traced run leaves behind: a span for each operation, a record for each pass. All times are nanoseconds on
//! one clock, that of [`now`].

use std::ops::Range;
use std::sync::OnceLock;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Work;

/// Nanoseconds since the first call in this process.
pub fn now() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// What a span is of: the operations of a forward pass, and what a caller does between passes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Room for new positions in the caches of all layers.
    KvReserve,
    /// Rows of the embedding table.
    Embed,
    /// RMS norm.
    RmsNorm,
    /// Matrices that share an input.
    Linear,
    /// A gated feed-forward layer, where kernels join its matrices.
    GatedFfn,
    /// The experts of each token.
    Route,
    /// The experts.
    Moe,
    /// Sines and cosines of positions.
    RopeAngles,
    /// Rotary embedding.
    Rope,
    /// Keys and values to the cache.
    KvWrite,
    /// Attention to the cache.
    Attention,
    /// Gated short convolution.
    ShortConv,
    /// Gated unit.
    Glu,
    /// Residual sum.
    Add,
    /// The rows whose logits are wanted.
    RowsFrom,
    /// Logits to the caller.
    Read,
    /// The end of a pass without logits.
    Flush,
    /// Logits to a token.
    Sample,
    /// A part of loading.
    Load,
}

impl Operation {
    /// The name, as in the trait of the backends.
    pub fn name(self) -> &'static str {
        match self {
            Operation::KvReserve => "kv_reserve",
            Operation::Embed => "embed",
            Operation::RmsNorm => "rms_norm",
            Operation::Linear => "linear",
            Operation::GatedFfn => "gated_ffn",
            Operation::Route => "route",
            Operation::Moe => "moe",
            Operation::RopeAngles => "rope_angles",
            Operation::Rope => "rope",
            Operation::KvWrite => "kv_write",
            Operation::Attention => "attention",
            Operation::ShortConv => "short_conv",
            Operation::Glu => "glu",
            Operation::Add => "add",
            Operation::RowsFrom => "rows_from",
            Operation::Read => "read",
            Operation::Flush => "flush",
            Operation::Sample => "sample",
            Operation::Load => "load",
        }
    }
}

/// What spans have in common.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Label {
    /// What was done.
    pub operation: Operation,
    /// Its name: that of the operation, or of the matrices: `q+k+v`, `gate+up`, `down`, `head`.
    pub name: String,
    /// Rows of the kernel table that ran; empty where there is none.
    pub kernel: String,
}

impl Label {
    /// A label.
    pub fn new(operation: Operation, name: &str, kernel: &str) -> Self {
        Self {
            operation,
            name: name.to_owned(),
            kernel: kernel.to_owned(),
        }
    }
}

/// One operation, once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Span {
    /// Index into [`Trace::labels`].
    pub label: u32,
    /// The decoder layer; `None` before the first and after the last.
    pub layer: Option<u16>,
    /// When it began.
    pub start: u64,
    /// When it was done.
    pub end: u64,
    /// What it did.
    pub work: Work,
    /// How long the caller waited for other threads, in nanoseconds.
    pub waited: u64,
}

impl Span {
    /// Nanoseconds.
    pub fn time(&self) -> u64 {
        self.end - self.start
    }
}

/// What a pass is a part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PassKind {
    /// Reading tokens that are known.
    Prefill,
    /// One token after the other.
    Decode,
}

/// One forward pass.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PassRecord {
    /// What it is a part of.
    pub kind: PassKind,
    /// Tokens.
    pub n_tokens: usize,
    /// When it began.
    pub start: u64,
    /// When its logits were there.
    pub end: u64,
    /// Its spans, in [`Trace::spans`].
    pub spans: Range<usize>,
    /// Nanoseconds that threads other than the caller's worked, all together.
    pub worked: u64,
}

/// A traced run.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Trace {
    /// What the spans are of.
    pub labels: Vec<Label>,
    /// In the order of time.
    pub spans: Vec<Span>,
    /// In the order of time.
    pub passes: Vec<PassRecord>,
    /// Spans for which there was no room.
    pub dropped: u64,
}

impl Trace {
    /// The label of a span.
    pub fn label(&self, span: &Span) -> &Label {
        &self.labels[span.label as usize]
    }

    /// The spans of a pass.
    pub fn spans_of(&self, pass: &PassRecord) -> &[Span] {
        &self.spans[pass.spans.clone()]
    }

    /// The number of a label, which is added if it is new.
    pub fn intern(&mut self, label: &Label) -> u32 {
        let known = self.labels.iter().position(|known| known == label);
        let at = known.unwrap_or_else(|| {
            self.labels.push(label.clone());
            self.labels.len() - 1
        });
        at as u32
    }

    /// Adds what came after.
    pub fn append(&mut self, later: Trace) {
        let numbers: Vec<u32> = later
            .labels
            .iter()
            .map(|label| self.intern(label))
            .collect();
        let first = self.spans.len();
        self.spans.extend(later.spans.into_iter().map(|span| Span {
            label: numbers[span.label as usize],
            ..span
        }));
        self.passes
            .extend(later.passes.into_iter().map(|pass| PassRecord {
                spans: pass.spans.start + first..pass.spans.end + first,
                ..pass
            }));
        self.dropped += later.dropped;
    }

    /// Gives operations without a weight the layer in which they stand: a layer ends with the residual sum after its last
    /// matrix, and the norm behind that belongs to what comes next. The first begins after the embedding.
    pub(crate) fn place_layers(&mut self) {
        for pass in &self.passes {
            let spans = &mut self.spans[pass.spans.clone()];
            let (mut layer, mut open) = (None, 0);
            for at in 0..=spans.len() {
                let placed = spans.get(at).is_none_or(|span| {
                    let operation = self.labels[span.label as usize].operation;
                    matches!(operation, Operation::Linear | Operation::GatedFfn)
                });
                if !placed {
                    continue;
                }
                let next = spans.get(at).and_then(|span| span.layer);
                let between = &mut spans[open..at];
                let ends = |s: &Span| {
                    let operation = self.labels[s.label as usize].operation;
                    matches!(operation, Operation::Add | Operation::Embed)
                };
                let end = between.iter().rposition(ends).map_or(0, |at| at + 1);
                let same = layer == next;
                for (i, span) in between.iter_mut().enumerate() {
                    span.layer = if i < end || same { layer } else { next };
                }
                (layer, open) = (next, at + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traced(operations: &[(Operation, Option<u16>)]) -> Trace {
        let mut trace = Trace::default();
        for (at, (operation, layer)) in operations.iter().enumerate() {
            let label = trace.intern(&Label::new(*operation, operation.name(), ""));
            trace.spans.push(Span {
                label,
                layer: *layer,
                start: 10 * at as u64,
                end: 10 * at as u64 + 9,
                work: Work::default(),
                waited: 0,
            });
        }
        trace.passes.push(PassRecord {
            kind: PassKind::Decode,
            n_tokens: 1,
            start: 0,
            end: 10 * operations.len() as u64,
            spans: 0..operations.len(),
            worked: 0,
        });
        trace
    }

    #[test]
    fn operations_stand_in_the_layer_of_their_neighbours() {
        use Operation::{Add, Attention, Embed, Glu, Linear, Read, RmsNorm};
        let mut trace = traced(&[
            (Embed, None),
            (RmsNorm, None),
            (Linear, Some(0)),
            (Attention, None),
            (Linear, Some(0)),
            (Add, None),
            (RmsNorm, None),
            (Linear, Some(0)),
            (Glu, None),
            (Linear, Some(0)),
            (RmsNorm, None), // of the output: before the sum
            (Add, None),
            (RmsNorm, None),
            (Linear, Some(1)),
            (Add, None),
            (RmsNorm, None),
            (Linear, None), // the head
            (Read, None),
        ]);
        trace.place_layers();
        let layers: Vec<i32> = trace
            .spans
            .iter()
            .map(|span| span.layer.map_or(-1, i32::from))
            .collect();
        assert_eq!(
            layers,
            [-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1]
        );
    }

    #[test]
    fn what_comes_after_is_told_by_its_own_labels() {
        let mut all = traced(&[(Operation::Add, None), (Operation::Glu, None)]);
        all.append(traced(&[(Operation::Read, None), (Operation::Glu, None)]));
        let names: Vec<&str> = all.spans.iter().map(|s| &*all.label(s).name).collect();
        assert_eq!(names, ["add", "glu", "read", "glu"]);
        assert_eq!(all.labels.len(), 3);
        assert_eq!(all.passes[1].spans, 2..4);
        assert_eq!(all.spans_of(&all.passes[1]).len(), 2);
    }
}
