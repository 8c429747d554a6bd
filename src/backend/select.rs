//! Which cached keys a query attends to: the hook for policies that leave some out.
//!
//! A cache may have a [`Select`]. It is asked once for each token and head of keys, sees queries and sums of keys, and
//! answers with ranges of positions. It decides from what lies before the token alone and remembers nothing, so a
//! token's result depends neither on how many were computed with it nor on what came after: going back, going apart,
//! saving and loading stay exact. The backend intersects the answer with what causality and the model's own window let
//! the query see; an answer that leaves nothing means everything.

use std::fmt::Debug;
use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use super::delta::Delta;
use super::notes::{NoteShape, Notes};
use super::predictor::{Predictor, SIDE};
use super::{Attention, KvTypes};
use crate::error::{Error, Result};

/// How keys and values of a layer are kept, and which of them its queries read.
#[derive(Clone, Debug, Default)]
pub struct KvOptions {
    /// Types of the elements.
    pub kinds: KvTypes,
    /// Chooses keys; `None`: all of them.
    pub select: Option<Arc<dyn Select>>,
    /// How scores with all keys are computed; `None`: as whole products.
    pub delta: Option<Arc<Delta>>,
    /// Tells where chunks end, if `select` wants that.
    pub predictor: Option<Arc<Predictor>>,
    /// The layer of the cache.
    pub layer: usize,
}

impl KvOptions {
    /// The same for a layer, where a policy that is not for it is left out.
    pub fn of_layer(&self, layer: usize) -> Self {
        Self {
            layer,
            select: self.select.clone().filter(|s| s.is_for(layer)),
            ..self.clone()
        }
    }
}

impl From<KvTypes> for KvOptions {
    /// All keys.
    fn from(kinds: KvTypes) -> Self {
        Self {
            kinds,
            ..Self::default()
        }
    }
}

/// A policy that chooses keys.
pub trait Select: Debug + Send + Sync {
    /// Whether it chooses in a layer; if not, everything is read there.
    fn is_for(&self, _layer: usize) -> bool {
        true
    }

    /// How the cache must sum keys for it; `None`: not at all.
    fn chunking(&self) -> Option<Chunking>;

    /// Whether a chunk of which a query reads nothing counts for it all the same: as one key and one value, the means, with
    /// the weight of as many as it has.
    fn pools(&self) -> bool {
        false
    }

    /// Every so many positions a query also attends to all that it sees, and the difference which that makes is added to
    /// what it and those after it find, up to the next of these; `None`: nowhere.
    fn corrects_every(&self) -> Option<usize> {
        None
    }

    /// Whether a query at `position` attends to all of `seen`.
    fn sees_all(&self, position: usize, seen: &Range<usize>) -> bool;

    /// The most keys that another query attends to, of `n_seen`.
    fn budget(&self, n_seen: usize) -> usize;

    /// Whether it wants scores of the sum of the queries that share a head of keys, in place of those of each.
    fn sums_queries(&self) -> bool;

    /// Chooses keys for a query: fills the empty `plan.spans` with ranges of positions, in order and apart.
    fn select(&self, ask: &Ask, plan: &mut Plan);

    /// The same in numbers, for devices that cannot call it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it cannot be said so.
    fn rule(&self) -> Result<Rule> {
        Err(Error::Unsupported {
            kind: "choice of keys on a device",
            found: format!("{self:?}"),
            supported: Rule::SUPPORTED.into(),
        })
    }
}

/// What a [`Select`] chooses for a query that does not see all: the first keys, the last, and between these the best
/// chunks up to the budget.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// What makes a chunk better than another.
    pub by: By,
    /// Keys of a chunk; 0: there are none.
    pub chunk: usize,
    /// First keys of the sequence.
    pub sink: usize,
    /// Last keys before the query, itself included.
    pub local: usize,
    /// Keys that a query reads at most,
    pub budget: usize,
    /// or so many per cent of those that it sees, where these are more.
    pub per_cent: usize,
}

/// What makes a chunk of keys better than another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum By {
    /// None is read, all of the budget goes to the last keys.
    Place,
    /// The product of its sum with that of the queries that share a head of keys.
    Sum,
    /// The product with the sum of all queries, of all heads of keys together.
    Shared,
    /// The probabilities that the queries give to it, summed.
    Vote,
    /// The query that wants it most.
    Best,
    /// Blocks of four chunks are read, by the probabilities that the queries give to means of two.
    Blocks,
}

impl By {
    /// Whether sums of queries are multiplied with sums of keys, in place of each query.
    pub fn sums_queries(self) -> bool {
        matches!(self, By::Sum | By::Shared)
    }
}

impl Rule {
    /// What there is, for errors.
    pub const SUPPORTED: &'static str =
        "dense, a window, block top-k, DHSA with chunks of a fixed length, without repair";

    /// Keys that are read or left out together.
    pub fn item(&self) -> usize {
        match self.by {
            By::Blocks => 4 * self.chunk,
            _ => self.chunk,
        }
    }

    /// See [`budget_of`].
    pub fn budget_of(&self, n_seen: usize) -> usize {
        budget_of(self.budget, self.per_cent, n_seen)
    }

    /// How many a query reads that sees `seen`: at most, where the model's window cuts a block.
    pub fn n_read(&self, seen: &Range<usize>) -> usize {
        let budget = self.budget_of(seen.len());
        match self.by {
            By::Blocks => {
                let item = self.item();
                let last = seen.end.saturating_sub(self.local) / item * item;
                let always = item + seen.end - last.max(seen.start);
                always + budget.saturating_sub(always) / item * item
            }
            _ => budget,
        }
    }
}

/// Keys that a query reads at most, of `n_seen`: `budget`, or so many per cent where these are more.
pub fn budget_of(budget: usize, per_cent: usize, n_seen: usize) -> usize {
    budget.max(n_seen * per_cent / 100)
}

/// Positions that a query at `position` sees.
pub(in crate::backend) fn seen_from(shape: &Attention, position: usize) -> Range<usize> {
    let first = shape
        .window
        .map_or(0, |window| (position + 1).saturating_sub(window));
    first..position + 1
}

/// Adjacent positions whose queries all see everything, or all do not.
pub(in crate::backend) fn runs(
    shape: &Attention,
    select: &dyn Select,
    mut positions: Range<usize>,
) -> impl Iterator<Item = (bool, Range<usize>)> {
    let is_dense = move |position| select.sees_all(position, &seen_from(shape, position));
    std::iter::from_fn(move || {
        let start = positions.next()?;
        let dense = is_dense(start);
        let mut rest = positions.clone();
        let end = rest.find(|position| is_dense(*position) != dense);
        positions.start = end.unwrap_or(positions.end);
        Some((dense, start..positions.start))
    })
}

/// What is asked of a [`Select`].
pub struct Ask<'a> {
    /// Where the token is.
    pub position: usize,
    /// Keys that causality and the model's window let it see.
    pub seen: Range<usize>,
    /// The layer.
    pub layer: usize,
    /// Its shape.
    pub attention: &'a Attention,
    /// The head of keys that is read.
    pub kv_head: usize,
    /// All queries of the token, `(n_heads, head_dim)`.
    pub q: &'a [f32],
    /// Scores of the queries that read the head of keys, or of their sum, with the sums of keys: products times the scale,
    /// in rows of `n_scores`. Some at the end of a row may be of sums that the token may not know.
    pub scores: &'a [f32],
    /// Length of a row of them.
    pub n_scores: usize,
    /// Sums of keys, where [`Select::chunking`] wants some. Those that the token may know come first: see
    /// [`Chunks::n_known`].
    pub chunks: &'a Chunks,
}

impl Ask<'_> {
    /// The scores of a query of the group, or of their sum as the only one, with the sums that the token may know.
    pub fn scores(&self, query: usize) -> &[f32] {
        let n_known = self.chunks.n_known(self.seen.end);
        &self.scores[query * self.n_scores..][..n_known]
    }
}

/// The answer, and room to find it in: kept from one to the next, so that asking allocates nothing.
#[derive(Debug, Default)]
pub struct Plan {
    /// The answer.
    pub spans: Vec<Range<usize>>,
    /// For the policy.
    pub scores: Vec<f32>,
    /// For the policy.
    pub weights: Vec<f32>,
    /// For the policy.
    pub order: Vec<u64>,
    /// For the policy.
    pub keys: Vec<i32>,
    /// For the policy.
    pub words: Vec<u64>,
    /// For the backend: scores of some tokens with sums of keys.
    pub(in crate::backend) sums: Vec<f32>,
    /// For the backend: sums of keys, turned.
    pub(in crate::backend) panels: Vec<f32>,
}

impl Plan {
    /// Makes room to choose among `n_chunks` for queries of `head_dim` with `n_scores` together, and for `n_turned` floats.
    pub(in crate::backend) fn reserve(
        &mut self,
        n_chunks: usize,
        head_dim: usize,
        n_scores: usize,
        n_turned: usize,
    ) {
        fn to<T>(list: &mut Vec<T>, n: usize) {
            list.reserve_exact(n.saturating_sub(list.len()));
        }
        // The first keys, the last, and a chunk that is cut.
        to(&mut self.spans, n_chunks + 3);
        to(&mut self.scores, n_chunks + 1);
        to(&mut self.weights, (n_chunks + 1).max(head_dim));
        to(&mut self.order, n_chunks + 1);
        to(&mut self.keys, n_chunks + 1);
        to(&mut self.words, 2 * (n_chunks / u64::BITS as usize + 1));
        to(&mut self.sums, n_scores);
        to(&mut self.panels, n_turned);
    }

    /// Appends a range; one that touches the last becomes a part of it.
    pub fn push(&mut self, span: Range<usize>) {
        match self.spans.last_mut() {
            _ if span.is_empty() => {}
            Some(last) if last.end >= span.start => last.end = last.end.max(span.end),
            _ => self.spans.push(span),
        }
    }
}

/// Where chunks of adjacent keys end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Chunking {
    /// After so many keys.
    Fixed(usize),
    /// After half to one and a half of so many keys, there where keys change the most: where the cosine between the sums
    /// of [`SHIFT_WINDOW`] keys before and after, of all heads together, is least.
    Shift(usize),
    /// After half to one and a half of so many keys, there where later queries treat keys the least alike: where the
    /// attention of one in [`LABEL_EVERY`] of them, up to [`LABEL_AHEAD`] ahead, to the [`SHIFT_WINDOW`] keys before, all heads
    /// together, is the most times that to those after, or the least. What DHSA's predictor of boundaries learns.
    Labels(usize),
    /// After half to one and a half of so many keys, there where a [`Predictor`] that has learnt that finds it likeliest.
    Predict(usize),
}

/// Reads what a position has, `(n_kv_heads, head_dim)`.
type ReadRow<'a> = dyn Fn(usize, &mut [f32]) + 'a;

/// Keys on each side of a boundary that are compared.
pub const SHIFT_WINDOW: usize = SIDE;

/// From one query whose attention tells where chunks end to the next.
pub const LABEL_EVERY: usize = 16;

/// How far after the last key of a chunk these may be.
pub const LABEL_AHEAD: usize = 64;

impl Chunking {
    /// Keys of a chunk, more or less.
    pub fn nominal(self) -> usize {
        match self {
            Chunking::Fixed(n)
            | Chunking::Shift(n)
            | Chunking::Labels(n)
            | Chunking::Predict(n) => n,
        }
    }

    /// The fewest keys of a chunk.
    fn least(self) -> usize {
        match self {
            Chunking::Fixed(n) => n,
            Chunking::Shift(n) | Chunking::Labels(n) | Chunking::Predict(n) => (n / 2).max(1),
        }
    }

    /// The most keys of a chunk.
    pub fn most(self) -> usize {
        match self {
            Chunking::Fixed(n) => n,
            Chunking::Shift(n) | Chunking::Labels(n) | Chunking::Predict(n) => n + n / 2,
        }
    }

    /// Keys from the start of a chunk that must be there before its end is known.
    pub fn reach(self) -> usize {
        match self {
            Chunking::Fixed(n) => n,
            Chunking::Shift(_) | Chunking::Predict(_) => self.most() + SHIFT_WINDOW,
            Chunking::Labels(_) => self.most() + SHIFT_WINDOW + LABEL_AHEAD,
        }
    }

    /// The lengths among which one is chosen.
    fn ends(self) -> RangeInclusive<usize> {
        self.least().max(SHIFT_WINDOW)..=self.most()
    }

    /// Floats of the room in which an end is found, for keys of `width`: the keys, and what a predictor needs.
    fn room(self, width: usize, predictor: Option<&Predictor>) -> usize {
        let keys = self.reach() * width;
        match (self, predictor) {
            (Chunking::Predict(_), Some(predictor)) => {
                let ends = self.ends();
                keys + predictor.shape().room(ends.end() + 1 - ends.start())
            }
            _ => keys,
        }
    }

    /// What queries leave for it.
    pub fn samples(self) -> NoteShape {
        match self {
            Chunking::Fixed(_) | Chunking::Shift(_) | Chunking::Predict(_) => NoteShape::default(),
            Chunking::Labels(_) => NoteShape {
                every: LABEL_EVERY,
                n: self.reach(),
            },
        }
    }

    /// Chunks of `positions`, at most.
    pub(in crate::backend) fn most_chunks(self, positions: usize) -> usize {
        positions / self.least()
    }

    /// Bytes of the sums of `positions`, at most; with those of values, if they are pooled.
    pub(in crate::backend) fn bytes(
        self,
        attention: &Attention,
        positions: usize,
        pools: bool,
        predictor: Option<&Predictor>,
    ) -> usize {
        let width = attention.n_kv_heads * attention.head_dim;
        let (n, key) = (positions / self.least(), width * size_of::<f32>());
        let sums = if pools { 2 * key } else { key };
        n * (size_of::<Chunk>() + sums) + self.room(width, predictor) * size_of::<f32>()
    }
}

/// Adjacent keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Position of the first.
    pub start: u32,
    /// Position after the last.
    pub end: u32,
    /// How many positions there had to be for its end to be known.
    known: u32,
}

impl Chunk {
    /// How many keys.
    pub fn n_keys(&self) -> usize {
        (self.end - self.start) as usize
    }
}

/// Sums of adjacent keys: what a cache derives from what it holds, and nothing else.
#[derive(Debug, Default)]
pub struct Chunks {
    chunks: Vec<Chunk>,
    /// For each head of keys `(n_chunks, head_dim)`.
    sums: Vec<Vec<f32>>,
    /// The same of values, where they are wanted.
    values: Vec<Vec<f32>>,
    /// Where keys are read to: kept, so that steady work allocates nothing.
    room: Vec<f32>,
}

impl Chunks {
    /// Chunks in the order of positions.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// How many chunks somebody knows who sees the first `n` positions alone.
    pub fn n_known(&self, n: usize) -> usize {
        self.chunks
            .partition_point(|chunk| chunk.known as usize <= n)
    }

    /// The sums of a head of keys, `(n_chunks, head_dim)`.
    pub fn sums(&self, kv_head: usize) -> &[f32] {
        &self.sums[kv_head]
    }

    /// The sums of the values of a head of keys, likewise.
    pub fn values(&self, kv_head: usize) -> &[f32] {
        &self.values[kv_head]
    }

    /// A copy.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(in crate::backend) fn try_clone(&self) -> Result<Self> {
        fn copy<T: Copy>(of: &Vec<T>) -> Result<Vec<T>> {
            let mut copy = Vec::new();
            let reserved = copy.try_reserve_exact(of.capacity());
            reserved.map_err(|_| Error::OutOfMemory {
                what: "sums of keys".into(),
                bytes: of.capacity() * size_of::<T>(),
            })?;
            copy.extend_from_slice(of);
            Ok(copy)
        }
        Ok(Self {
            chunks: copy(&self.chunks)?,
            sums: self.sums.iter().map(copy).collect::<Result<_>>()?,
            values: self.values.iter().map(copy).collect::<Result<_>>()?,
            room: copy(&self.room)?,
        })
    }

    /// Bytes held.
    pub(in crate::backend) fn bytes(&self) -> usize {
        let sums = self.sums.iter().chain(&self.values);
        let sums: usize = sums.map(Vec::capacity).sum();
        let floats = sums + self.room.capacity();
        self.chunks.capacity() * size_of::<Chunk>() + floats * size_of::<f32>()
    }

    /// Makes room for the sums of `positions`, of `(n_kv_heads, head_dim)`; for those of values, if they are pooled.
    pub(in crate::backend) fn reserve(
        &mut self,
        chunking: Chunking,
        heads: (usize, usize),
        positions: usize,
        pools: bool,
        predictor: Option<&Predictor>,
    ) -> Result<()> {
        let (n_kv_heads, head_dim) = heads;
        let n = positions / chunking.least();
        self.sums.resize_with(n_kv_heads, Vec::new);
        if pools {
            self.values.resize_with(n_kv_heads, Vec::new);
        }
        let room = chunking.room(n_kv_heads * head_dim, predictor);
        let more = |held: usize, wanted: usize| wanted.saturating_sub(held);
        let mut reserved = self
            .chunks
            .try_reserve_exact(more(self.chunks.len(), n))
            .and_then(|()| self.room.try_reserve_exact(more(self.room.len(), room)))
            .is_ok();
        for sums in self.sums.iter_mut().chain(&mut self.values) {
            reserved &= sums
                .try_reserve_exact(more(sums.len(), n * head_dim))
                .is_ok();
        }
        reserved.then_some(()).ok_or_else(|| Error::OutOfMemory {
            what: "sums of keys".into(),
            bytes: n * n_kv_heads * head_dim * size_of::<f32>(),
        })
    }

    /// Takes account of keys that were written at `positions`, of which none are left behind them. `key` and `value` read
    /// those of a position, `(n_kv_heads, head_dim)`, as they are cached; `samples` are what [`Chunking::samples`] asks for.
    /// There is a predictor of keys so wide for [`Chunking::Predict`].
    pub(in crate::backend) fn update(
        &mut self,
        chunking: Chunking,
        head_dim: usize,
        positions: Range<usize>,
        [key, value]: [&ReadRow; 2],
        samples: &Notes,
        predictor: Option<&Predictor>,
    ) {
        let kept = self.n_known(positions.start);
        self.chunks.truncate(kept);
        for sums in self.sums.iter_mut().chain(&mut self.values) {
            sums.truncate(kept * head_dim);
        }
        let n = self.sums.len() * head_dim;
        let mut room = std::mem::take(&mut self.room);
        room.resize(chunking.room(n, predictor), 0.0);
        let (keys, rest) = room.split_at_mut(chunking.reach() * n);
        loop {
            let start = self.chunks.last().map_or(0, |chunk| chunk.end as usize);
            let known = start + chunking.reach();
            if known > positions.end {
                break;
            }
            for (i, key_i) in keys.chunks_exact_mut(n).enumerate() {
                key(start + i, key_i);
            }
            let n_keys = match chunking {
                Chunking::Fixed(n_keys) => n_keys,
                Chunking::Shift(_) => largest_shift(keys, n, chunking.ends()),
                Chunking::Labels(_) => largest_ratio(samples, start..known, chunking.ends()),
                Chunking::Predict(_) => {
                    let predictor = predictor.expect("who made the cache saw to it");
                    predictor.best_end(keys, chunking.ends(), rest)
                }
            };
            self.chunks.push(Chunk {
                start: start as u32,
                end: (start + n_keys) as u32,
                known: known as u32,
            });
            add_sums(&mut self.sums, head_dim, &keys[..n_keys * n]);
            if !self.values.is_empty() {
                for (i, value_i) in keys.chunks_exact_mut(n).take(n_keys).enumerate() {
                    value(start + i, value_i);
                }
                add_sums(&mut self.values, head_dim, &keys[..n_keys * n]);
            }
        }
        self.room = room;
    }
}

/// Appends to the sums of each head that of `rows`, `(n, n_heads, head_dim)`.
fn add_sums(heads: &mut [Vec<f32>], head_dim: usize, rows: &[f32]) {
    let n = heads.len() * head_dim;
    for (head, sums) in heads.iter_mut().enumerate() {
        let at = sums.len();
        sums.resize(at + head_dim, 0.0);
        for row in rows.chunks_exact(n) {
            let row = &row[head * head_dim..][..head_dim];
            let sums = sums[at..].iter_mut().zip(row);
            sums.for_each(|(sum, x)| *sum += x);
        }
    }
}

/// The end among `ends`, the first of equals, on whose two sides the sums of rows of `keys`, of `n` floats, differ most.
fn largest_shift(keys: &[f32], n: usize, ends: RangeInclusive<usize>) -> usize {
    let least = |best: (f32, usize), end: usize| {
        let (mut product, mut left2, mut right2) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let sum = |rows: Range<usize>| rows.map(|row| keys[row * n + i]).sum::<f32>();
            let left = sum(end - SHIFT_WINDOW..end);
            let right = sum(end..end + SHIFT_WINDOW);
            product += left * right;
            left2 += left * left;
            right2 += right * right;
        }
        let cosine = product / (left2 * right2).sqrt().max(f32::MIN_POSITIVE);
        if cosine < best.0 { (cosine, end) } else { best }
    };
    let first = *ends.start();
    ends.fold((f32::INFINITY, first), least).1
}

/// The length among `ends`, the first of equals, of a chunk at the first of `positions` on whose two sides keys get the
/// most unlike attention from the queries at `positions` that left a sample. A sample has the attention to its own key, to
/// the one before, and so on.
fn largest_ratio(samples: &Notes, positions: Range<usize>, ends: RangeInclusive<usize>) -> usize {
    let first = *ends.start();
    let more = |best: (f32, usize), n_keys: usize| {
        let end = positions.start + n_keys;
        let (mut past, mut future) = (0.0, 0.0);
        let after = end - 1 + SHIFT_WINDOW..positions.end;
        for position in samples.shape().among(after) {
            let (row, back) = (samples.row(position), position - end);
            future += row[back + 1 - SHIFT_WINDOW..=back].iter().sum::<f32>();
            past += row[back + 1..=back + SHIFT_WINDOW].iter().sum::<f32>();
        }
        let ratio = (f32::max(past, future) + 1e-6) / (f32::min(past, future) + 1e-6);
        if ratio > best.0 {
            (ratio, n_keys)
        } else {
            best
        }
    };
    ends.fold((0.0, first), more).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::predictor::Shape;

    const HEADS: (usize, usize) = (2, 4);

    /// Keys of two heads that turn sharply every 11 positions.
    fn key(position: usize, out: &mut [f32]) {
        for (i, x) in out.iter_mut().enumerate() {
            let direction = if i % 4 == position / 11 % 4 { 3.0 } else { 0.0 };
            *x = direction + ((position * 7 + i * 13) % 5) as f32 * 0.1;
        }
    }

    fn value(position: usize, out: &mut [f32]) {
        key(position + 1, out);
    }

    /// Of queries that look at every other stretch of 11 keys more than at the rest.
    fn samples(chunking: Chunking, n: usize) -> Notes {
        let mut samples = Notes::new(chunking.samples());
        samples.reserve(n).unwrap();
        for position in chunking.samples().among(0..n) {
            for (back, x) in samples.row_mut(position).iter_mut().enumerate() {
                let turn = position.checked_sub(back).map_or(0, |key| key / 11 % 2);
                *x = 0.1 + turn as f32;
            }
        }
        samples
    }

    /// Of such keys, with parameters that are all different.
    fn predictor() -> Predictor {
        let shape = Shape {
            width: 8,
            n_heads: 2,
            n_hidden: 5,
        };
        let param = |i: usize| (i * 37 % 101) as f32 / 101.0 - 0.5;
        Predictor::new(0, shape, (0..shape.n_params()).map(param).collect())
    }

    fn whole(chunking: Chunking, n: usize) -> Chunks {
        let mut chunks = Chunks::default();
        let predictor = predictor();
        chunks
            .reserve(chunking, HEADS, n, true, Some(&predictor))
            .unwrap();
        chunks.update(
            chunking,
            HEADS.1,
            0..n,
            [&key, &value],
            &samples(chunking, n),
            Some(&predictor),
        );
        chunks
    }

    #[test]
    fn sums_are_those_of_the_keys_and_chunks_leave_no_gap() {
        for chunking in [
            Chunking::Fixed(16),
            Chunking::Shift(12),
            Chunking::Labels(12),
            Chunking::Predict(12),
        ] {
            let chunks = whole(chunking, 200);
            let mut at = 0;
            for (i, chunk) in chunks.chunks().iter().enumerate() {
                assert_eq!(chunk.start as usize, at);
                at = chunk.end as usize;
                assert!((chunking.least()..=chunking.most()).contains(&chunk.n_keys()));
                assert!(at <= chunk.known as usize && chunk.known as usize <= 200);
                for (head, first) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    let mut expected = [0.0f64; 4];
                    for position in chunk.start..chunk.end {
                        let mut keys = [0.0; 8];
                        key(position as usize + first, &mut keys);
                        for (sum, k) in expected.iter_mut().zip(&keys[head * 4..]) {
                            *sum += f64::from(*k);
                        }
                    }
                    let sums = [chunks.sums(head), chunks.values(head)][first];
                    for (sum, expected) in sums[i * 4..].iter().zip(expected) {
                        assert!((f64::from(*sum) - expected).abs() < 1e-4);
                    }
                }
            }
            assert!(200 - at < chunking.reach());
        }
    }

    #[test]
    fn boundaries_lie_where_keys_turn() {
        for chunking in [Chunking::Shift(12), Chunking::Labels(12)] {
            let chunks = whole(chunking, 300);
            let turns = chunks.chunks().iter().filter(|c| c.end % 11 == 0);
            // One that starts at a turn finds the next one; there are no others.
            assert_eq!(turns.count(), chunks.chunks().len());
        }
    }

    #[test]
    fn what_is_held_depends_on_the_keys_alone_not_on_how_they_came() {
        for chunking in [
            Chunking::Fixed(16),
            Chunking::Shift(12),
            Chunking::Labels(12),
            Chunking::Predict(12),
        ] {
            let expected = whole(chunking, 150);
            let mut chunks = Chunks::default();
            let predictor = predictor();
            chunks
                .reserve(chunking, HEADS, 300, true, Some(&predictor))
                .unwrap();
            // In steps, too far, back, and on.
            for positions in [0..7, 7..64, 64..65, 65..131, 131..290, 100..101, 101..150] {
                let samples = samples(chunking, positions.end);
                chunks.update(
                    chunking,
                    HEADS.1,
                    positions,
                    [&key, &value],
                    &samples,
                    Some(&predictor),
                );
            }
            assert_eq!(chunks.chunks(), expected.chunks());
            assert_eq!(chunks.sums, expected.sums);
            assert_eq!(chunks.values, expected.values);
            // What may be known of a beginning is what the beginning alone gives.
            for n in [0, 15, 16, 40, 99, 150] {
                let alone = whole(chunking, n);
                let n_known = chunks.n_known(n);
                assert_eq!(alone.chunks(), &chunks.chunks()[..n_known]);
                for head in 0..2 {
                    assert_eq!(alone.sums(head), &chunks.sums(head)[..n_known * 4]);
                }
            }
        }
    }
}
