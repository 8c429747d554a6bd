//! Attention of a prompt with queries in the lanes of vectors, and, where a cache has a [`Delta`] and that pays, with
//! scores from differences of keys.

use std::ops::Range;
use std::sync::Mutex;

use super::Cpu;
use super::attention::{self, KvCache, PAGE};
use super::isa::Isa;
use super::pool::Output;
use super::table::{AttendBatch, LanesBatch, Operations};
use crate::backend::delta::{Delta, Exact};
use crate::backend::select::KvOptions;
use crate::backend::{Attention, KvTypes, Step};
use crate::profile::DeltaWork;

/// Changes of a frame up to which their sums are faster than whole products, as a share of its elements: where attention
/// takes as long either way, finding the changes included (an EPYC, keys of SmolLM2, `time_of_differences` of
/// `tests/kernels/lanes.rs`). Scores alone take 0.54 of the time with AVX-512 where 38 % change, 0.77 with AVX2.
fn break_even(isa: Isa) -> f64 {
    match isa {
        Isa::Avx512Vnni => 0.7,
        _ => 0.48,
    }
}

/// Tasks of a thread, at least, if they are not too small then.
const TASKS: usize = 4;

/// How a step of a prompt uses the kernel.
#[derive(Clone, Copy)]
pub(super) struct Lanes {
    /// Changes of a frame up to which they are summed.
    most: usize,
    /// Keys of a frame.
    pub(super) frame: usize,
}

impl Lanes {
    /// `None` where other kernels are better: on a matrix unit, without vectors, and for one token, whose queries fill
    /// no lanes.
    pub(super) fn new(
        operations: &Operations,
        head_dim: usize,
        kinds: KvTypes,
        step: Step,
        delta: Option<&Delta>,
    ) -> Option<Self> {
        let fits = step == Step::Prefill
            && attention::tiles(operations, head_dim, kinds, step).is_none()
            && Self::has_vectors(operations, head_dim);
        let frame = delta.map_or(Delta::DEFAULT_FRAME, |delta| delta.frame);
        let elements = frame * head_dim;
        let most = match delta {
            Some(delta) if delta.always => elements,
            Some(delta) if fits && delta.rate > 0.0 => {
                (break_even(operations.attend_lanes.isa()) * elements as f64) as usize
            }
            _ => 0,
        };
        (fits || most > 0).then_some(Self { most, frame })
    }

    /// The same where tokens choose keys, whatever a matrix unit could do with all of them.
    pub(super) fn take_choices(
        operations: &Operations,
        head_dim: usize,
        step: Step,
    ) -> Option<Self> {
        let frame = LanesBatch::FRAME_TO_CHOOSE;
        (step == Step::Prefill && Self::has_vectors(operations, head_dim))
            .then_some(Self { most: 0, frame })
    }

    fn has_vectors(operations: &Operations, head_dim: usize) -> bool {
        matches!(operations.attend_lanes.isa(), Isa::Avx512Vnni | Isa::Avx2)
            && matches!(head_dim, 64 | 128 | 256)
    }

    /// Floats that a task of `n_tokens` takes.
    pub(super) fn room(self, shape: &Attention, n_tokens: usize) -> usize {
        let n_queries = n_tokens * (shape.n_heads / shape.n_kv_heads);
        LanesBatch::room(n_queries, shape.head_dim, self.frame)
    }

    /// Tokens of a task.
    pub(super) fn task_tokens(shape: &Attention, n_tokens: usize, n_threads: usize) -> usize {
        let group = shape.n_heads / shape.n_kv_heads;
        let wanted = (n_tokens * shape.n_kv_heads).div_ceil(TASKS * n_threads);
        let (least, most) = (attention::task_tokens(group), attention::tile_tokens(group));
        wanted.clamp(least, most)
    }

    fn scratch(self, shape: &Attention, n_tokens: usize, n_threads: usize) -> Vec<usize> {
        let task_tokens = Self::task_tokens(shape, n_tokens, n_threads);
        let n_tasks = n_tokens.div_ceil(task_tokens) * shape.n_kv_heads;
        let room = self.room(shape, n_tokens.min(task_tokens));
        vec![room; n_tasks.min(n_threads)]
    }
}

/// The floats of the buffers that queries at `positions`, which see everything, take on `n_threads`: as
/// [`attention::scratch`].
pub(in crate::backend) fn scratch(
    operations: &Operations,
    shape: &Attention,
    options: &KvOptions,
    step: Step,
    positions: Range<usize>,
    n_threads: usize,
) -> Vec<Vec<usize>> {
    let delta = options.delta.as_deref();
    match Lanes::new(operations, shape.head_dim, options.kinds, step, delta) {
        Some(lanes) => vec![lanes.scratch(shape, positions.len(), n_threads)],
        None => attention::scratch(operations, shape, options.kinds, step, positions, n_threads),
    }
}

impl Cpu {
    /// Rows of `q` at positions `start..`, to every key they see.
    pub(super) fn attend_lanes(
        &mut self,
        cache: &KvCache,
        shape: &Attention,
        (lanes, start): (Lanes, usize),
        q: &[f32],
        out: &mut [f32],
    ) {
        let (n, n_cols) = (shape.head_dim, shape.n_heads * shape.head_dim);
        let (n_tokens, n_threads) = (q.len() / n_cols, self.pool.n_threads());
        let room = lanes.scratch(shape, n_tokens, n_threads);
        self.scratch.reserve(room);
        let attend = self.attend(cache, shape, start);
        let (group, delta) = (attend.group(), cache.delta());
        let (sink, exact) = delta.map_or((0, Exact::Last(1)), |delta| (delta.sink, delta.exact));
        let done = Mutex::new(DeltaWork::default());
        let task_tokens = Lanes::task_tokens(shape, n_tokens, n_threads);
        let mut outputs = [Output::new(out, n_cols)];
        self.pool
            .run_tiles(&mut outputs, (task_tokens, group * n), &|tile| {
                let kv_head = tile.first_col / (group * n);
                let start = start + tile.first_row;
                let mut room = self.scratch.take(lanes.room(shape, tile.out.n_tokens()));
                let pages = attend.pages(start..start + tile.out.n_tokens());
                let rows = |page| attend.rows(page, kv_head).into();
                let (keys, values): (Vec<_>, Vec<_>) = pages.clone().map::<(_, _), _>(rows).unzip();
                let mut batch = LanesBatch {
                    attend: AttendBatch {
                        q: &q[tile.first_row * n_cols + tile.first_col..],
                        q_stride: n_cols,
                        group,
                        head_dim: n,
                        scale: shape.scale,
                        start,
                        window: shape.window,
                        first: pages.start * PAGE,
                        page: PAGE,
                        keys: &keys,
                        values: &values,
                        out: tile.out,
                    },
                    frame: lanes.frame,
                    sink,
                    exact,
                    thresholds: cache.thresholds(kv_head),
                    most: lanes.most,
                    chosen: None,
                    room: &mut room,
                    done: DeltaWork::default(),
                };
                self.operations.attend_lanes.run(&mut batch);
                *done.lock().expect("no task panics with it") += batch.done;
            });
        let mut work = attention::work(shape, cache.kinds(), start..start + n_tokens);
        if delta.is_some() {
            work.delta = done.into_inner().expect("no task panicked with it");
            work.attention_ops = 2 * (work.delta.dense + work.delta.done);
        }
        self.work += work;
    }
}
