//! Attention to keys that a [`Select`] chooses. Each token has its own choice, so no token's result depends on those
//! computed with it, but tokens of a prompt that stand side by side choose much the same: a frame of keys is widened and
//! turned once for all of them that read of it. Where there are no such kernels, and for single tokens, each token reads
//! spans of the cache as they lie there.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use super::Cpu;
use super::acts::Acts;
use super::attention::{self, Attend, KvCache, PAGE, Sums, work};
use super::attention_lanes::{self, Lanes};
use super::pool::{OutCols, Output, Tile};
use super::table::{
    AttendBatch, AttendSpan, Chosen, LanesBatch, Operations, PANEL_ROWS, PanelProducts,
};
use crate::backend::delta::Exact;
use crate::backend::select::{Ask, KvOptions, Plan, Select};
use crate::backend::{Attention, KvTypes, Step};
use crate::profile::span::now;
use crate::profile::{DeltaWork, Work};

/// Tokens whose queries are multiplied with sums of keys together, and of a task in which each reads alone: few, since
/// tasks are unlike.
const TASK_TOKENS: usize = 8;

/// Query heads that a kernel is given at once.
const MAX_GROUP: usize = 64;

/// Keys of a word of choices.
const WORD: usize = u32::BITS as usize;

/// Plans that no task has, kept so that steady work allocates nothing. They have room for what the cache has room for:
/// which thread takes which does not matter, and none grows in the middle of a region.
#[derive(Default)]
pub(super) struct Plans(Mutex<Vec<Plan>>);

impl Plans {
    fn list(&self) -> MutexGuard<'_, Vec<Plan>> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn reserve(&self, n_threads: usize, to: impl Fn(&mut Plan)) {
        let mut plans = self.list();
        let n = n_threads.max(plans.len());
        plans.resize_with(n, Plan::default);
        plans.iter_mut().for_each(to);
    }

    pub(super) fn with<T>(&self, work: impl FnOnce(&mut Plan) -> T) -> T {
        // One that a cancelled pass took with it is missing.
        let mut plan = self.list().pop().unwrap_or_default();
        let done = work(&mut plan);
        self.list().push(plan);
        done
    }
}

/// How tokens read frames together; `None` where each reads alone, as those do that read means of chunks too.
fn in_frames(
    operations: &Operations,
    shape: &Attention,
    select: &dyn Select,
    step: Step,
) -> Option<Lanes> {
    let lanes = Lanes::take_choices(operations, shape.head_dim, step);
    lanes.filter(|_| !select.pools())
}

/// The tokens of a task, and the floats of its buffers for queries at `positions`.
fn task(
    lanes: Option<Lanes>,
    shape: &Attention,
    positions: Range<usize>,
    n_threads: usize,
) -> (usize, [usize; 3]) {
    let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let n_tokens = positions.len();
    // And the sums of queries that share a head of keys.
    let scaled = n_tokens.min(TASK_TOKENS) * (group + 1) * n;
    match lanes {
        Some(lanes) => {
            let task_tokens = Lanes::task_tokens(shape, n_tokens, n_threads);
            let n_words = attention::pages(shape, positions).len() * (PAGE / WORD);
            let n_tokens = n_tokens.min(task_tokens);
            let room = lanes.room(shape, n_tokens);
            (task_tokens, [scaled, n_tokens * n_words, room])
        }
        None => (TASK_TOKENS, [scaled, Sums::floats(group, n), 0]),
    }
}

/// The floats of the buffers that queries at `positions`, none of which sees everything, take on `n_threads` together.
fn run_scratch(
    lanes: Option<Lanes>,
    shape: &Attention,
    positions: Range<usize>,
    n_threads: usize,
) -> impl Iterator<Item = usize> + use<> {
    let (task_tokens, task) = task(lanes, shape, positions.clone(), n_threads);
    let n_tasks = positions.len().div_ceil(task_tokens) * shape.n_kv_heads;
    let tasks = std::iter::repeat_n(task, n_tasks.min(n_threads));
    tasks.flatten().filter(|floats| *floats > 0)
}

/// As [`attention::scratch`], with the keys that `options` choose.
pub(in crate::backend) fn scratch(
    operations: &Operations,
    shape: &Attention,
    options: &KvOptions,
    step: Step,
    positions: Range<usize>,
    n_threads: usize,
) -> Vec<Vec<usize>> {
    let dense = |run| attention_lanes::scratch(operations, shape, options, step, run, n_threads);
    let Some(select) = &options.select else {
        return dense(positions);
    };
    let lanes = in_frames(operations, shape, select.as_ref(), step);
    let of_run = |(is_dense, run): (bool, Range<usize>)| match is_dense {
        true => dense(run),
        false => vec![run_scratch(lanes, shape, run, n_threads).collect()],
    };
    attention::runs(shape, select.as_ref(), positions)
        .flat_map(of_run)
        .collect()
}

/// What tasks have done together.
#[derive(Default)]
pub(super) struct Done {
    /// Keys that queries which share them have read.
    pub(super) keys: AtomicU64,
    decide_ns: AtomicU64,
}

impl Done {
    /// But for the pairs that there are.
    pub(super) fn work(self, shape: &Attention, kinds: KvTypes) -> Work {
        let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
        let keys = self.keys.into_inner();
        let pairs_read = keys * group as u64;
        Work {
            kv_bytes: keys * kinds.row_bytes(n) as u64,
            attention_ops: 4 * pairs_read * n as u64,
            pairs_read,
            decide_ns: self.decide_ns.into_inner(),
            ..Work::default()
        }
    }
}

/// What is done with a token, what was asked for it, its scaled queries, and the answer.
pub(super) type With<'a> = dyn FnMut(usize, &Ask, &[f32], &mut Plan) + 'a;

/// Attention to keys that somebody chooses.
pub(super) struct Selected<'a> {
    pub(super) attend: Attend<'a>,
    pub(super) select: &'a dyn Select,
    /// All queries, `(n_tokens, n_heads * head_dim)`.
    pub(super) q: &'a [f32],
    pub(super) done: Done,
}

impl Cpu {
    /// Rows of `q` at positions `start..`, none of which sees everything.
    pub(super) fn attend_selected(
        &mut self,
        cache: &KvCache,
        shape: &Attention,
        start: usize,
        select: &dyn Select,
        q: &[f32],
        out: &mut [f32],
    ) {
        let (n, n_cols) = (shape.head_dim, shape.n_heads * shape.head_dim);
        let positions = start..start + q.len() / n_cols;
        let (step, n_threads) = (self.step, self.pool.n_threads());
        let operations = &self.operations;
        let lanes = in_frames(operations, shape, select, step);
        let room = run_scratch(lanes, shape, positions.clone(), n_threads);
        self.scratch.reserve(room);
        let (task_tokens, _) = task(lanes, shape, positions.clone(), n_threads);
        let attend = self.attend(cache, shape, start);
        let group = attend.group();
        self.reserve_plans(cache, shape, select, positions.len());
        let selected = Selected {
            attend,
            select,
            q,
            done: Done::default(),
        };
        let plans = &self.plans;
        let mut outputs = [Output::new(out, n_cols)];
        self.pool
            .run_tiles(&mut outputs, (task_tokens, group * n), &|tile| {
                plans.with(|plan| match lanes {
                    Some(lanes) => selected.together(lanes, plan, tile),
                    None => selected.alone(plan, tile),
                });
            });
        self.work += Work {
            pairs: work(shape, cache.kinds(), positions).pairs,
            ..selected.done.work(shape, cache.kinds())
        };
    }

    /// Makes room to choose for tasks of up to `n_tokens`.
    pub(super) fn reserve_plans(
        &self,
        cache: &KvCache,
        shape: &Attention,
        select: &dyn Select,
        n_tokens: usize,
    ) {
        let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
        let n_chunks = select
            .chunking()
            .map_or(0, |chunks| chunks.most_chunks(cache.n_positions()));
        let n_rows = n_chunks.next_multiple_of(PANEL_ROWS);
        let n_scores = n_tokens.min(TASK_TOKENS) * group * n_rows;
        let n_turned = match self.step {
            Step::Decode => 0,
            Step::Prefill => n_rows * n,
        };
        self.plans.reserve(self.pool.n_threads(), |plan| {
            plan.reserve(n_chunks, n, n_scores, n_turned)
        });
    }
}

impl Selected<'_> {
    /// Calls `with` for each of `tokens` with its scaled queries of a head of keys and, in `plan`, what it reads: some of
    /// what it sees, in order, apart, and not empty.
    pub(super) fn decide(
        &self,
        plan: &mut Plan,
        kv_head: usize,
        tokens: Range<usize>,
        with: &mut With,
    ) {
        let Attend { shape, cache, .. } = self.attend;
        let (n, group) = (shape.head_dim, self.attend.group());
        let n_cols = shape.n_heads * n;
        let chunks = cache.chunks();
        let most = tokens.len().min(TASK_TOKENS) * (group + 1) * n;
        let mut scaled = self.attend.scratch.take(most);
        let mut scores = std::mem::take(&mut plan.sums);
        let mut panels = std::mem::take(&mut plan.panels);
        let known = |end: usize| match chunks.n_known(self.attend.start + end) {
            0 => &[][..],
            n_known => &chunks.sums(kv_head)[..n_known * n],
        };
        // The sums of a prompt's tokens meet many queries.
        let turned = !self.attend.decode;
        if turned {
            turn(known(tokens.end), n, &mut panels);
        }
        for first in tokens.clone().step_by(TASK_TOKENS) {
            let some = first..tokens.end.min(first + TASK_TOKENS);
            let begin = now();
            let (scaled, rest) = scaled.split_at_mut(some.len() * group * n);
            for (token, scaled) in some.clone().zip(scaled.chunks_exact_mut(group * n)) {
                let own = self.q[token * n_cols + kv_head * group * n..].iter();
                let scaled = scaled.iter_mut().zip(own);
                scaled.for_each(|(scaled, q)| *scaled = q * shape.scale);
            }
            let (queries, n_rows) = match self.select.sums_queries() {
                true => {
                    let sums = &mut rest[..some.len() * n];
                    for (sums, scaled) in
                        sums.chunks_exact_mut(n).zip(scaled.chunks_exact(group * n))
                    {
                        sums.fill(0.0);
                        for (i, q) in scaled.iter().enumerate() {
                            sums[i % n] += q;
                        }
                    }
                    (&*sums, 1)
                }
                false => (&*scaled, group),
            };
            let sums = known(some.end);
            let n_scores = if turned { panels.len() } else { sums.len() } / n;
            // All of them are written.
            scores.resize(some.len() * n_rows * n_scores, 0.0);
            if turned && n_scores > 0 {
                self.attend
                    .operations
                    .multiply_panels
                    .run(&mut PanelProducts {
                        queries,
                        n_in: n,
                        panels: &panels,
                        out: &mut scores,
                    });
            } else if n_scores > 0 {
                let queries = Acts {
                    n_tokens: some.len() * n_rows,
                    n_in: n,
                    f32: queries,
                    q8: &[],
                    bf16: &[],
                };
                let mut scores = OutCols::whole(&mut scores, n_scores);
                let products = self.attend.operations.products;
                products.run(bytemuck::cast_slice(sums), &queries, &mut scores);
            }
            let mut decide_ns = now() - begin;
            for (i, token) in some.enumerate() {
                let begin = now();
                let position = self.attend.start + token;
                let seen = self.attend.visible(position);
                plan.spans.clear();
                let ask = Ask {
                    position,
                    seen: seen.clone(),
                    layer: cache.layer(),
                    attention: shape,
                    kv_head,
                    q: &self.q[token * n_cols..][..n_cols],
                    scores: &scores[i * n_rows * n_scores..][..n_rows * n_scores],
                    n_scores,
                    chunks,
                };
                self.select.select(&ask, plan);
                plan.spans.iter_mut().for_each(|span| {
                    *span = span.start.max(seen.start)..span.end.min(seen.end);
                });
                plan.spans.retain(|span| !span.is_empty());
                if plan.spans.is_empty() {
                    plan.spans.push(seen);
                }
                decide_ns += now() - begin;
                let n_keys: usize = plan.spans.iter().map(Range::len).sum();
                self.done.keys.fetch_add(n_keys as u64, Relaxed);
                with(token, &ask, &scaled[i * group * n..][..group * n], plan);
            }
            self.done.decide_ns.fetch_add(decide_ns, Relaxed);
        }
        plan.sums = scores;
        plan.panels = panels;
    }

    /// Tokens that read the same frames.
    fn together(&self, lanes: Lanes, plan: &mut Plan, tile: Tile<f32>) {
        let Attend { shape, scratch, .. } = self.attend;
        let (n, group) = (shape.head_dim, self.attend.group());
        let n_cols = shape.n_heads * n;
        let kv_head = tile.first_col / (group * n);
        let n_tokens = tile.out.n_tokens();
        let tokens = tile.first_row..tile.first_row + n_tokens;
        let start = self.attend.start + tokens.start;
        let pages = self.attend.pages(start..start + n_tokens);
        let first = pages.start * PAGE;
        let n_words = pages.len() * (PAGE / WORD);
        let mut words = scratch.take(n_tokens * n_words);
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut words);
        words.fill(0);
        self.decide(plan, kv_head, tokens.clone(), &mut |token, _, _, plan| {
            for span in &plan.spans {
                let keys = span.start - first..span.end - first;
                set(words, (token - tokens.start, n_tokens), keys);
            }
        });
        let rows = |page| self.attend.rows(page, kv_head).into();
        let (keys, values): (Vec<_>, Vec<_>) = pages.map::<(_, _), _>(rows).unzip();
        let mut room = scratch.take(lanes.room(shape, n_tokens));
        self.attend.operations.attend_lanes.run(&mut LanesBatch {
            attend: AttendBatch {
                q: &self.q[tile.first_row * n_cols + tile.first_col..],
                q_stride: n_cols,
                group,
                head_dim: n,
                scale: shape.scale,
                start,
                window: shape.window,
                first,
                page: PAGE,
                keys: &keys,
                values: &values,
                out: tile.out,
            },
            frame: lanes.frame,
            sink: 0,
            exact: Exact::Last(1),
            thresholds: &[],
            most: 0,
            chosen: Some(Chosen { words }),
            room: &mut room,
            done: DeltaWork::default(),
        });
    }

    /// Token by token.
    fn alone(&self, plan: &mut Plan, mut tile: Tile<f32>) {
        let (n, group) = (self.attend.shape.head_dim, self.attend.group());
        let kv_head = tile.first_col / (group * n);
        let tokens = tile.first_row..tile.first_row + tile.out.n_tokens();
        let mut buffer = self.attend.scratch.take(Sums::floats(group, n));
        self.decide(plan, kv_head, tokens, &mut |token, ask, q, plan| {
            let mut sums = Sums::fresh(&mut buffer, group);
            for span in &plan.spans {
                self.attend.add_span(kv_head, span.clone(), q, &mut sums);
            }
            if self.select.pools() {
                add_pooled(ask, plan, &mut sums);
            }
            let out = tile.out.row(token - tile.first_row);
            for (i, out) in out.chunks_exact_mut(n).enumerate() {
                let inverse = 1.0 / sums.sum[i];
                let values = &sums.out[i * n..][..n];
                out.iter_mut()
                    .zip(values)
                    .for_each(|(o, v)| *o = v * inverse);
            }
        });
    }
}

/// Rows of `n` floats in panels, see [`PanelProducts`]; the last is filled with zeros.
fn turn(rows: &[f32], n: usize, panels: &mut Vec<f32>) {
    panels.clear();
    panels.resize((rows.len() / n).next_multiple_of(PANEL_ROWS) * n, 0.0);
    let panels = panels.as_chunks_mut::<PANEL_ROWS>().0;
    let rows = rows.chunks(PANEL_ROWS * n);
    for (panel, rows) in panels.chunks_exact_mut(n).zip(rows) {
        for (i, row) in rows.chunks_exact(n).enumerate() {
            panel
                .iter_mut()
                .zip(row)
                .for_each(|(lanes, x)| lanes[i] = *x);
        }
    }
}

/// Adds to the sums of a token's queries the chunks of which it sees all and reads nothing: the mean of the values, with
/// the weight of the mean of the keys for as many as there are.
fn add_pooled(ask: &Ask, plan: &mut Plan, sums: &mut Sums) {
    let n = ask.attention.head_dim;
    let chunks = &ask.chunks.chunks()[..ask.chunks.n_known(ask.seen.end)];
    let values = ask.chunks.values(ask.kv_head);
    let Plan { spans, scores, .. } = plan;
    let left_out = || {
        let mut spans = spans.iter().peekable();
        let all = chunks.iter().enumerate();
        all.filter_map(move |(i, chunk)| {
            while spans.next_if(|s| s.end <= chunk.start as usize).is_some() {}
            let is_read = spans.peek().is_some_and(|s| s.start < chunk.end as usize);
            let is_seen = chunk.start as usize >= ask.seen.start;
            (is_seen && !is_read).then_some((i, chunk.n_keys() as f32))
        })
    };
    for query in 0..sums.max.len() {
        let products = ask.scores(query);
        scores.clear();
        scores.extend(left_out().map(|(i, n_keys)| products[i] / n_keys + n_keys.ln()));
        let max = scores.iter().copied().fold(sums.max[query], f32::max);
        let out = &mut sums.out[query * n..][..n];
        let before = (sums.max[query] - max).exp();
        out.iter_mut().for_each(|out| *out *= before);
        sums.sum[query] *= before;
        sums.max[query] = max;
        for ((i, n_keys), score) in left_out().zip(&*scores) {
            let weight = (score - max).exp();
            sums.sum[query] += weight;
            let each = weight / n_keys;
            let values = out.iter_mut().zip(&values[i * n..][..n]);
            values.for_each(|(out, v)| *out += each * v);
        }
    }
}

/// Sets the bits `which` of a token of many, see [`Chosen`].
fn set(words: &mut [u32], (token, n_tokens): (usize, usize), which: Range<usize>) {
    let mut at = which.start;
    while at < which.end {
        let end = which.end.min((at / WORD + 1) * WORD);
        words[at / WORD * n_tokens + token] |= (u32::MAX >> (WORD - (end - at))) << (at % WORD);
        at = end;
    }
}

impl Attend<'_> {
    /// Adds the keys at positions `span` to the sums of the queries `q` of one token.
    pub(super) fn add_span(&self, kv_head: usize, span: Range<usize>, q: &[f32], sums: &mut Sums) {
        let mut start = span.start;
        while start < span.end {
            let page = start / PAGE;
            let end = span.end.min((page + 1) * PAGE);
            let [k, v] = self.rows(page, kv_head);
            let visible = [(start - page * PAGE, end - page * PAGE); MAX_GROUP];
            let n = self.shape.head_dim;
            let queries = q
                .chunks(MAX_GROUP * n)
                .zip(sums.out.chunks_mut(MAX_GROUP * n));
            let scores = sums
                .max
                .chunks_mut(MAX_GROUP)
                .zip(sums.sum.chunks_mut(MAX_GROUP));
            for ((q, out), (max, sum)) in queries.zip(scores) {
                self.operations.attend.run(&mut AttendSpan {
                    q,
                    k,
                    v,
                    next: &[],
                    head_dim: n,
                    // Whatever the step: the sums are this token's alone.
                    decode: true,
                    visible: &visible[..max.len()],
                    max,
                    sum,
                    out,
                });
            }
            start = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::cpu::pool::Pool;
    use crate::backend::select::{Chunking, KvOptions};
    use crate::backend::{Backend, KvType};
    use crate::quant;

    const SHAPE: Attention = Attention {
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        window: None,
    };
    const N: usize = 700;

    /// Ranges that look like chance, some of them beyond what may be seen; for every third position none.
    #[derive(Clone, Copy, Debug)]
    struct Chance {
        dense_below: usize,
        /// Means of these stand for what is left out.
        pooled: Option<Chunking>,
        /// From one that reads everything too to the next.
        corrects_every: Option<usize>,
    }

    /// Nothing stands for what is left out.
    fn below(dense_below: usize) -> Chance {
        Chance {
            dense_below,
            pooled: None,
            corrects_every: None,
        }
    }

    impl Chance {
        fn spans(position: usize, kv_head: usize) -> Vec<Range<usize>> {
            if position.is_multiple_of(3) {
                return Vec::new();
            }
            let mut at = (position * 7 + kv_head * 31) % 13;
            let mut spans = Vec::new();
            while at < position + 40 {
                let end = at + 1 + (at * 5 + position) % 37;
                spans.push(at..end);
                at = end + 1 + (at * 11 + position) % 90;
            }
            spans
        }
    }

    impl Select for Chance {
        fn chunking(&self) -> Option<Chunking> {
            self.pooled
        }

        fn pools(&self) -> bool {
            self.pooled.is_some()
        }

        fn corrects_every(&self) -> Option<usize> {
            self.corrects_every
        }

        fn sees_all(&self, position: usize, _: &Range<usize>) -> bool {
            position < self.dense_below
        }

        fn budget(&self, _n_seen: usize) -> usize {
            N
        }

        fn sums_queries(&self) -> bool {
            false
        }

        fn select(&self, ask: &Ask, plan: &mut Plan) {
            plan.spans.extend(Self::spans(ask.position, ask.kv_head));
        }
    }

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        let mut rng = seed as u64;
        let next = || {
            rng = rng
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (rng >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next)
            .take(n)
            .map(|x| 3.0 * x)
            .collect()
    }

    /// All positions, from `start` in steps of `batch`, `(n - start, n_heads * head_dim)`; and the work of that.
    fn attend(
        chance: Option<Chance>,
        shape: &Attention,
        kinds: KvTypes,
        step: Step,
        batch: usize,
    ) -> (Vec<f32>, Work) {
        let mut cpu = Cpu::new(Arc::new(Pool::new(2).unwrap()));
        let options = KvOptions {
            kinds,
            select: chance.map(|chance| Arc::new(chance) as _),
            ..KvOptions::default()
        };
        let mut kv = cpu.kv(shape, &options);
        cpu.kv_reserve(&mut kv, 0..N).unwrap();
        let (n_q, n_kv) = (
            shape.n_heads * shape.head_dim,
            shape.n_kv_heads * shape.head_dim,
        );
        let tensor = |cpu: &Cpu, rows: &[f32], n_cols: usize| {
            let mut tensor = cpu.tensor(rows.len() / n_cols, n_cols);
            tensor.data.copy_from_slice(rows);
            tensor
        };
        let (q, k, v) = (
            numbers(N * n_q, 1),
            numbers(N * n_kv, 2),
            numbers(N * n_kv, 3),
        );
        let (k, v) = (tensor(&cpu, &k, n_kv), tensor(&cpu, &v, n_kv));
        cpu.kv_write(&mut kv, &k, &v, 0);
        cpu.begin(step);
        let mut out = Vec::new();
        for (i, rows) in q.chunks(batch * n_q).enumerate() {
            let q = tensor(&cpu, rows, n_q);
            cpu.kv_note(&mut kv, &q, i * batch, shape);
            out.extend_from_slice(&cpu.attention(&q, &kv, i * batch, shape).data);
        }
        (out, cpu.work())
    }

    /// The same by the definition, in double precision, and how many pairs were read.
    fn oracle(chance: Chance, shape: &Attention, kinds: KvTypes) -> (Vec<f64>, u64) {
        let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
        let n_kv = shape.n_kv_heads * n;
        let cached = |kind: KvType, seed| {
            let mut numbers = numbers(N * n_kv, seed);
            let mut bytes = vec![0; kind.row_bytes(numbers.len())];
            quant::quantize(kind.dtype(), &numbers, &mut bytes);
            quant::dequantize(kind.dtype(), &bytes, &mut numbers);
            numbers.into_iter().map(f64::from).collect::<Vec<_>>()
        };
        let (k, v) = (cached(kinds.keys, 2), cached(kinds.values, 3));
        let q = numbers(N * shape.n_heads * n, 1);
        let (mut out, mut pairs) = (Vec::new(), 0);
        for (row, q) in q.chunks_exact(n).enumerate() {
            let (position, head) = (row / shape.n_heads, row % shape.n_heads);
            let kv_head = head / group;
            let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let seen = |j: &usize| (first..=position).contains(j);
            let chosen = Chance::spans(position, kv_head).into_iter().flatten();
            let mut keys: Vec<usize> = chosen.filter(seen).collect();
            if keys.is_empty() || position < chance.dense_below {
                keys = (first..=position).collect();
            }
            pairs += keys.len() as u64;
            let score = |j: &usize| {
                let key = &k[j * n_kv + kv_head * n..][..n];
                let products = q.iter().zip(key).map(|(q, k)| f64::from(*q) * k);
                products.sum::<f64>() * f64::from(shape.scale)
            };
            // Each key and its weight in a softmax; means of `n` keys beside them.
            let mut scores: Vec<f64> = keys.iter().map(score).collect();
            let mut values: Vec<Vec<f64>> = keys
                .iter()
                .map(|j| v[j * n_kv + kv_head * n..][..n].to_vec())
                .collect();
            if let Some(Chunking::Fixed(size)) = chance.pooled
                && keys.len() < position + 1 - first
            {
                for start in (first.next_multiple_of(size)..position + 2).step_by(size) {
                    let chunk = start..start + size;
                    if chunk.end > position + 1 || keys.iter().any(|j| chunk.contains(j)) {
                        continue;
                    }
                    let mean = |of: &[f64], c: usize| {
                        let row = |j: usize| of[j * n_kv + kv_head * n + c];
                        chunk.clone().map(row).sum::<f64>() / size as f64
                    };
                    let product = (0..n).map(|c| f64::from(q[c]) * mean(&k, c)).sum::<f64>();
                    scores.push(product * f64::from(shape.scale) + (size as f64).ln());
                    values.push((0..n).map(|c| mean(&v, c)).collect());
                }
            }
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..n {
                let values = values.iter().map(|v| v[i]);
                out.push(values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum);
            }
        }
        (out, pairs)
    }

    #[test]
    fn the_chosen_keys_are_attended_to_and_no_others() {
        let mixed = KvTypes {
            keys: KvType::Q8_0,
            values: KvType::Q4_0,
        };
        let kinds = [KvType::F16.into(), KvType::F32.into(), mixed];
        let cases = kinds.map(|kinds| [(None, kinds), (Some(150), kinds)]);
        for (window, kinds) in cases.into_iter().flatten() {
            let shape = Attention { window, ..SHAPE };
            let (expected, pairs) = oracle(below(100), &shape, kinds);
            for step in [Step::Prefill, Step::Decode] {
                let (found, work) = attend(Some(below(100)), &shape, kinds, step, 97);
                for (found, expected) in found.iter().zip(&expected) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 2e-5,
                        "{found} {expected}"
                    );
                }
                assert_eq!(work.pairs_read, pairs);
                assert_eq!(work.attention_ops, 4 * 64 * pairs);
                let all = (0..N).map(|p| window.map_or(p + 1, |w: usize| w.min(p + 1)));
                assert_eq!(work.pairs, 6 * all.sum::<usize>() as u64);
            }
        }
    }

    #[test]
    fn what_is_left_out_counts_as_its_mean() {
        let kinds = [KvType::F16.into(), KvType::F32.into()];
        for (window, kinds) in [(None, kinds[0]), (Some(150), kinds[1])] {
            let shape = Attention { window, ..SHAPE };
            for size in [4, 16] {
                let chance = Chance {
                    pooled: Some(Chunking::Fixed(size)),
                    ..below(100)
                };
                let (expected, pairs) = oracle(chance, &shape, kinds);
                let (without, _) = oracle(below(100), &shape, kinds);
                assert!(expected != without);
                for step in [Step::Prefill, Step::Decode] {
                    let (found, work) = attend(Some(chance), &shape, kinds, step, 97);
                    for (found, expected) in found.iter().zip(&expected) {
                        let off = (f64::from(*found) - expected).abs();
                        assert!(off < 5e-5, "{found} {expected}");
                    }
                    assert_eq!(work.pairs_read, pairs);
                }
                let (parts, _) = attend(Some(chance), &shape, kinds, Step::Prefill, 350);
                let (whole, _) = attend(Some(chance), &shape, kinds, Step::Prefill, N);
                assert!(parts == whole);
            }
        }
    }

    #[test]
    fn what_a_token_misses_is_added_to_those_after_it() {
        let kinds = [KvType::F16.into(), KvType::F32.into()];
        for (window, kinds) in [(None, kinds[0]), (Some(150), kinds[1])] {
            let shape = Attention { window, ..SHAPE };
            let n_cols = shape.n_heads * shape.head_dim;
            let (dense, _) = oracle(below(N), &shape, kinds);
            let (sparse, pairs) = oracle(below(100), &shape, kinds);
            for every in [8, 37] {
                let chance = Chance {
                    corrects_every: Some(every),
                    ..below(100)
                };
                let n_anchors = (100..N).filter(|p| p.is_multiple_of(every));
                let seen = |p: usize| window.map_or(p + 1, |w: usize| w.min(p + 1));
                let more = shape.n_heads * n_anchors.map(seen).sum::<usize>();
                for step in [Step::Prefill, Step::Decode] {
                    let (found, work) = attend(Some(chance), &shape, kinds, step, 97);
                    for (i, found) in found.iter().enumerate() {
                        let anchor = i / n_cols / every * every;
                        let at = anchor * n_cols + i % n_cols;
                        let missed = if i / n_cols < 100 || anchor < 100 {
                            0.0
                        } else {
                            dense[at] - sparse[at]
                        };
                        let off = f64::from(*found) - (sparse[i] + missed);
                        assert!(off.abs() < 5e-5, "{i}: {found} {}", sparse[i]);
                    }
                    assert_eq!(work.pairs_read, pairs + more as u64);
                }
                let (parts, _) = attend(Some(chance), &shape, kinds, Step::Prefill, 350);
                let (whole, _) = attend(Some(chance), &shape, kinds, Step::Prefill, N);
                assert!(parts == whole);
            }
        }
    }

    #[test]
    fn more_heads_than_a_kernel_takes_may_share_keys() {
        let shape = Attention {
            n_heads: MAX_GROUP + 6,
            n_kv_heads: 1,
            head_dim: 32,
            ..SHAPE
        };
        let (expected, _) = oracle(below(100), &shape, KvTypes::default());
        for step in [Step::Prefill, Step::Decode] {
            let (found, _) = attend(Some(below(100)), &shape, KvTypes::default(), step, 350);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (f64::from(*found) - expected).abs() < 2e-5,
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_tokens_result_depends_on_no_other_token_of_its_pass() {
        let (whole, _) = attend(
            Some(below(100)),
            &SHAPE,
            KvTypes::default(),
            Step::Prefill,
            N,
        );
        for batch in [1, 7, 64, 350] {
            let (parts, _) = attend(
                Some(below(100)),
                &SHAPE,
                KvTypes::default(),
                Step::Prefill,
                batch,
            );
            assert!(parts == whole, "{batch}");
        }
    }

    #[test]
    fn where_all_is_seen_the_dense_kernel_runs() {
        for step in [Step::Prefill, Step::Decode] {
            let (dense, _) = attend(None, &SHAPE, KvTypes::default(), step, 97);
            let (all, work) = attend(Some(below(N)), &SHAPE, KvTypes::default(), step, 97);
            assert!(all == dense);
            assert_eq!((work.pairs, work.decide_ns), (work.pairs_read, 0));
        }
    }
}
