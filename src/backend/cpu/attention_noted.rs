//! What queries leave for those after them. Where a [`Select`] corrects itself (Delta Attention, arXiv:2505.11254), a query
//! every so many positions attends to all that it sees too; what it finds there less what it finds in the keys that it
//! chooses is added to what it and the queries after it find. What they miss of all the attention far back hardly changes
//! from token to token. And where chunks of keys end by how queries attend, one in so many tells how it does.

use std::iter::StepBy;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use super::Cpu;
use super::attention::{self, Attend, KvCache, Sums};
use super::attention_selected::{Done, Selected};
use crate::backend::Attention;
use crate::backend::notes::{NoteShape, Notes};
use crate::backend::select::{KvOptions, Plan, Select};
use crate::profile::Work;

/// Rows that are corrected by one thread at a time.
const PIECE_ROWS: usize = 64;

/// The floats of the buffers that `n_readers` tokens which leave rows of `n_floats` take on `n_threads` together.
fn room(
    shape: &Attention,
    (n_readers, n_floats): (usize, usize),
    n_threads: usize,
) -> impl Iterator<Item = usize> + use<> {
    let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let task = [Sums::floats(group, n), (group + 1) * n];
    let tasks = std::iter::repeat_n(task, (n_readers * shape.n_kv_heads).min(n_threads));
    std::iter::once(n_readers * n_floats).chain(tasks.flatten())
}

/// Positions among `positions` whose queries leave what they were off by, run by run of those that do not see everything.
fn anchors<'a>(
    select: Option<&'a dyn Select>,
    shape: &'a Attention,
    positions: Range<usize>,
) -> impl Iterator<Item = StepBy<Range<usize>>> + use<'a> {
    let notes = NoteShape::of_differences(select, shape);
    let select = select.filter(|_| notes.every > 0);
    let runs = select.map(|select| attention::runs(shape, select, positions));
    let sparse = runs.into_iter().flatten().filter(|(is_dense, _)| !is_dense);
    let among = sparse.map(move |(_, run)| notes.among(run));
    among.filter(|anchors| anchors.len() > 0)
}

/// The floats of the buffers that queries at `positions` take to leave something, those that are held together side by
/// side.
pub(in crate::backend) fn scratch(
    shape: &Attention,
    options: &KvOptions,
    positions: Range<usize>,
    n_threads: usize,
) -> Vec<Vec<usize>> {
    let select = options.select.as_deref();
    let notes = NoteShape::of_samples(select);
    let n_samples = notes.among(positions.clone()).len();
    let sampled = (n_samples > 0).then_some((n_samples, shape.n_kv_heads * notes.n));
    let anchors = anchors(select, shape, positions);
    let anchors = anchors.map(|anchors| (anchors.len(), shape.n_heads * shape.head_dim));
    let readers = sampled.into_iter().chain(anchors);
    readers
        .map(|readers| room(shape, readers, n_threads).collect())
        .collect()
}

/// What they do for that; `None` if they leave nothing.
pub(in crate::backend) fn work(
    shape: &Attention,
    options: &KvOptions,
    positions: Range<usize>,
) -> Option<Work> {
    let select = options.select.as_deref();
    let samples = NoteShape::of_samples(select).among(positions.clone());
    let readers = samples.chain(anchors(select, shape, positions).flatten());
    let works = readers.map(|position| Work {
        pairs: 0,
        ..attention::work(shape, options.kinds, position..position + 1)
    });
    works.reduce(|mut sum, work| {
        sum += work;
        sum
    })
}

impl Cpu {
    /// See [`Backend::kv_note`](crate::backend::Backend::kv_note).
    pub(super) fn note(
        &mut self,
        cache: &mut KvCache,
        shape: &Attention,
        start: usize,
        q: &[f32],
    ) -> bool {
        let (n, n_cols) = (shape.head_dim, shape.n_heads * shape.head_dim);
        let positions = start..start + q.len() / n_cols;
        let Some(select) = cache.share_select() else {
            return false;
        };
        let mut is_any = cache.waits_for_queries();
        if is_any {
            self.note_samples(cache, shape, positions.clone(), q);
            cache.sum_keys(positions.clone());
        }
        for anchors in anchors(Some(&*select), shape, positions) {
            is_any = true;
            let n_anchors = anchors.len();
            self.scratch
                .reserve(room(shape, (n_anchors, n_cols), self.pool.n_threads()));
            self.reserve_plans(cache, shape, &*select, 1);
            let selected = Selected {
                attend: self.attend(cache, shape, start),
                select: &*select,
                q,
                done: Done::default(),
            };
            let (plans, group) = (&self.plans, selected.attend.group());
            let mut found = self.scratch.take(n_anchors * n_cols);
            self.pool.run_pieces(&mut found, group * n, &|i, out| {
                let (i, kv_head) = (i / shape.n_kv_heads, i % shape.n_kv_heads);
                let anchor = anchors.clone().nth(i).expect("one of them");
                plans.with(|plan| selected.difference(plan, kv_head, anchor - start, out));
            });
            self.work += selected.done.work(shape, cache.kinds());
            let differences = cache.differences_mut();
            for (anchor, found) in anchors.zip(found.chunks_exact(n_cols)) {
                differences.row_mut(anchor).copy_from_slice(found);
            }
        }
        is_any
    }

    /// Queries at some of `positions` leave how much they attend to each of the last keys, all heads together.
    fn note_samples(
        &mut self,
        cache: &mut KvCache,
        shape: &Attention,
        positions: Range<usize>,
        q: &[f32],
    ) {
        let (n_cols, n_kv_heads) = (shape.n_heads * shape.head_dim, shape.n_kv_heads);
        let notes = cache.samples().shape();
        let samples = notes.among(positions.clone());
        if samples.len() == 0 {
            return;
        }
        let readers = (samples.len(), n_kv_heads * notes.n);
        self.scratch
            .reserve(room(shape, readers, self.pool.n_threads()));
        let attend = self.attend(cache, shape, positions.start);
        let done = Done::default();
        let mut found = self.scratch.take(samples.len() * n_kv_heads * notes.n);
        self.pool.run_pieces(&mut found, notes.n, &|i, out| {
            let (i, kv_head) = (i / n_kv_heads, i % n_kv_heads);
            let position = samples.clone().nth(i).expect("one of them");
            let q = &q[(position - positions.start) * n_cols..][..n_cols];
            done.keys
                .fetch_add(attend.visible(position).len() as u64, Relaxed);
            attend.probabilities(kv_head, position, q, out);
        });
        self.work += done.work(shape, cache.kinds());
        let heads = found.chunks_exact(n_kv_heads * notes.n);
        for (position, heads) in samples.zip(heads) {
            let row = cache.samples_mut().row_mut(position);
            row.fill(0.0);
            for head in heads.chunks_exact(notes.n) {
                let sums = row.iter_mut().zip(head);
                sums.for_each(|(sum, x)| *sum += x / shape.n_heads as f32);
            }
        }
    }

    /// Adds what queries left to rows at positions `start..`, of which none sees everything.
    pub(super) fn correct(
        &self,
        differences: &Notes,
        start: usize,
        out: &mut [f32],
        n_cols: usize,
    ) {
        if differences.shape() == NoteShape::default() {
            return;
        }
        self.pool.run_pieces(out, PIECE_ROWS * n_cols, &|i, rows| {
            let positions = start + i * PIECE_ROWS..;
            for (position, row) in positions.zip(rows.chunks_exact_mut(n_cols)) {
                let sums = row.iter_mut().zip(differences.row(position));
                sums.for_each(|(out, difference)| *out += difference);
            }
        });
    }
}

impl Selected<'_> {
    /// `out`, of the queries of `token` that share a head of keys: what they find in all that they see less what they
    /// find in what they choose.
    fn difference(&self, plan: &mut Plan, kv_head: usize, token: usize, out: &mut [f32]) {
        let (n, group) = (self.attend.shape.head_dim, self.attend.group());
        let mut buffer = self.attend.scratch.take(Sums::floats(group, n));
        self.decide(plan, kv_head, token..token + 1, &mut |_, ask, q, plan| {
            let mut sums = Sums::fresh(&mut buffer, group);
            for span in &plan.spans {
                self.attend.add_span(kv_head, span.clone(), q, &mut sums);
            }
            out.fill(0.0);
            sums.add_means(-1.0, out);
            let mut at = ask.seen.start;
            let last = ask.seen.end..ask.seen.end;
            for span in plan.spans.iter().chain([&last]) {
                self.attend.add_span(kv_head, at..span.start, q, &mut sums);
                self.done.keys.fetch_add((span.start - at) as u64, Relaxed);
                at = span.end;
            }
            sums.add_means(1.0, out);
        });
    }
}

impl Attend<'_> {
    /// `out`: what part of the attention of the queries of `q`, `(n_heads, head_dim)`, that share a head of keys goes to the
    /// key at `position`, to the one before, and so on; summed over them.
    fn probabilities(&self, kv_head: usize, position: usize, q: &[f32], out: &mut [f32]) {
        let (n, group) = (self.shape.head_dim, self.group());
        let seen = self.visible(position);
        let mut buffer = self.scratch.take(Sums::floats(group, n));
        let mut scaled = self.scratch.take((group + 1) * n);
        let (scaled, key) = scaled.split_at_mut(group * n);
        let own = q[kv_head * group * n..].iter();
        let queries = scaled.iter_mut().zip(own);
        queries.for_each(|(scaled, q)| *scaled = q * self.shape.scale);
        let mut sums = Sums::fresh(&mut buffer, group);
        self.add_span(kv_head, seen.clone(), scaled, &mut sums);
        for (back, out) in out.iter_mut().enumerate() {
            *out = 0.0;
            let at = position.checked_sub(back);
            let Some(at) = at.filter(|at| seen.contains(at)) else {
                continue;
            };
            self.cache.key(at, kv_head, key);
            for (i, q) in scaled.chunks_exact(n).enumerate() {
                let score: f32 = q.iter().zip(&*key).map(|(q, k)| q * k).sum();
                *out += (score - sums.max[i]).exp() / sums.sum[i];
            }
        }
    }
}

impl Sums<'_> {
    /// Adds `factor` times the weighted means of values to `out`.
    fn add_means(&self, factor: f32, out: &mut [f32]) {
        let n = out.len() / self.sum.len();
        let rows = out.chunks_exact_mut(n).zip(self.out.chunks_exact(n));
        for ((out, values), sum) in rows.zip(&*self.sum) {
            let factor = factor / sum;
            let sums = out.iter_mut().zip(values);
            sums.for_each(|(out, v)| *out += factor * v);
        }
    }
}
