//! Keys that tokens choose on the device by the [`Rule`] of a policy: nothing of a choice comes to the host, so decoding goes
//! on without waiting for one.
//!
//! Beside a cache lie the sums of its keys, a chunk's from when its last key is written: what they are depends on the cached
//! keys alone. A token's queries are multiplied with those that it knows, and `shaders/choose.wgsl` writes a list of
//! positions for each head of keys, over which the attention of one token goes.

use std::ops::Range;
use std::sync::Arc;

use super::attention::{CacheView, group};
use super::device::Buffer;
use super::ops::vec4;
use super::pipeline::Shader;
use super::{Gpu, Rows};
use crate::backend::Attention;
use crate::backend::select::{By, Rule, Select, runs, seen_from};
use crate::error::Result;

/// Bytes of scores and lists up to which tokens of a prompt choose together.
const TOGETHER: usize = 16 << 20;

/// Chunks that a lane each multiplies.
const CHUNKS: usize = 128;

/// Chunks that are summed by a dispatch at most.
const MOST_SUMMED: usize = 1 << 15;

/// Who chooses keys of a cache.
#[derive(Clone)]
pub(super) struct Choice {
    select: Arc<dyn Select>,
    pub(super) rule: Rule,
    /// Of keys, `(n_chunks, n_kv_heads, head_dim)`.
    pub(super) sums: Option<Arc<Buffer>>,
}

/// What tokens chose: `(n_tokens, n_kv_heads, stride)`, the number of keys before their positions.
pub(super) struct Chosen {
    pub(super) rows: Rows,
    pub(super) stride: usize,
    /// Keys of a token at most.
    pub(super) most: usize,
}

impl Choice {
    /// Of a policy that can be told to a device.
    pub(super) fn new(select: &Arc<dyn Select>) -> Result<Self> {
        Ok(Self {
            rule: select.rule()?,
            select: Arc::clone(select),
            sums: None,
        })
    }

    /// See [`runs`].
    pub(super) fn runs(
        &self,
        attention: &Attention,
        positions: Range<usize>,
    ) -> impl Iterator<Item = (bool, Range<usize>)> {
        runs(attention, self.select.as_ref(), positions)
    }
}

/// Bytes of the sums of `n_positions` of `n` elements.
pub(super) fn sums_bytes(rule: &Rule, n: usize, n_positions: usize) -> usize {
    n_positions.checked_div(rule.chunk).unwrap_or(0) * n * size_of::<f32>()
}

/// Words that a token needs to choose among `n_positions`: scores, their order, and a list.
fn words(rule: &Rule, (n_heads, n_kv_heads): (usize, usize), n_positions: usize) -> [usize; 3] {
    let n_rows = match rule.by.sums_queries() {
        true => n_kv_heads,
        false => n_heads,
    };
    let stride = 1 + rule.budget_of(n_positions).min(n_positions);
    [
        n_rows * (n_positions / rule.chunk),
        n_kv_heads * (n_positions / rule.item()),
        n_kv_heads * stride,
    ]
}

/// Bytes in which passes of `n_tokens` choose among `n_positions`, at most.
pub(super) fn scratch_bytes(
    rule: &Rule,
    heads: (usize, usize),
    n_positions: usize,
    n_tokens: usize,
) -> usize {
    if rule.chunk == 0 {
        return 0;
    }
    let words: usize = words(rule, heads, n_positions).iter().sum();
    let token = words * size_of::<f32>();
    TOGETHER.clamp(token, token * n_tokens.max(1))
}

impl Gpu {
    /// Sums the keys of chunks that end at `positions`, which were written.
    pub(super) fn sum_keys(&self, cache: &CacheView, positions: Range<usize>) -> Result<()> {
        let Some((choice, sums)) = cache
            .choice
            .as_ref()
            .and_then(|c| Some((c, c.sums.as_ref()?)))
        else {
            return Ok(());
        };
        let n = choice.rule.chunk;
        let chunks = positions.start / n..positions.end / n;
        let n_columns = cache.n_kv_heads * cache.head_dim / 4;
        let shader = Shader::SumKeys {
            chunk: n as u32,
            keys: cache.kinds.keys,
        };
        // Where none ends it is dispatched all the same: the next token is encoded before that is known.
        for first in (chunks.start..chunks.end.max(chunks.start + 1)).step_by(MOST_SUMMED) {
            let n_chunks = chunks.end.saturating_sub(first).min(MOST_SUMMED);
            let params = [first as u32, n_chunks as u32, n_columns as u32];
            let buffers = [Some(sums.all()), Some(cache.keys.all())];
            let grid = [n_columns.div_ceil(64), n_chunks.max(1), 1];
            let of = (&[][..], self.work.get());
            let mut recorder = self.recorder.borrow_mut();
            recorder.dispatch(of, shader, &params, &buffers, grid)?;
        }
        Ok(())
    }

    /// `positions` in parts of tokens that choose together.
    pub(super) fn choose_in_parts(
        &self,
        cache: &CacheView,
        attention: &Attention,
        positions: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let rule = &cache.choice.as_ref().expect("somebody chooses").rule;
        let heads = (attention.n_heads, attention.n_kv_heads);
        let words: usize = words(rule, heads, cache.n_positions).iter().sum();
        let n = (TOGETHER / (words * size_of::<f32>())).max(1);
        let end = positions.end;
        positions
            .step_by(n)
            .map(move |first| first..end.min(first + n))
    }

    /// What the tokens in `rows`, at `positions`, read, none of which reads everything.
    pub(super) fn choose_keys(
        &self,
        q: &Rows,
        rows: Range<usize>,
        cache: &CacheView,
        positions: Range<usize>,
        attention: &Attention,
    ) -> Chosen {
        let choice = cache.choice.as_ref().expect("somebody chooses");
        let sums = choice.sums.as_ref().expect("room was made before");
        let rule = &choice.rule;
        let &Attention {
            n_heads,
            n_kv_heads,
            head_dim: d,
            ..
        } = attention;
        let n_tokens = rows.len();
        let [n_scores, n_orders, n_list] = words(rule, (n_heads, n_kv_heads), cache.n_positions);
        let per_kv = n_heads / n_kv_heads;
        let summed = rule.by.sums_queries();
        let (n_rows, rows_together) = match summed {
            true => (n_kv_heads, 1),
            false => (n_heads, group(attention)),
        };
        let scores = self.take(n_tokens * n_scores);
        let shader = Shader::ChunkScores {
            head_dim: d as u32,
            rows: rows_together as u32,
            chunk: rule.chunk as u32,
            summed,
        };
        let n_summed = match rule.by {
            By::Shared => n_heads,
            _ => per_kv,
        };
        let params = [
            positions.start as u32,
            n_heads as u32,
            n_kv_heads as u32,
            n_rows as u32,
            n_summed as u32,
            (n_scores / n_rows) as u32,
            vec4(q.at + rows.start * n_heads * d),
            attention.scale.to_bits(),
        ];
        let n_known = positions.end / rule.chunk;
        let buffers = [Some(q.span()), Some(sums.all()), Some(scores.span())];
        let grid = [n_known.div_ceil(CHUNKS), n_rows / rows_together, n_tokens];
        self.dispatch(shader, &params, &buffers, grid);

        let (orders, list) = (self.take(n_tokens * n_orders), self.take(n_tokens * n_list));
        let stride = n_list / n_kv_heads;
        let shader = Shader::Choose {
            by: rule.by,
            chunk: rule.chunk as u32,
            item: rule.item() as u32,
            group: if summed { 1 } else { per_kv as u32 },
        };
        let params = [
            positions.start,
            attention.window.unwrap_or(0),
            n_kv_heads,
            n_rows,
            n_scores / n_rows,
            n_orders / n_kv_heads,
            stride,
            rule.sink,
            rule.local,
            rule.budget,
            rule.per_cent,
        ]
        .map(|n| n as u32);
        let buffers = [Some(scores.span()), Some(orders.span()), Some(list.span())];
        self.dispatch(shader, &params, &buffers, [n_kv_heads, n_tokens, 1]);
        // The last token sees the most.
        let seen = seen_from(attention, positions.end - 1);
        Chosen {
            rows: list,
            stride,
            most: rule.budget_of(seen.len()),
        }
    }
}
