//! Caches of keys and values, and attention on them.

use std::ops::Range;
use std::sync::Arc;

use wgpu::BufferUsages;

use super::device::Buffer;
use super::ops::vec4;
use super::packed::Packed;
use super::pipeline::{Reads, Shader};
use super::record::Bindings;
use super::sparse::{Choice, Chosen};
use super::weights::UNIT;
use super::{Gpu, Heads, Rows, Tensor, Value, sparse};
use crate::backend::select::{By, KvOptions, Rule, seen_from};
use crate::backend::{Attention, KV_PAGE, KvType, KvTypes, Step};
use crate::error::{Error, Result};

/// Positions by which a cache grows at least.
pub(super) const KV_STEP: usize = 256;

/// Positions of a tile of the attention of one token.
const TILE: usize = 128;

/// Keys up to which a token that is decoded reads few: `shaders/attention_few.wgsl`.
const FEW: usize = 2048;

/// Positions of a tile there, and lanes that share one.
const FEW_TILE: usize = 32;
const FEW_PARTS: usize = 4;

/// Keys up to which one token's attention is not split.
const UNSPLIT: usize = 96;

/// Parts of a split attention at most.
const MAX_SPLITS: usize = 128;

/// Query heads that share loads of keys at most.
const MAX_GROUP: usize = 8;

/// Elements of a head at most.
pub(super) const MAX_HEAD: usize = 256;

/// Keys and values of one layer that are not in the cache yet.
pub(super) struct Waiting {
    keys: Heads,
    values: Rows,
    n_tokens: usize,
    start: usize,
    cache: CacheView,
}

/// Keys and values, `(n_positions, n_kv_heads, head_dim)` each.
pub struct KvCache {
    kinds: KvTypes,
    n_kv_heads: usize,
    head_dim: usize,
    n_positions: usize,
    memory: Option<[Arc<Buffer>; 2]>,
    choice: Option<Choice>,
}

/// A cache as one pass sees it.
#[derive(Clone)]
pub(super) struct CacheView {
    pub(super) kinds: KvTypes,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) n_positions: usize,
    pub(super) keys: Arc<Buffer>,
    values: Arc<Buffer>,
    pub(super) choice: Option<Choice>,
}

/// Which keys of a cache a token reads.
enum Read<'a> {
    /// Adjacent ones.
    All(Range<usize>),
    /// Of those that it sees the first and the last, as a rule says.
    Ends(Range<usize>, Rule),
    /// Rows of a list, the first of a token that is not the list's first.
    List(&'a Chosen, usize),
}

/// Bytes of a block of a file, and of one on the device, where all begin with whole words.
const BLOCK: (usize, usize) = (34, 36);

/// Bytes of `n` elements of keys or values on a device.
pub(super) fn row_bytes(kind: KvType, n: usize) -> usize {
    match kind {
        KvType::Q8_0 => kind.row_bytes(n) / BLOCK.0 * BLOCK.1,
        _ => kind.row_bytes(n),
    }
}

impl CacheView {
    fn of(kv: &KvCache) -> Self {
        let [keys, values] = kv.memory.as_ref().expect("room was made before");
        Self {
            kinds: kv.kinds,
            n_kv_heads: kv.n_kv_heads,
            head_dim: kv.head_dim,
            n_positions: kv.n_positions,
            keys: Arc::clone(keys),
            values: Arc::clone(values),
            choice: kv.choice.clone(),
        }
    }

    fn check(&self, attention: &Attention) {
        let heads = (self.n_kv_heads, self.head_dim);
        assert_eq!(heads, (attention.n_kv_heads, attention.head_dim), "heads");
    }
}

impl KvCache {
    /// An empty one.
    pub(super) fn new(attention: &Attention, options: &KvOptions) -> Result<Self> {
        Ok(Self {
            kinds: options.kinds,
            n_kv_heads: attention.n_kv_heads,
            head_dim: attention.head_dim,
            n_positions: 0,
            memory: None,
            choice: options.select.as_ref().map(Choice::new).transpose()?,
        })
    }

    /// Bytes on the device.
    pub(super) fn bytes(&self) -> usize {
        let sums = self.choice.iter().filter_map(|choice| choice.sums.as_ref());
        let memory = self.memory.iter().flatten().chain(sums);
        memory.map(|buffer| buffer.bytes as usize).sum()
    }

    /// Bytes of a position on the device.
    fn row_bytes(&self, which: usize) -> usize {
        let kind = [self.kinds.keys, self.kinds.values][which];
        row_bytes(kind, self.n_kv_heads * self.head_dim)
    }

    /// Whether blocks are longer on the device than in a file.
    fn has_blocks(&self, which: usize) -> bool {
        [self.kinds.keys, self.kinds.values][which] == KvType::Q8_0
    }
}

impl Gpu {
    pub(super) fn cache_reserve(&self, kv: &mut KvCache, n: usize) -> Result<()> {
        if n <= kv.n_positions {
            return Ok(());
        }
        let nibbles = [kv.kinds.keys, kv.kinds.values].contains(&KvType::Q4_0);
        let whole = if kv.kinds.is_quantized() { 32 } else { 4 };
        if nibbles || kv.head_dim > MAX_HEAD || !kv.head_dim.is_multiple_of(whole) {
            return Err(Error::Unsupported {
                kind: "cache on the GPU",
                found: format!("{}, heads of {}", kv.kinds, kv.head_dim),
                supported: format!(
                    "f32, f16, q8_0, heads of multiples of {whole} up to {MAX_HEAD}"
                ),
            });
        }
        let n = n.max(2 * kv.n_positions).next_multiple_of(KV_STEP);
        let grown = |bytes: usize, old: Option<&Arc<Buffer>>| {
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
            let buffer = self.device.buffer(bytes as u64, usage, "keys and values")?;
            if let Some(old) = old {
                self.device.copy(old, &buffer)?;
            }
            Ok::<_, Error>(Arc::new(buffer))
        };
        let old = |which: usize| kv.memory.as_ref().map(|old| &old[which]);
        let memory = [0, 1].map(|which| grown(n * kv.row_bytes(which), old(which)));
        let sums = match &kv.choice {
            Some(choice) if choice.rule.chunk > 0 => {
                let bytes = sparse::sums_bytes(&choice.rule, kv.n_kv_heads * kv.head_dim, n);
                Some(grown(bytes, choice.sums.as_ref())?)
            }
            _ => None,
        };
        let [keys, values] = memory;
        kv.memory = Some([keys?, values?]);
        if let Some(choice) = &mut kv.choice {
            choice.sums = sums;
        }
        kv.n_positions = n;
        self.recorder.borrow_mut().forget_groups();
        Ok(())
    }

    pub(super) fn cache_copy(&self, kv: &KvCache) -> Result<KvCache> {
        let copy = |from: &Arc<Buffer>| {
            let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
            let buffer = self.device.buffer(from.bytes, usage, "keys and values")?;
            self.device.copy(from, &buffer)?;
            Ok::<_, Error>(Arc::new(buffer))
        };
        let memory = match &kv.memory {
            Some([keys, values]) => Some([copy(keys)?, copy(values)?]),
            None => None,
        };
        let mut choice = kv.choice.clone();
        if let Some(sums) = choice.as_mut().and_then(|choice| choice.sums.as_mut()) {
            *sums = copy(sums)?;
        }
        self.recorder.borrow_mut().forget_groups();
        Ok(KvCache {
            memory,
            choice,
            ..*kv
        })
    }

    pub(super) fn cache_save(
        &self,
        kv: &KvCache,
        n: usize,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(memory) = kv.memory.as_ref().filter(|_| n > 0) else {
            return Ok(());
        };
        let mut rows = Vec::new();
        for (which, buffer) in memory.iter().enumerate() {
            let bytes = (n * kv.row_bytes(which)) as u64;
            rows.push(self.device.download(buffer, 0, bytes)?);
        }
        let mut span = Vec::new();
        for first in (0..n).step_by(KV_PAGE) {
            for (which, rows) in rows.iter().enumerate() {
                let row = kv.row_bytes(which);
                let head = row / kv.n_kv_heads;
                for h in 0..kv.n_kv_heads {
                    span.clear();
                    for p in first..n.min(first + KV_PAGE) {
                        let held = &rows[p * row + h * head..][..head];
                        match kv.has_blocks(which) {
                            false => span.extend_from_slice(held),
                            true => held.chunks_exact(BLOCK.1).for_each(|block| {
                                span.extend_from_slice(&block[..2]);
                                span.extend_from_slice(&block[4..]);
                            }),
                        }
                    }
                    sink(&span)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn cache_load(
        &self,
        kv: &mut KvCache,
        n: usize,
        source: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(memory) = kv.memory.as_ref().filter(|_| n > 0) else {
            return Ok(());
        };
        let mut rows = [0, 1].map(|which| vec![0; n * kv.row_bytes(which)]);
        let mut span = Vec::new();
        for first in (0..n).step_by(KV_PAGE) {
            let positions = first..n.min(first + KV_PAGE);
            for (which, rows) in rows.iter_mut().enumerate() {
                let row = kv.row_bytes(which);
                let head = row / kv.n_kv_heads;
                for h in 0..kv.n_kv_heads {
                    let (theirs, ours) = match kv.has_blocks(which) {
                        false => (head, head),
                        true => BLOCK,
                    };
                    span.resize(positions.len() * (head / ours * theirs), 0);
                    source(&mut span)?;
                    let from = span.chunks_exact(head / ours * theirs);
                    for (p, from) in positions.clone().zip(from) {
                        let held = &mut rows[p * row + h * head..][..head];
                        if theirs == ours {
                            held.copy_from_slice(from);
                            continue;
                        }
                        let blocks = from.chunks_exact(theirs).zip(held.chunks_exact_mut(ours));
                        for (from, block) in blocks {
                            block[..2].copy_from_slice(&from[..2]);
                            block[4..].copy_from_slice(&from[2..]);
                        }
                    }
                }
            }
        }
        for (buffer, rows) in memory.iter().zip(&rows) {
            self.device.queue.write_buffer(&buffer.raw, 0, rows);
        }
        self.device.check("keys and values of a file")?;
        if kv
            .choice
            .as_ref()
            .is_none_or(|choice| choice.sums.is_none())
        {
            return Ok(());
        }
        // What was recorded before is of a pass that ended early.
        self.recorder.borrow_mut().begin();
        self.sum_keys(&CacheView::of(kv), 0..n)?;
        self.recorder.borrow_mut().finish()
    }

    pub(super) fn cache_write(&mut self, kv: &mut KvCache, k: &Tensor, v: &Tensor, start: usize) {
        self.settle();
        assert_eq!(k.n_cols, kv.n_kv_heads * kv.head_dim, "a row of a cache");
        let values = self.rows(v);
        let waits = match &*k.value.borrow() {
            Value::Heads(heads) if heads.n == kv.head_dim => Some(heads.clone()),
            _ => None,
        };
        let keys = waits.unwrap_or_else(|| Heads {
            x: self.rows(k),
            n: kv.head_dim,
            norm: None,
            rope: None,
        });
        self.waiting = Some(Waiting {
            keys,
            values,
            n_tokens: k.n_tokens,
            start,
            cache: CacheView::of(kv),
        });
    }

    pub(super) fn attend(
        &mut self,
        q: &Tensor,
        kv: &KvCache,
        start: usize,
        attention: &Attention,
    ) -> Tensor {
        let cache = CacheView::of(kv);
        cache.check(attention);
        let (n_heads, d) = (attention.n_heads, attention.head_dim);
        assert_eq!(q.n_cols, n_heads * d, "a row of queries");
        assert!(start + q.n_tokens <= cache.n_positions, "cached positions");
        let waits = match &*q.value.borrow() {
            Value::Heads(heads) if heads.n == d => Some(heads.clone()),
            _ => None,
        };
        let joins = |kv: &&Waiting| {
            let alike = |heads: &Heads| {
                (heads.rope.is_some(), heads.norm.is_some())
                    == (kv.keys.rope.is_some(), kv.keys.norm.is_some())
            };
            Arc::ptr_eq(&kv.cache.keys, &cache.keys)
                && kv.n_tokens == q.n_tokens
                && waits.as_ref().is_some_and(alike)
        };
        let rows = match (self.waiting.as_ref().filter(joins), &waits) {
            (Some(kv), Some(heads)) => {
                let out = self.take(q.n_tokens * q.n_cols);
                self.turn(Some((heads, n_heads, &out)), Some(kv), q.n_tokens);
                self.waiting = None;
                out
            }
            _ => {
                self.settle();
                self.rows(q)
            }
        };
        let mut out = self.take(q.n_tokens * q.n_cols);
        if self.packs(q.n_cols) && d.is_multiple_of(8) {
            out.packed = Some(self.take_packed(q.n_tokens, q.n_cols));
        }
        let positions = start..start + q.n_tokens;
        match &cache.choice {
            None => self.attend_run((true, positions), &rows, start, &cache, attention, &out),
            Some(choice) => {
                for run in choice.runs(attention, positions) {
                    self.attend_run(run, &rows, start, &cache, attention, &out);
                }
            }
        }
        Tensor::new(q.n_tokens, q.n_cols, Value::Rows(out))
    }

    /// Attention of adjacent tokens of those at `start..` that all read everything, or all do not.
    fn attend_run(
        &self,
        (is_dense, run): (bool, Range<usize>),
        q: &Rows,
        start: usize,
        cache: &CacheView,
        attention: &Attention,
        out: &Rows,
    ) {
        let choice = cache.choice.as_ref().filter(|_| !is_dense);
        let is_decode = self.step == Step::Decode;
        let rows = run.start - start..run.end - start;
        match choice {
            Some(choice) if choice.rule.by != By::Place => {
                for some in self.choose_in_parts(cache, attention, run) {
                    let rows = some.start - start..some.end - start;
                    let chosen = self.choose_keys(q, rows.clone(), cache, some.clone(), attention);
                    self.count_reads(Some(choice), cache, some, attention);
                    if is_decode {
                        for (i, row) in rows.enumerate() {
                            let read = Read::List(&chosen, i);
                            self.attend_one(q, row..row + 1, cache, read, attention, out);
                        }
                    } else {
                        let read = Read::List(&chosen, 0);
                        self.attend_one(q, rows, cache, read, attention, out);
                    }
                }
            }
            // One, or a replay of some that came one by one.
            _ if is_decode => {
                self.count_reads(choice, cache, run.clone(), attention);
                for (row, position) in rows.zip(run) {
                    let seen = seen_from(attention, position);
                    let read = match choice {
                        None => Read::All(seen),
                        Some(choice) => Read::Ends(seen, choice.rule),
                    };
                    self.attend_one(q, row..row + 1, cache, read, attention, out);
                }
            }
            _ => {
                self.count_reads(choice, cache, run.clone(), attention);
                let rule = choice.map(|choice| &choice.rule);
                self.attend_many(q, rows, cache, run.start, rule, attention, out);
            }
        }
    }

    /// What tokens at adjacent positions will have read.
    fn count_reads(
        &self,
        choice: Option<&Choice>,
        cache: &CacheView,
        positions: Range<usize>,
        attention: &Attention,
    ) {
        let (n_heads, d) = (attention.n_heads, attention.head_dim);
        let mut work = self.work.get();
        for position in positions.clone() {
            let seen = seen_from(attention, position);
            let n_read = choice.map_or(seen.len(), |choice| choice.rule.n_read(&seen));
            work.attention_ops += 4 * (n_read * n_heads * d) as u64;
            work.pairs += (seen.len() * n_heads) as u64;
            work.pairs_read += (n_read * n_heads) as u64;
            if self.step == Step::Decode || choice.is_some() || position + 1 == positions.end {
                work.kv_bytes += (n_read * cache.kinds.row_bytes(cache.n_kv_heads * d)) as u64;
            }
        }
        self.work.set(work);
    }

    /// Puts keys and values into the cache for which no queries came.
    pub(super) fn settle(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.turn(None, Some(&waiting), waiting.n_tokens);
        }
    }

    /// Norms and turns queries into `out` and keys into their cache, and puts values there.
    pub(super) fn turn(
        &self,
        q: Option<(&Heads, usize, &Rows)>,
        kv: Option<&Waiting>,
        n_tokens: usize,
    ) {
        let first = q
            .map(|(heads, ..)| heads)
            .or(kv.map(|kv| &kv.keys))
            .expect("something to turn");
        let keys = kv.map_or(first, |kv| &kv.keys);
        let agree = |a: &Heads, b: &Heads| {
            let turn = |h: &Heads| h.rope.as_ref().map(|t| (t.pairs, t.half));
            let eps = |h: &Heads| h.norm.as_ref().map(|(_, eps)| *eps);
            a.n == b.n && turn(a) == turn(b) && eps(a) == eps(b)
        };
        assert!(agree(first, keys), "queries and keys are treated alike");
        let n_heads = q.map_or(0, |(_, n_heads, _)| n_heads);
        let n_kv_heads = kv.map_or(0, |kv| kv.cache.n_kv_heads);
        if let Some(kv) = kv {
            assert!(
                kv.start + n_tokens <= kv.cache.n_positions,
                "room was made before"
            );
        }
        assert!(first.n <= MAX_HEAD, "elements of a head");
        let kinds = kv.map_or_else(Default::default, |kv| kv.cache.kinds);
        let shader = Shader::Heads {
            norm: first.norm.is_some(),
            rope: first.rope.as_ref().map(|turn| turn.pairs),
            max_head: first.n as u32,
            keys: kinds.keys,
            values: kinds.values,
        };
        let rope = first.rope.as_ref();
        let params = [
            first.n as u32,
            n_heads as u32,
            n_kv_heads as u32,
            rope.map_or(0, |turn| turn.half as u32),
            kv.map_or(0, |kv| kv.start as u32),
            q.map_or(0, |(heads, ..)| heads.x.at as u32),
            keys.x.at as u32,
            kv.map_or(0, |kv| kv.values.at as u32),
            first.norm.as_ref().map_or(0, |(_, eps)| eps.to_bits()),
            rope.map_or(0, |turn| turn.angles.at as u32),
        ];
        let gain = |heads: &Heads| heads.norm.as_ref().map(|(gain, _)| gain.buffer.clone());
        let (q_gain, k_gain) = (q.and_then(|(h, ..)| gain(h)), gain(keys));
        let buffers = [
            q.map(|(heads, ..)| heads.x.span()),
            kv.map(|kv| kv.keys.x.span()),
            kv.map(|kv| kv.values.span()),
            q_gain.as_deref().map(Buffer::all),
            k_gain.as_deref().map(Buffer::all),
            rope.map(|turn| turn.angles.span()),
            q.map(|(_, _, out)| out.span()),
            kv.map(|kv| kv.cache.keys.all()),
            kv.map(|kv| kv.cache.values.all()),
        ];
        let grid = [n_heads + 2 * n_kv_heads, n_tokens, 1];
        self.dispatch_written(shader, &params, &buffers, &[6, 7, 8], grid);
        if let Some(kv) = kv {
            self.done(self.sum_keys(&kv.cache, kv.start..kv.start + n_tokens));
        }
    }

    /// Attention of the tokens in `rows`, each by workgroups of its own; of a token that is decoded keys are split.
    fn attend_one(
        &self,
        q: &Rows,
        rows: Range<usize>,
        cache: &CacheView,
        read: Read,
        attention: &Attention,
        out: &Rows,
    ) {
        let (n_heads, d) = (attention.n_heads, attention.head_dim);
        let per_kv = n_heads / attention.n_kv_heads;
        let group = group(attention);
        // What the shader is told: the first and the end of keys, or where lists begin; how many there are at the
        // first and left out then, or words of a list.
        let (reads, list, n, [first, end, n_first, skipped, stride]) = match read {
            Read::All(seen) => (
                Reads::All,
                None,
                seen.len(),
                [seen.start, seen.end, 0, 0, 0],
            ),
            Read::Ends(seen, rule) => {
                let n = rule.n_read(&seen);
                let n_first = rule.sink.clamp(seen.start, seen.end) - seen.start;
                let skipped = seen.len() - n;
                let params = [seen.start, seen.end, n_first, skipped, 0];
                (Reads::Ends, None, n, params)
            }
            Read::List(list, token) => {
                let at = token * attention.n_kv_heads * list.stride;
                (
                    Reads::List,
                    Some(list),
                    list.most,
                    [at, 0, 0, 0, list.stride],
                )
            }
        };
        let is_decoded = self.step == Step::Decode;
        let few = is_decoded && n <= FEW && (d / 4).is_multiple_of(FEW_PARTS);
        let n_tiles = n.div_ceil(if few { FEW_TILE } else { TILE });
        let tiles = match is_decoded && n > UNSPLIT {
            true => n_tiles.div_ceil(MAX_SPLITS),
            false => n_tiles,
        };
        let n_splits = n_tiles.div_ceil(tiles);
        assert!(rows.len() == 1 || n_splits == 1, "parts are of one token");
        let part = self.take(match n_splits {
            1 => 1,
            n => n_heads * n * (d + 2),
        });
        let shader = Shader::AttentionOne {
            head_dim: d as u32,
            group: group as u32,
            few,
            pack: out.packed.is_some(),
            keys: cache.kinds.keys,
            values: cache.kinds.values,
            reads,
        };
        let at = rows.start * n_heads * d;
        let params = [
            first as u32,
            end as u32,
            attention.n_kv_heads as u32,
            (per_kv / group) as u32,
            tiles as u32,
            n_splits as u32,
            vec4(q.at + at),
            vec4(out.at + at),
            attention.scale.to_bits(),
            // Four planes of a vec4 a unit.
            (at / 8) as u32,
            (n_heads * d / UNIT) as u32,
            n_first as u32,
            skipped as u32,
            stride as u32,
        ];
        let packed = out.packed.as_ref();
        let mut buffers = Bindings::new();
        buffers.push(Some(q.span()));
        buffers.push(Some(cache.keys.all()));
        buffers.push(Some(cache.values.all()));
        buffers.push(Some(out.span()));
        buffers.push(Some(part.span()));
        buffers.push_some(packed.map(Packed::span));
        buffers.push_some(list.map(|list| list.rows.span()));
        let grid = [n_splits, n_heads / group, rows.len()];
        self.dispatch(shader, &params, &buffers, grid);
        if n_splits > 1 {
            let params = [
                d as u32,
                n_splits as u32,
                (out.at + at) as u32,
                (at / 8) as u32,
                (n_heads * d / UNIT) as u32,
            ];
            let mut buffers = Bindings::new();
            buffers.push(Some(part.span()));
            buffers.push(Some(out.span()));
            buffers.push_some(packed.map(Packed::span));
            let shader = Shader::AttentionMerge {
                pack: packed.is_some(),
            };
            self.dispatch(shader, &params, &buffers, [n_heads, 1, 1]);
        }
    }

    /// Attention of rows of a prompt, the first at position `start`; with a rule to the first keys and the last.
    #[expect(
        clippy::too_many_arguments,
        reason = "rows, what they read, and where it goes"
    )]
    fn attend_many(
        &self,
        q: &Rows,
        rows: Range<usize>,
        cache: &CacheView,
        start: usize,
        ends: Option<&Rule>,
        attention: &Attention,
        out: &Rows,
    ) {
        let d = attention.head_dim;
        // Queries, a tile of keys or values and weights, in what every device has.
        let (bq, bk) = if d <= 64 { (16, 32) } else { (8, 16) };
        let bytes = 16 * (bq + bk) * (d / 4 + 1) + 4 * bq * bk + 32 * bq;
        if bytes > self.device.info.workgroup_memory as usize {
            let (found, most) = (format!("heads of {d}"), self.device.info.workgroup_memory);
            self.unsupported(
                "attention on this GPU",
                found,
                &format!("what fits {most} bytes"),
            );
        }
        let shader = Shader::AttentionMany {
            head_dim: d as u32,
            bq: bq as u32,
            bk: bk as u32,
            keys: cache.kinds.keys,
            values: cache.kinds.values,
            ends: ends.is_some(),
        };
        let at = rows.start * attention.n_heads * d;
        let params = [
            start as u32,
            rows.len() as u32,
            attention.n_heads as u32,
            attention.n_kv_heads as u32,
            attention.window.unwrap_or(0) as u32,
            vec4(q.at + at),
            vec4(out.at + at),
            attention.scale.to_bits(),
            ends.map_or(0, |rule| rule.sink as u32),
            ends.map_or(0, |rule| rule.budget as u32),
            ends.map_or(0, |rule| rule.per_cent as u32),
        ];
        let buffers = [
            Some(q.span()),
            Some(cache.keys.all()),
            Some(cache.values.all()),
            Some(out.span()),
        ];
        let grid = [attention.n_heads, rows.len().div_ceil(bq), 1];
        self.dispatch(shader, &params, &buffers, grid);
    }
}

/// Query heads that share loads of keys.
pub(super) fn group(attention: &Attention) -> usize {
    let per_kv = attention.n_heads / attention.n_kv_heads;
    (1..=MAX_GROUP.min(per_kv))
        .rev()
        .find(|n| per_kv.is_multiple_of(*n))
        .expect("one divides everything")
}

const _: () = assert!(KvType::ALL.len() == 4, "a new cache type needs shaders");
