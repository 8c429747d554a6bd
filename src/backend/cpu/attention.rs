//! Keys and values in pages, and attention over them with the streaming softmax kernels.
//!
//! A page holds `PAGE` positions: `(n_kv_heads, PAGE, head_dim)` keys, and values likewise. So a span of keys of one
//! head is contiguous, and a cache grows without moving.

use std::ops::Range;
use std::sync::Arc;

use super::Cpu;
use super::attention_lanes::Lanes;
use super::pages::{Page, Pages};
use super::pool::{Output, Pool};
use super::scratch::Scratch;
use super::table::{AttendBatch, AttendSpan, AttendTokens, Operations, Ready, Rows, ToF16};
use crate::backend::delta::Delta;
use crate::backend::notes::{NoteShape, Notes};
use crate::backend::predictor::Predictor;
pub(super) use crate::backend::select::runs;
use crate::backend::select::{Chunking, Chunks, KvOptions, Select, seen_from};
use crate::backend::{Attention, KV_PAGE, KvType, KvTypes, Step};
use crate::error::Result;
use crate::profile::Work;
use crate::quant;

/// Positions in a page.
pub(super) const PAGE: usize = KV_PAGE;

/// Queries that share a pass over the keys: few enough for their sums to stay in the first-level cache.
const MAX_QUERIES: usize = 64;

/// Queries that share the tiles of a page of keys: turning them costs as much as some 30 queries.
const TILE_QUERIES: usize = 384;

/// Tokens of a tile of queries.
const TILE_TOKENS: usize = 16;

/// Heads that are whole tiles are multiples of this.
const TILE_HEAD: usize = 64;

/// Keys and values of one layer. Copies share their pages until one of them makes room to write there.
#[derive(Clone)]
pub struct KvCache {
    keys: Vec<Arc<Page>>,
    values: Vec<Arc<Page>>,
    pages: Arc<Pages>,
    kinds: KvTypes,
    n_kv_heads: usize,
    head_dim: usize,
    select: Option<Arc<dyn Select>>,
    /// Sums of keys, where `select` wants some.
    chunks: Arc<Chunks>,
    /// What queries leave for `select`: see [`NoteShape::all`].
    notes: [Arc<Notes>; 2],
    /// Of the network.
    layer: usize,
    predictor: Option<Arc<Predictor>>,
    delta: Option<Arc<Delta>>,
    /// What each channel may be off by, `(n_kv_heads, head_dim)`, where there is a `delta`.
    thresholds: Arc<[f32]>,
}

/// Bytes of a page of keys and the same page of values.
pub(in crate::backend) fn page_bytes(shape: &Attention, kinds: KvTypes) -> usize {
    kinds.row_bytes(shape.n_kv_heads * PAGE * shape.head_dim)
}

impl KvCache {
    pub(super) fn new(attention: &Attention, options: &KvOptions, pages: &Arc<Pages>) -> Self {
        let (n_kv_heads, head_dim) = (attention.n_kv_heads, attention.head_dim);
        pages.expect(options.layer, page_bytes(attention, options.kinds));
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            pages: Arc::clone(pages),
            kinds: options.kinds,
            n_kv_heads,
            head_dim,
            select: options.select.clone(),
            predictor: options.predictor.clone(),
            chunks: Arc::default(),
            notes: NoteShape::all(options.select.as_deref(), attention)
                .map(|shape| Arc::new(Notes::new(shape))),
            layer: options.layer,
            thresholds: match &options.delta {
                Some(delta) => delta
                    .thresholds(options.layer, n_kv_heads * head_dim)
                    .into(),
                None => Arc::default(),
            },
            delta: options.delta.clone(),
        }
    }

    /// Positions for which there is room.
    pub(super) fn n_positions(&self) -> usize {
        self.keys.len() * PAGE
    }

    /// Which layer's it is.
    pub(super) fn layer(&self) -> usize {
        self.layer
    }

    /// How scores are computed with keys far back, if not as others.
    pub(super) fn delta(&self) -> Option<&Delta> {
        self.delta.as_deref()
    }

    /// What each channel of a head of keys may be off by there; nothing without it.
    pub(super) fn thresholds(&self, kv_head: usize) -> &[f32] {
        match self.delta {
            Some(_) => &self.thresholds[kv_head * self.head_dim..][..self.head_dim],
            None => &[],
        }
    }

    /// Who chooses keys.
    pub(super) fn select(&self) -> Option<&dyn Select> {
        self.select.as_deref()
    }

    /// Sums of keys.
    pub(super) fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// Who chooses keys, to be held while the cache changes.
    pub(super) fn share_select(&self) -> Option<Arc<dyn Select>> {
        self.select.clone()
    }

    /// The attention of some queries to the keys before them.
    pub(super) fn samples(&self) -> &Notes {
        &self.notes[0]
    }

    /// What attention to all keys adds.
    pub(super) fn differences(&self) -> &Notes {
        &self.notes[1]
    }

    /// The same, to be written where room was made.
    pub(super) fn differences_mut(&mut self) -> &mut Notes {
        own(&mut self.notes[1])
    }

    /// Likewise.
    pub(super) fn samples_mut(&mut self) -> &mut Notes {
        own(&mut self.notes[0])
    }

    fn chunking(&self) -> Option<Chunking> {
        self.select()?.chunking()
    }

    /// Whether sums of keys wait for what queries leave.
    pub(super) fn waits_for_queries(&self) -> bool {
        self.samples().shape() != NoteShape::default()
    }

    /// Reads a key of a head.
    pub(super) fn key(&self, position: usize, kv_head: usize, out: &mut [f32]) {
        read(&self.keys, self.kinds.keys, (position, kv_head), out);
    }

    /// Sums the keys at `positions`, which are the last.
    pub(super) fn sum_keys(&mut self, positions: Range<usize>) {
        let Some(chunking) = self.chunking() else {
            return;
        };
        let own =
            Arc::get_mut(&mut self.chunks).expect("the cache's own since room was made there");
        let n = self.head_dim;
        let read = |pages: &[Arc<Page>], kind: KvType, position: usize, out: &mut [f32]| {
            for (head, out) in out.chunks_exact_mut(n).enumerate() {
                read(pages, kind, (position, head), out);
            }
        };
        let (keys, values, kinds) = (&self.keys, &self.values, self.kinds);
        let key = |position: usize, out: &mut [f32]| read(keys, kinds.keys, position, out);
        let value = |position: usize, out: &mut [f32]| read(values, kinds.values, position, out);
        own.update(
            chunking,
            n,
            positions,
            [&key, &value],
            &self.notes[0],
            self.predictor.as_deref(),
        );
    }

    /// Makes room to write at `positions`.
    pub(super) fn reserve(&mut self, positions: Range<usize>) -> Result<()> {
        let elements = self.n_kv_heads * PAGE * self.head_dim;
        let source = &self.pages;
        let fresh = |kind: KvType, from: &[u8]| {
            let mut page = source.take(kind.row_bytes(elements))?;
            page[..from.len()].copy_from_slice(from);
            Ok(Arc::new(page))
        };
        let (first, end) = (positions.start / PAGE, positions.end.div_ceil(PAGE));
        let KvTypes { keys, values } = self.kinds;
        for (kind, pages) in [(keys, &mut self.keys), (values, &mut self.values)] {
            let held = first.min(pages.len())..end.min(pages.len());
            for page in &mut pages[held] {
                if Arc::get_mut(page).is_none() {
                    *page = fresh(kind, page)?;
                }
            }
            while pages.len() < end {
                pages.push(fresh(kind, &[])?);
            }
        }
        if let Some(chunking) = self.chunking() {
            let pools = self.select().is_some_and(Select::pools);
            let predictor = self.predictor.as_deref();
            if Arc::get_mut(&mut self.chunks).is_none() {
                self.chunks = Arc::new(self.chunks.try_clone()?);
            }
            let chunks = Arc::get_mut(&mut self.chunks).expect("made so");
            chunks.reserve(
                chunking,
                (self.n_kv_heads, self.head_dim),
                end * PAGE,
                pools,
                predictor,
            )?;
        }
        for notes in &mut self.notes {
            if Arc::get_mut(notes).is_none() {
                *notes = Arc::new(notes.try_clone()?);
            }
            own(notes).reserve(end * PAGE)?;
        }
        Ok(())
    }

    /// See [`crate::backend::Backend::kv_save`]: a page of the file is what a page here holds.
    pub(super) fn save(&self, n: usize, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        for (i, page) in self
            .keys
            .iter()
            .zip(&self.values)
            .take(n.div_ceil(PAGE))
            .enumerate()
        {
            let n_in_page = (n - i * PAGE).min(PAGE);
            for spans in [page.0, page.1] {
                for span in spans.chunks_exact(spans.len() / self.n_kv_heads) {
                    sink(&span[..span.len() / PAGE * n_in_page])?;
                }
            }
        }
        let rows = self.notes.iter().map(|notes| notes.saved(n));
        rows.filter(|rows| !rows.is_empty()).try_for_each(sink)
    }

    /// See [`crate::backend::Backend::kv_load`].
    pub(super) fn load(
        &mut self,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let pages = self.keys.iter_mut().zip(&mut self.values);
        for (i, page) in pages.take(n.div_ceil(PAGE)).enumerate() {
            let n_in_page = (n - i * PAGE).min(PAGE);
            for spans in [page.0, page.1] {
                let spans = own(spans);
                let bytes = spans.len() / self.n_kv_heads;
                for span in spans.chunks_exact_mut(bytes) {
                    source(&mut span[..bytes / PAGE * n_in_page])?;
                }
            }
        }
        for notes in &mut self.notes {
            match own(notes).saved_mut(n) {
                [] => {}
                rows => source(rows)?,
            }
        }
        self.sum_keys(0..n);
        Ok(())
    }

    /// Types of the elements.
    pub(super) fn kinds(&self) -> KvTypes {
        self.kinds
    }

    /// Bytes of all pages.
    pub(super) fn bytes(&self) -> usize {
        self.keys
            .iter()
            .chain(&self.values)
            .map(|page| page.len())
            .sum::<usize>()
            + self.chunks.bytes()
            + self.notes.iter().map(|notes| notes.bytes()).sum::<usize>()
    }

    /// Stores the keys and values of one position, `(n_kv_heads, head_dim)` each.
    pub(super) fn write(&mut self, position: usize, k: &[f32], v: &[f32], to_f16: Ready<ToF16>) {
        let (page, slot) = (position / PAGE, position % PAGE);
        let KvTypes { keys, values } = self.kinds;
        for (kind, pages, x) in [(keys, &mut self.keys, k), (values, &mut self.values, v)] {
            let page = own(&mut pages[page]);
            let row = kind.row_bytes(self.head_dim);
            for (head, x) in x.chunks_exact(self.head_dim).enumerate() {
                let out = &mut page[(head * PAGE + slot) * row..][..row];
                match kind {
                    KvType::F32 => out.copy_from_slice(bytemuck::cast_slice(x)),
                    KvType::F16 => to_f16.run(x, bytemuck::cast_slice_mut(out)),
                    KvType::Q8_0 | KvType::Q4_0 => quant::quantize(kind.dtype(), x, out),
                }
            }
        }
    }

    /// The kernel that stores half floats; empty where there are none.
    pub(super) fn write_kernel(&self, operations: &Operations) -> &'static str {
        match [self.kinds.keys, self.kinds.values].contains(&KvType::F16) {
            true => operations.to_f16.name(),
            false => "",
        }
    }
}

/// What a position has of a head, of `out.len()` elements.
fn read(pages: &[Arc<Page>], kind: KvType, (position, head): (usize, usize), out: &mut [f32]) {
    let row = kind.row_bytes(out.len());
    let at = (head * PAGE + position % PAGE) * row;
    quant::dequantize(kind.dtype(), &pages[position / PAGE][at..at + row], out);
}

/// A page, or what queries left, for which room to write was made.
fn own<T>(of: &mut Arc<T>) -> &mut T {
    Arc::get_mut(of).expect("the cache's own since room was made there")
}

/// One attention: a batch of queries at positions `start..` against a cache that holds them.
pub(super) struct Attend<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) shape: &'a Attention,
    pub(super) start: usize,
    /// Whether the tokens are decoded, one after the other.
    pub(super) decode: bool,
    pub(super) operations: &'a Operations,
    pub(super) scratch: &'a Scratch,
}

impl Cpu {
    /// Queries at positions `start..` against a cache that holds them.
    pub(super) fn attend<'a>(
        &'a self,
        cache: &'a KvCache,
        shape: &'a Attention,
        start: usize,
    ) -> Attend<'a> {
        Attend {
            cache,
            shape,
            start,
            decode: self.step == Step::Decode,
            operations: &self.operations,
            scratch: &self.scratch,
        }
    }
}

/// Running sums of some queries in one buffer: largest scores, sums of weights, weighted values.
pub(super) struct Sums<'a> {
    pub(super) max: &'a mut [f32],
    pub(super) sum: &'a mut [f32],
    pub(super) out: &'a mut [f32],
}

impl<'a> Sums<'a> {
    pub(super) fn floats(n_queries: usize, head_dim: usize) -> usize {
        n_queries * (head_dim + 2)
    }

    pub(super) fn fresh(buffer: &'a mut [f32], n_queries: usize) -> Self {
        buffer.fill(0.0);
        let (max, rest) = buffer.split_at_mut(n_queries);
        max.fill(f32::NEG_INFINITY);
        let (sum, out) = rest.split_at_mut(n_queries);
        Self { max, sum, out }
    }
}

/// The kernel that attends to `cache`.
pub(super) fn kernel(cache: &KvCache, step: Step, operations: &Operations) -> &'static str {
    if let Some(tiles) = tiles(operations, cache.head_dim, cache.kinds, step) {
        return tiles.name();
    }
    match Lanes::new(operations, cache.head_dim, cache.kinds, step, cache.delta()) {
        Some(_) => operations.attend_lanes.name(),
        None => operations.attend.name(),
    }
}

/// What queries at `positions` do: each cached key and value that any of them sees is read, and each query multiplies
/// and adds those that it sees.
pub(in crate::backend) fn work(shape: &Attention, kinds: KvTypes, positions: Range<usize>) -> Work {
    let read = positions.end - seen_from(shape, positions.start).start;
    let seen: usize = positions.map(|p| seen_from(shape, p).len()).sum();
    let pairs = (seen * shape.n_heads) as u64;
    Work {
        kv_bytes: (read * shape.n_kv_heads * kinds.row_bytes(shape.head_dim)) as u64,
        attention_ops: 4 * pairs * shape.head_dim as u64,
        pairs,
        pairs_read: pairs,
        ..Work::default()
    }
}

/// The same where `select` chooses keys, as if no two queries read the same one.
pub(in crate::backend) fn work_selected(
    shape: &Attention,
    options: &KvOptions,
    positions: Range<usize>,
) -> Work {
    let Some(select) = &options.select else {
        return work(shape, options.kinds, positions);
    };
    let mut sum = Work::default();
    for (is_dense, run) in runs(shape, select.as_ref(), positions) {
        let mut dense = work(shape, options.kinds, run.clone());
        if !is_dense {
            let keys = |position| select.budget(seen_from(shape, position).len());
            let n_keys: usize = run.clone().map(keys).sum();
            dense.pairs_read = (n_keys * shape.n_heads) as u64;
            dense.attention_ops = 4 * dense.pairs_read * shape.head_dim as u64;
            dense.kv_bytes =
                (n_keys * shape.n_kv_heads * options.kinds.row_bytes(shape.head_dim)) as u64;
        }
        sum += dense;
    }
    sum
}

/// Pages that queries at `positions` see.
pub(super) fn pages(shape: &Attention, positions: Range<usize>) -> Range<usize> {
    seen_from(shape, positions.start).start / PAGE..positions.end.div_ceil(PAGE)
}

/// Tokens of a task of `many_in_tiles`.
pub(super) fn tile_tokens(group: usize) -> usize {
    (TILE_QUERIES / group).next_multiple_of(TILE_TOKENS)
}

/// Tokens of a task of `many`.
pub(super) fn task_tokens(group: usize) -> usize {
    (MAX_QUERIES / group).max(1)
}

/// The floats of the buffers that queries at `positions` take on `n_threads`, those that may be held together side by
/// side.
pub(in crate::backend) fn scratch(
    operations: &Operations,
    shape: &Attention,
    kinds: KvTypes,
    step: Step,
    positions: Range<usize>,
    n_threads: usize,
) -> Vec<Vec<usize>> {
    let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    if tiles(operations, shape.head_dim, kinds, step).is_some() {
        return Vec::new();
    }
    if step == Step::Decode {
        let one = |p: usize| {
            let n_tasks = shape.n_kv_heads * pages(shape, p..p + 1).len();
            vec![shape.n_heads * n, n_tasks * Sums::floats(group, n)]
        };
        return positions.map(one).collect();
    }
    let tokens = task_tokens(group);
    let many = |n_tokens: usize, n_tasks: usize| {
        let queries = n_tokens * group;
        let task = [queries * n, Sums::floats(queries, n)];
        task.repeat(n_tasks.min(n_threads))
    };
    // The last tokens come first.
    let (whole, rest) = (positions.len() / tokens, positions.len() % tokens);
    let rest = (rest > 0).then(|| many(rest, shape.n_kv_heads));
    let whole = (whole > 0).then(|| many(tokens, whole * shape.n_kv_heads));
    rest.into_iter().chain(whole).collect()
}

/// The kernel that works in tiles, if there is one for this step and this cache: it rounds keys and values, which who
/// asks for floats does not want.
pub(super) fn tiles(
    operations: &Operations,
    head_dim: usize,
    kinds: KvTypes,
    step: Step,
) -> Option<Ready<AttendTokens>> {
    let fits = step == Step::Prefill
        && ![kinds.keys, kinds.values].contains(&KvType::F32)
        && head_dim.is_multiple_of(TILE_HEAD);
    operations.attend_tiles.filter(|_| fits)
}

impl Attend<'_> {
    pub(super) fn group(&self) -> usize {
        self.shape.n_heads / self.shape.n_kv_heads
    }

    pub(super) fn visible(&self, position: usize) -> Range<usize> {
        seen_from(self.shape, position)
    }

    /// Pages that the queries at `positions` see.
    pub(super) fn pages(&self, positions: Range<usize>) -> Range<usize> {
        pages(self.shape, positions)
    }

    /// Keys and values of a head in a page.
    pub(super) fn rows(&self, page: usize, kv_head: usize) -> [Rows<'_>; 2] {
        let cache = self.cache;
        let KvTypes { keys, values } = cache.kinds;
        [(keys, &cache.keys), (values, &cache.values)].map(|(kind, pages)| {
            let bytes = kind.row_bytes(PAGE * cache.head_dim);
            Rows::new(kind, &pages[page][kv_head * bytes..][..bytes])
        })
    }

    /// Adds one page to the sums of queries `q`, of which the first is at `position` and each position has a group; `next` is
    /// the page and head after it.
    fn add_page(
        &self,
        (page, kv_head): (usize, usize),
        next: Option<(usize, usize)>,
        q: &[f32],
        position: usize,
        sums: &mut Sums,
    ) {
        let n = self.shape.head_dim;
        let [k, v] = self.rows(page, kv_head);
        let next = next.map_or(&[][..], |(page, head)| self.rows(page, head)[0].bytes());
        for first in (0..sums.max.len()).step_by(MAX_QUERIES) {
            let queries = first..(first + MAX_QUERIES).min(sums.max.len());
            let mut visible = [(0, 0); MAX_QUERIES];
            for (visible, query) in visible.iter_mut().zip(queries.clone()) {
                let sees = self.visible(position + query / self.group());
                let in_page = |p: usize| p.saturating_sub(page * PAGE).min(PAGE);
                *visible = (in_page(sees.start), in_page(sees.end));
            }
            self.operations.attend.run(&mut AttendSpan {
                q: &q[queries.start * n..queries.end * n],
                k,
                v,
                next,
                head_dim: n,
                decode: self.decode,
                visible: &visible[..queries.len()],
                max: &mut sums.max[queries.clone()],
                sum: &mut sums.sum[queries.clone()],
                out: &mut sums.out[queries.start * n..queries.end * n],
            });
        }
    }

    /// One token at `position`: the pages are spread over the threads and their sums merged. The result does not depend on the
    /// number of threads.
    pub(super) fn one(&self, pool: &Pool, position: usize, q: &[f32], out: &mut [f32]) {
        let (n, group) = (self.shape.head_dim, self.group());
        let pages = self.pages(position..position + 1);
        let mut scaled = self.scratch.take(q.len());
        scaled
            .iter_mut()
            .zip(q)
            .for_each(|(scaled, q)| *scaled = q * self.shape.scale);
        let floats = Sums::floats(group, n);
        let mut partial = self
            .scratch
            .take(self.shape.n_kv_heads * pages.len() * floats);
        pool.run_pieces(&mut partial, floats, &|i, buffer| {
            let piece = |i: usize| (pages.start + i % pages.len(), i / pages.len());
            let next = Some(piece(i + 1)).filter(|(_, head)| *head < self.shape.n_kv_heads);
            let (_, kv_head) = piece(i);
            let mut sums = Sums::fresh(buffer, group);
            self.add_page(
                piece(i),
                next,
                &scaled[kv_head * group * n..][..group * n],
                position,
                &mut sums,
            );
        });
        for (head, out) in out.chunks_exact_mut(n).enumerate() {
            let (kv_head, query) = (head / group, head % group);
            let parts = partial[kv_head * pages.len() * floats..]
                .chunks_exact(floats)
                .take(pages.len());
            let max = parts
                .clone()
                .fold(f32::NEG_INFINITY, |max, part| max.max(part[query]));
            out.fill(0.0);
            let mut sum = 0.0;
            for part in parts {
                let weight = (part[query] - max).exp();
                sum += weight * part[group + query];
                let values = &part[2 * group + query * n..][..n];
                out.iter_mut()
                    .zip(values)
                    .for_each(|(out, v)| *out += weight * v);
            }
            out.iter_mut().for_each(|out| *out /= sum);
        }
    }

    /// Many tokens: each task takes some of them and one kv head through all keys they see.
    pub(super) fn many(&self, pool: &Pool, q: &[f32], out: &mut [f32]) {
        let (n, group) = (self.shape.head_dim, self.group());
        let n_cols = self.shape.n_heads * n;
        let n_tokens = task_tokens(group);
        let mut outputs = [Output::new(out, n_cols)];
        pool.run_tiles(&mut outputs, (n_tokens, group * n), &|mut tile| {
            let kv_head = tile.first_col / (group * n);
            let n_queries = tile.out.n_tokens() * group;
            let mut scaled = self.scratch.take(n_queries * n);
            for (t, scaled) in scaled.chunks_exact_mut(group * n).enumerate() {
                let q = &q[(tile.first_row + t) * n_cols + tile.first_col..][..group * n];
                scaled
                    .iter_mut()
                    .zip(q)
                    .for_each(|(scaled, q)| *scaled = q * self.shape.scale);
            }
            let mut buffer = self.scratch.take(Sums::floats(n_queries, n));
            let mut sums = Sums::fresh(&mut buffer, n_queries);
            let first = self.start + tile.first_row;
            for page in self.pages(first..first + tile.out.n_tokens()) {
                self.add_page((page, kv_head), None, &scaled, first, &mut sums);
            }
            for t in 0..tile.out.n_tokens() {
                for (i, out) in tile.out.row(t).chunks_exact_mut(n).enumerate() {
                    let query = t * group + i;
                    let inverse = 1.0 / sums.sum[query];
                    let values = &sums.out[query * n..][..n];
                    out.iter_mut()
                        .zip(values)
                        .for_each(|(out, v)| *out = v * inverse);
                }
            }
        });
    }

    /// The kernel that works in tiles, if this step and this cache have one.
    pub(super) fn tiles(&self, step: Step) -> Option<Ready<AttendTokens>> {
        let (shape, kinds) = (self.shape, self.cache.kinds);
        tiles(self.operations, shape.head_dim, kinds, step)
    }

    /// As `many`, by a kernel that walks the pages itself and turns each into tiles once for a task.
    pub(super) fn many_in_tiles(
        &self,
        pool: &Pool,
        kernel: Ready<AttendTokens>,
        q: &[f32],
        out: &mut [f32],
    ) {
        let (n, group) = (self.shape.head_dim, self.group());
        let n_cols = self.shape.n_heads * n;
        let n_tokens = tile_tokens(group);
        let mut outputs = [Output::new(out, n_cols)];
        pool.run_tiles(&mut outputs, (n_tokens, group * n), &|tile| {
            let kv_head = tile.first_col / (group * n);
            let start = self.start + tile.first_row;
            let pages = self.pages(start..start + tile.out.n_tokens());
            let rows = |page| self.rows(page, kv_head).into();
            let (keys, values): (Vec<_>, Vec<_>) = pages.clone().map::<(_, _), _>(rows).unzip();
            kernel.run(&mut AttendBatch {
                q: &q[tile.first_row * n_cols + tile.first_col..],
                q_stride: n_cols,
                group,
                head_dim: n,
                scale: self.shape.scale,
                start,
                window: self.shape.window,
                first: pages.start * PAGE,
                page: PAGE,
                keys: &keys,
                values: &values,
                out: tile.out,
            });
        });
    }
}
