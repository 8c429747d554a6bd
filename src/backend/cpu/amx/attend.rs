//! Attention of a batch in bf16 tiles, streaming softmax (arXiv:1805.02867), one key and value head at a time.
//!
//! Scores are computed turned, `(keys, queries)`: keys need no turning, and 16 queries in the lanes make the softmax
//! a matter of whole vectors. Keys and values of a page become tiles once for all queries of the call. Queries,
//! keys, values and weights are rounded to bf16; scores, sums and maxima stay floats.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::{Tiles, load, store, to_bf16, transpose};
use crate::backend::cpu::acts::Tile;
use crate::backend::cpu::avx512vnni::floats;
use crate::backend::cpu::table::{AttendBatch, Rows};

/// Queries in the lanes of a tile.
const LANES: usize = 16;

/// Keys whose scores are computed together.
const KEYS: usize = 64;

/// Keys whose values are summed together: the pairs of a tile.
const PAIRED: usize = 32;

/// Elements of a head, or queries, keys, in a bf16 tile row.
const LEN: usize = 32;

/// The largest score so far of a query that has seen none: finite, so that it can be subtracted.
const NONE: f32 = f32::MIN / 2.0;

/// What one call needs: kept from call to call, so that steady work allocates nothing.
#[derive(Default)]
struct Space {
    /// `(heads, blocks of 16 tokens, head_dim / 32)`: pairs by queries.
    queries: Vec<Tile>,
    /// `(keys / 64, head_dim / 32, 4)`: 16 keys by 32 elements.
    keys: Vec<[Tile; 4]>,
    /// `(head_dim / 64, keys / 32, 4)`: 16 elements by 32 keys.
    values: Vec<[Tile; 4]>,
    /// `(keys / 64, 4)`: 16 keys by queries.
    scores: Vec<[Tile; 4]>,
    /// `(keys / 32)`: pairs of keys by queries.
    weights: Vec<Tile>,
    /// `(heads, blocks of 16 tokens, head_dim / 64, 4)`: 16 elements by queries.
    out: Vec<[Tile; 4]>,
    /// `(heads, blocks of 16 tokens)`: largest score, sum of weights.
    sums: Vec<[[f32; LANES]; 2]>,
}

thread_local! {
    static SPACE: RefCell<Space> = RefCell::default();
}

/// See [`AttendBatch`].
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn attend(batch: &mut AttendBatch) {
    let n = batch.head_dim;
    let n_tokens = batch.out.n_tokens();
    let page = batch.page;
    assert!(n.is_multiple_of(KEYS) && page.is_multiple_of(KEYS));
    let blocks = n_tokens.div_ceil(LANES);
    let columns = batch.group * blocks;
    SPACE.with_borrow_mut(|space| {
        let zero = Tile([[0; 64]; 16]);
        space.queries.resize(columns * n / LEN, zero);
        space.keys.resize(page / KEYS * n / LEN, [zero; 4]);
        space.values.resize(n / 64 * page / PAIRED, [zero; 4]);
        space.scores.resize(page / KEYS, [zero; 4]);
        space.weights.resize(page / PAIRED, zero);
        space.out.clear();
        space.out.resize(columns * n / 64, [zero; 4]);
        space.sums.clear();
        space.sums.resize(columns, [[NONE; LANES], [0.0; LANES]]);
        pack_queries(batch, n_tokens, &mut space.queries);
        let tiles = Tiles::configure();
        let end = batch.start + n_tokens;
        for (i, (keys, values)) in batch.keys.iter().zip(batch.values).enumerate() {
            let first = batch.first + i * page;
            let n_keys = page.min(end - first);
            pack_keys(*keys, n, n_keys, &mut space.keys);
            pack_values(*values, n, n_keys, page, &mut space.values);
            for column in 0..columns {
                let position = batch.start + column % blocks * LANES;
                add_page(&tiles, space, batch, column, position, first);
            }
        }
    });
    SPACE.with_borrow(|space| write(space, batch, n_tokens));
}

/// Adds the page of keys from position `first` to the sums of 16 queries from `position`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn add_page(
    tiles: &Tiles,
    space: &mut Space,
    batch: &AttendBatch,
    column: usize,
    position: usize,
    first: usize,
) {
    let (n, page) = (batch.head_dim, batch.page);
    let newest = (batch.start + batch.out.n_tokens()).min(position + LANES);
    let window = batch.window.unwrap_or(usize::MAX);
    // Keys of the page that any of the queries sees.
    let seen = (position + 1).saturating_sub(window).saturating_sub(first)
        ..newest.saturating_sub(first).min(page);
    if seen.is_empty() {
        return;
    }
    let queries = &space.queries[column * n / LEN..][..n / LEN];
    for i in seen.start / KEYS..seen.end.div_ceil(KEYS) {
        let keys = &space.keys[i * n / LEN..][..n / LEN];
        tiles.multiply_column(keys, queries, &mut space.scores[i], true);
    }
    let pairs = seen.start / PAIRED..seen.end.div_ceil(PAIRED);
    let rows = pairs.start * PAIRED..pairs.end * PAIRED;
    let scores = space.scores.as_flattened_mut();
    let [max, sum] = &mut space.sums[column];
    let shrink = softmax(
        scores,
        &mut space.weights,
        rows,
        &Mask {
            position,
            first,
            window,
        },
        max,
        sum,
    );
    let out = &mut space.out[column * n / 64..][..n / 64];
    if let Some(shrink) = shrink {
        let shrink = _mm512_castsi512_ps(load(&shrink));
        for row in out.as_flattened_mut().iter_mut().flat_map(|t| &mut t.0) {
            let scaled = _mm512_mul_ps(_mm512_castsi512_ps(load(row)), shrink);
            store(_mm512_castps_si512(scaled), row);
        }
    }
    let weights = &space.weights[pairs.clone()];
    for (out, values) in out.iter_mut().zip(space.values.chunks_exact(page / PAIRED)) {
        tiles.multiply_column(&values[pairs.clone()], weights, out, false);
    }
}

/// Which keys 16 adjacent queries see.
struct Mask {
    /// Position of the first query.
    position: usize,
    /// Position of the page's first key.
    first: usize,
    window: usize,
}

impl Mask {
    /// The queries that see key `row` of the page.
    #[inline(always)]
    fn lanes(&self, row: usize) -> u16 {
        let key = self.first + row;
        // Query i sees keys in (position + i - window, position + i].
        let from = key.saturating_sub(self.position).min(LANES);
        let to = key
            .saturating_add(self.window)
            .saturating_sub(self.position)
            .min(LANES);
        (((1u32 << to) - 1) & !((1u32 << from) - 1)) as u16
    }
}

/// Turns the scores of keys `rows` into weights; returns the factor for what was summed before, if any is not 1.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn softmax(
    scores: &mut [Tile],
    weights: &mut [Tile],
    rows: Range<usize>,
    mask: &Mask,
    max: &mut [f32; LANES],
    sum: &mut [f32; LANES],
) -> Option<[f32; LANES]> {
    let old = _mm512_castsi512_ps(load(max));
    let mut tops = [old; 4];
    let tiles = rows.start / 16..rows.end / 16;
    for tile in tiles.clone() {
        let scores = &mut scores[tile].0;
        let whole = mask.lanes(tile * 16) & mask.lanes(tile * 16 + 15) == u16::MAX;
        for i in 0..16 {
            let mut score = _mm512_castsi512_ps(load(&scores[i]));
            if !whole {
                let lanes = mask.lanes(tile * 16 + i);
                let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
                score = _mm512_mask_mov_ps(hidden, lanes, score);
                store(_mm512_castps_si512(score), &mut scores[i]);
            }
            tops[i % 4] = _mm512_max_ps(tops[i % 4], score);
        }
    }
    let top = _mm512_max_ps(
        _mm512_max_ps(tops[0], tops[1]),
        _mm512_max_ps(tops[2], tops[3]),
    );
    store(_mm512_castps_si512(top), max);
    // Exactly 1 where nothing changed: a query must not depend on those beside it.
    let same = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(old, top);
    let one = _mm512_set1_ps(1.0);
    let shrink = _mm512_mask_mov_ps(exp2(_mm512_sub_ps(old, top)), same, one);
    let mut totals = [_mm512_setzero_ps(); 2];
    for tile in tiles {
        let scores = &scores[tile].0;
        let weights = &mut weights[tile / 2].0;
        for pair in 0..8 {
            let score = |i: usize| _mm512_castsi512_ps(load(&scores[2 * pair + i]));
            let a = exp2(_mm512_sub_ps(score(0), top));
            let b = exp2(_mm512_sub_ps(score(1), top));
            totals[0] = _mm512_add_ps(totals[0], a);
            totals[1] = _mm512_add_ps(totals[1], b);
            store(pairs(a, b), &mut weights[tile % 2 * 8 + pair]);
        }
    }
    let total = _mm512_add_ps(totals[0], totals[1]);
    let before = _mm512_castsi512_ps(load(sum));
    store(
        _mm512_castps_si512(_mm512_fmadd_ps(before, shrink, total)),
        sum,
    );
    (same != u16::MAX).then(|| {
        let mut out = [0.0; LANES];
        store(_mm512_castps_si512(shrink), &mut out);
        out
    })
}

/// `2^x` for `x <= 0` within 1e-4 of itself, well below what bf16 keeps; 0 far below and for minus infinity.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn exp2(x: __m512) -> __m512 {
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    // Where x is minus infinity the difference is no number; scaling by 2^-inf below must give 0, so it is set to 0.
    let finite = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, _mm512_set1_ps(-200.0));
    let r = _mm512_maskz_sub_ps(finite, x, n);
    // Least relative error of 2^r on -0.5..0.5.
    let p = _mm512_fmadd_ps(
        _mm512_set1_ps(0.055_171_67),
        r,
        _mm512_set1_ps(0.242_611_13),
    );
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693_261));
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.999_928_1));
    _mm512_maskz_scalef_ps(finite, p, n)
}

/// The bf16 of two vectors, side by side in each lane.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn pairs(a: __m512, b: __m512) -> __m512i {
    const ORDER: [u16; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 32 {
            order[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        order
    };
    _mm512_permutexvar_epi16(load(&ORDER), to_bf16(a, b))
}

/// Sixteen elements from `at`, a multiple of that.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn widen(rows: Rows, at: usize) -> __m512 {
    let (block, i) = (at / LEN, at % LEN / 16);
    match rows {
        Rows::F32(rows) => floats::load(&rows.as_chunks().0[at / 16]),
        Rows::F16(rows) => floats::load_f16(&rows.as_chunks().0[at / 16]),
        Rows::Q8_0(rows) => floats::load_q8_0(&rows[block], i),
        Rows::Q4_0(rows) => floats::load_q4_0(&rows[block], i),
    }
}

/// Queries times scale and log2(e), so that weights are powers of two.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn pack_queries(batch: &AttendBatch, n_tokens: usize, tiles: &mut [Tile]) {
    let n = batch.head_dim;
    let scale = _mm512_set1_ps(batch.scale * std::f32::consts::LOG2_E);
    let blocks = n_tokens.div_ceil(LANES);
    for (at, tile) in tiles.iter_mut().enumerate() {
        let (column, k) = (at / (n / LEN), at % (n / LEN));
        let (head, first) = (column / blocks, column % blocks * LANES);
        let mut rows = [_mm512_setzero_si512(); LANES];
        for i in 0..LANES.min(n_tokens - first) {
            let q = &batch.q[(first + i) * batch.q_stride + head * n + k * LEN..][..LEN];
            let (low, high) = q.split_first_chunk::<16>().expect("32 floats");
            let high: &[f32; 16] = high.first_chunk().expect("16 floats");
            rows[i] = to_bf16(
                _mm512_mul_ps(_mm512_castsi512_ps(load(low)), scale),
                _mm512_mul_ps(_mm512_castsi512_ps(load(high)), scale),
            );
        }
        let rows = transpose(rows);
        for i in 0..LANES {
            store(rows[i], &mut tile.0[i]);
        }
    }
}

/// Keys `(n_keys, n)`; what lies beyond them is left as it is, and masked.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn pack_keys(keys: Rows, n: usize, n_keys: usize, tiles: &mut [[Tile; 4]]) {
    for key in 0..n_keys {
        for k in 0..n / LEN {
            let at = key * n + k * LEN;
            let line = to_bf16(widen(keys, at), widen(keys, at + 16));
            let tile = &mut tiles[key / KEYS * (n / LEN) + k][key % KEYS / 16];
            store(line, &mut tile.0[key % 16]);
        }
    }
}

/// Values `(n_keys, n)`, zeros beyond them up to a whole tile: their weights are 0, but 0 times no number is none.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn pack_values(values: Rows, n: usize, n_keys: usize, page: usize, tiles: &mut [[Tile; 4]]) {
    for k in 0..n_keys.div_ceil(PAIRED) {
        for at in (0..n).step_by(16) {
            let mut rows = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                let key = k * PAIRED + 2 * i;
                let mut pair = [_mm512_setzero_ps(); 2];
                for (j, value) in pair.iter_mut().enumerate() {
                    if key + j < n_keys {
                        *value = widen(values, (key + j) * n + at);
                    }
                }
                rows[i] = pairs(pair[0], pair[1]);
            }
            let rows = transpose(rows);
            let tile = &mut tiles[at / 64 * (page / PAIRED) + k][at % 64 / 16];
            for i in 0..16 {
                store(rows[i], &mut tile.0[i]);
            }
        }
    }
}

/// Divides by the sums of weights and writes `(n_tokens, group * head_dim)`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn write(space: &Space, batch: &mut AttendBatch, n_tokens: usize) {
    let n = batch.head_dim;
    let blocks = n_tokens.div_ceil(LANES);
    let tiles = space.out.as_flattened();
    for (at, tile) in tiles.iter().enumerate() {
        let (column, first) = (at / (n / 16), at % (n / 16) * 16);
        let (head, token) = (column / blocks, column % blocks * LANES);
        let [_, sum] = &space.sums[column];
        let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_castsi512_ps(load(sum)));
        let mut rows = [_mm512_setzero_si512(); 16];
        for i in 0..16 {
            let scaled = _mm512_mul_ps(_mm512_castsi512_ps(load(&tile.0[i])), inverse);
            rows[i] = _mm512_castps_si512(scaled);
        }
        let rows = transpose(rows);
        for i in 0..LANES.min(n_tokens - token) {
            let out = &mut batch.out.row(token + i)[head * n + first..];
            store(
                rows[i],
                out.first_chunk_mut::<16>().expect("16 elements of a head"),
            );
        }
    }
}
