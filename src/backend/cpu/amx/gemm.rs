//! GEMM in bf16 tiles: `sums` (rows, tokens) `= W X`, 32 rows by 32 tokens in registers.
//!
//! 256 weights of each row, a super-block, are unpacked at a time into tiles that stay in the second-level cache for all
//! tokens; 32 tokens of as many activations stay in the first. Sums wait in memory between these spans of 256 (512 are
//! no faster) and are turned at the end. Weights and activations are rounded to 8 bits of precision, a few times finer than 8-bit blocks; scales are
//! in the weights, so no sum is touched between products. Tried instead, int8 tiles with block scales outside: a store
//! and a multiplication for each 32 products, 0.41 T products/s of a core where this reaches 0.9.
//!
//! Two matrices that a gated unit joins need no turning: their sums meet as they lie, rows by tokens, and two adjacent
//! rows make the pairs that the next matrix takes. Neither is written as floats.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::{Tiles, load, load128, load256, store, to_bf16, transpose};
use crate::backend::cpu::acts::{Acts, BF16_LEN, BF16_TOKENS, Tile};
use crate::backend::cpu::avx512vnni::{self as avx512, gemm::Scales};
use crate::backend::cpu::pool::OutCols;
use crate::backend::cpu::table::GatedRows;
use crate::quant::{self, Block, BlockQ4_0, BlockQ4_1, BlockQ4K, blocks};

/// Tiles along a row that are unpacked at a time: 256 weights.
const SPAN: usize = 8;

/// Weight rows of two tiles.
const ROWS: usize = 32;

/// Tokens whose sums wait in memory together: with 256 rows half a megabyte.
const TOKENS: usize = 512;

const EMPTY: Tile = Tile([[0; 64]; 16]);

/// Unpacked weights and waiting sums: kept from call to call, so that steady work allocates nothing.
#[derive(Default)]
struct Space {
    /// `(pairs of rows, k)`.
    weights: Vec<[Tile; 2]>,
    /// Of one matrix, or of each of two: `(groups of tokens, pairs of rows)`, each rows by tokens.
    sums: [Vec<[Tile; 4]>; 2],
}

thread_local! {
    static SPACE: RefCell<Space> = RefCell::default();
}

/// The lines of one row in the tiles of a span.
struct Lines<'a> {
    tiles: &'a mut [[Tile; 2]],
    row: usize,
}

impl Lines<'_> {
    /// Writes line `j`: 32 weights.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
    fn put(&mut self, j: usize, line: __m512i) {
        let tile = &mut self.tiles[j][self.row / 16 % 2];
        store(line, &mut tile.0[self.row % 16]);
    }
}

/// The products of `n_rows` rows `w` and `tokens` of `x`. `unpack` puts the lines of a span of a row's tiles.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
#[allow(
    clippy::too_many_arguments,
    reason = "both loops and what they work on"
)]
fn products<B: Block>(
    registers: &Tiles,
    w: &[B],
    n_rows: usize,
    x: &Acts,
    tokens: Range<usize>,
    weights: &mut Vec<[Tile; 2]>,
    sums: &mut Vec<[Tile; 4]>,
    unpack: impl Fn(&[B], Range<usize>, Lines),
) {
    let n_k = x.n_in / BF16_LEN;
    let row_blocks = x.n_in / B::LEN;
    let n_pairs = n_rows.div_ceil(ROWS);
    let n_groups = tokens.len().div_ceil(BF16_TOKENS);
    if weights.len() < n_pairs * SPAN {
        weights.resize(n_pairs * SPAN, [EMPTY; 2]);
    }
    if sums.len() < n_pairs * n_groups {
        sums.resize(n_pairs * n_groups, [EMPTY; 4]);
    }
    for first in (0..n_k).step_by(SPAN) {
        let k = first..(first + SPAN).min(n_k);
        let weights = &mut weights[..n_pairs * k.len()];
        for (i, tiles) in weights.chunks_exact_mut(k.len()).enumerate() {
            let here = ROWS.min(n_rows - i * ROWS);
            if here < ROWS {
                tiles.fill([EMPTY; 2]);
            }
            for row in 0..here {
                let blocks = &w[(i * ROWS + row) * row_blocks..][..row_blocks];
                unpack(blocks, k.clone(), Lines { tiles, row });
            }
        }
        let groups = sums.chunks_exact_mut(n_pairs);
        for (group, sums) in (0..n_groups).zip(groups) {
            let x = x.bf16_group(tokens.start / BF16_TOKENS + group);
            let x = &x[k.clone()];
            let half = is_half(group, tokens.len());
            for (weights, sums) in weights.chunks_exact(k.len()).zip(sums) {
                if half {
                    registers.multiply_first(weights, x, sums, first == 0);
                } else {
                    registers.multiply(weights, x, sums, first == 0);
                }
            }
        }
    }
}

/// Whether a group has so few of `n_tokens` tokens that its second tiles have none.
fn is_half(group: usize, n_tokens: usize) -> bool {
    n_tokens - group * BF16_TOKENS <= BF16_TOKENS / 2
}

/// Runs of tokens whose sums wait in memory together.
fn spans(n_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    (0..n_tokens)
        .step_by(TOKENS)
        .map(move |first| first..(first + TOKENS).min(n_tokens))
}

/// `y[t, r] = sum_k w[r, k] x[t, k]`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn gemm<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols, unpack: impl Fn(&[B], Range<usize>, Lines)) {
    let n_rows = y.n_cols();
    let n_pairs = n_rows.div_ceil(ROWS);
    let w = blocks::<B>(w);
    SPACE.with_borrow_mut(|space| {
        let registers = Tiles::configure();
        let (weights, [sums, _]) = (&mut space.weights, &mut space.sums);
        for tokens in spans(x.n_tokens) {
            products(
                &registers,
                w,
                n_rows,
                x,
                tokens.clone(),
                weights,
                sums,
                &unpack,
            );
            let n_groups = tokens.len().div_ceil(BF16_TOKENS);
            for (group, sums) in (0..n_groups).zip(sums.chunks_exact(n_pairs)) {
                for (pair, sums) in sums.iter().enumerate() {
                    for (i, sums) in sums.iter().enumerate() {
                        let first = group * BF16_TOKENS + i % 2 * 16;
                        let here = first..(first + 16).min(tokens.len());
                        let row = pair * ROWS + i / 2 * 16;
                        let rows = row..(row + 16).min(n_rows);
                        if !here.is_empty() && !rows.is_empty() {
                            write(sums, y, tokens.start + first, here.len(), rows);
                        }
                    }
                }
            }
        }
    });
}

/// See [`GatedRows`].
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn gated<B: Block>(rows: &mut GatedRows, unpack: impl Fn(&[B], Range<usize>, Lines)) {
    let n_chunks = rows.out.n_cols();
    let n_rows = n_chunks * BF16_LEN;
    let (gate, up) = (blocks::<B>(rows.gate), blocks::<B>(rows.up));
    SPACE.with_borrow_mut(|space| {
        let registers = Tiles::configure();
        let (weights, [gates, ups]) = (&mut space.weights, &mut space.sums);
        for tokens in spans(rows.x.n_tokens) {
            for (w, sums) in [(gate, &mut *gates), (up, &mut *ups)] {
                let tokens = tokens.clone();
                products(
                    &registers, w, n_rows, rows.x, tokens, weights, sums, &unpack,
                );
            }
            let n_groups = tokens.len().div_ceil(BF16_TOKENS);
            let gates = gates.chunks_exact_mut(n_chunks);
            let groups = gates.zip(ups.chunks_exact(n_chunks)).take(n_groups);
            for (group, (gates, ups)) in groups.enumerate() {
                let half = is_half(group, tokens.len());
                let out = rows.out.row(tokens.start / BF16_TOKENS + group);
                for ((gate, up), out) in gates.iter_mut().zip(ups).zip(out) {
                    let floats = bytemuck::cast_slice_mut(gate.as_mut_slice());
                    let up = bytemuck::cast_slice(up.as_slice());
                    avx512::elementwise::glu(rows.activation, floats, up);
                    if half {
                        // Of tokens that are absent: whatever was there.
                        [gate[1], gate[3]] = [EMPTY; 2];
                    }
                    pair(gate, out);
                }
            }
        }
    });
}

/// Sums of 32 rows and 32 tokens to the tiles in which the next matrix takes them: pairs of adjacent rows side by side.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn pair(sums: &[Tile; 4], out: &mut [Tile; 2]) {
    const PLACES: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        places
    };
    let places = load(&PLACES);
    for (half, out) in out.iter_mut().enumerate() {
        for (i, line) in out.0.iter_mut().enumerate() {
            let rows = &sums[i / 8 * 2 + half].0;
            let [even, odd] = [&rows[2 * i % 16], &rows[(2 * i + 1) % 16]]
                .map(|row| _mm512_castsi512_ps(load(row)));
            store(_mm512_permutexvar_epi16(places, to_bf16(even, odd)), line);
        }
    }
}

/// Writes a tile of sums, rows by tokens, to the columns `rows` of `n_tokens` tokens.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn write(sums: &Tile, y: &mut OutCols, first: usize, n_tokens: usize, rows: Range<usize>) {
    let mut lanes = [_mm512_setzero_si512(); 16];
    for i in 0..16 {
        lanes[i] = load(&sums.0[i]);
    }
    let lanes = transpose(lanes);
    for i in 0..n_tokens {
        let out = &mut y.row(first + i)[rows.clone()];
        if let Ok(out) = <&mut [f32; 16]>::try_from(&mut *out) {
            store(lanes[i], out);
        } else {
            let mut all = [0.0; 16];
            store(lanes[i], &mut all);
            out.copy_from_slice(&all[..out.len()]);
        }
    }
}

/// `d * q + m` for `q` in -16..=15: the 32 possible weights, looked up.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn small((q, scales): (__m256i, Scales)) -> __m512i {
    let low = _mm512_setr_ps(
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    );
    let (d, m) = (_mm512_set1_ps(scales.d[0]), _mm512_set1_ps(scales.m));
    // Five bits of an index: 16 to 31 are -16 to -1.
    let high = _mm512_sub_ps(low, _mm512_set1_ps(16.0));
    let table = to_bf16(_mm512_fmadd_ps(low, d, m), _mm512_fmadd_ps(high, d, m));
    _mm512_permutexvar_epi16(_mm512_cvtepi8_epi16(q), table)
}

/// `d * q + m` for `q` in 0..=31.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn unsigned((q, scales): (__m256i, Scales)) -> __m512i {
    let low = _mm512_setr_ps(
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    );
    let (d, m) = (_mm512_set1_ps(scales.d[0]), _mm512_set1_ps(scales.m));
    let high = _mm512_add_ps(low, _mm512_set1_ps(16.0));
    let table = to_bf16(_mm512_fmadd_ps(low, d, m), _mm512_fmadd_ps(high, d, m));
    _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(q), table)
}

/// `d * q` for any byte; the first and the last 16 may differ in scale.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn wide((q, scales): (__m256i, Scales)) -> __m512i {
    let [low, high] = [_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q)];
    let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low));
    let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(high));
    to_bf16(
        _mm512_mul_ps(low, _mm512_set1_ps(scales.d[0])),
        _mm512_mul_ps(high, _mm512_set1_ps(scales.d[1])),
    )
}

/// The 16 weights that nibbles stand for, twice: `step * (first + nibble) + offset`.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn nibble_table(first: f32, step: __m512, offset: __m512) -> __m512i {
    let levels = _mm512_setr_ps(
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    );
    let levels = _mm512_add_ps(levels, _mm512_set1_ps(first));
    let table = _mm512_fmadd_ps(levels, step, offset);
    to_bf16(table, table)
}

/// A half float in all lanes.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn splat_half(bits: u16) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(bits as i16))
}

/// Looks up the low nibbles of 16 bytes, then the high ones. A lookup takes the lower five bits of its index; the table
/// repeats after four, so what stands above a low nibble does no harm.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn look_up(table: __m512i, qs: &[u8; 16]) -> __m512i {
    let low = _mm256_cvtepu8_epi16(load128(qs));
    let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_srli_epi16::<4>(low));
    _mm512_permutexvar_epi16(both, table)
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn unpack_q4_0(row: &[BlockQ4_0], k: Range<usize>, mut lines: Lines) {
    for (j, block) in row[k].iter().enumerate() {
        let table = nibble_table(-8.0, splat_half(block.d), _mm512_setzero_ps());
        lines.put(j, look_up(table, &block.qs));
    }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn unpack_q4_1(row: &[BlockQ4_1], k: Range<usize>, mut lines: Lines) {
    for (j, block) in row[k].iter().enumerate() {
        let table = nibble_table(0.0, splat_half(block.d), splat_half(block.m));
        lines.put(j, look_up(table, &block.qs));
    }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn unpack_q4_k(row: &[BlockQ4K], k: Range<usize>, mut lines: Lines) {
    const GROUPS: usize = BlockQ4K::LEN / BF16_LEN;
    for (i, block) in row[k.start / GROUPS..k.end / GROUPS].iter().enumerate() {
        let (scales, mins) = block.scales_mins();
        let (d, dmin) = (splat_half(block.d), splat_half(block.dmin));
        let bytes: &[[u8; 32]; 4] = bytemuck::cast_ref(&block.qs);
        for group in 0..GROUPS {
            let step = _mm512_mul_ps(d, _mm512_set1_ps(f32::from(scales[group])));
            let min = _mm512_mul_ps(dmin, _mm512_set1_ps(-f32::from(mins[group])));
            let indices = _mm512_cvtepu8_epi16(load256(&bytes[group / 2]));
            let indices = if group % 2 == 0 {
                indices
            } else {
                _mm512_srli_epi16::<4>(indices)
            };
            let table = nibble_table(0.0, step, min);
            lines.put(GROUPS * i + group, _mm512_permutexvar_epi16(indices, table));
        }
    }
}

/// Defines for each format an unpacking of spans from the one of 32 weights that AVX-512 has.
macro_rules! unpackings {
    ($($name:ident: $block:ident, $convert:ident, $unpack:path;)*) => {
        $(
            #[inline]
            #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
            #[allow(clippy::modulo_one, reason = "formats with one group a block")]
            fn $name(row: &[quant::$block], k: Range<usize>, mut lines: Lines) {
                const GROUPS: usize = quant::$block::LEN / BF16_LEN;
                for (j, k) in k.enumerate() {
                    lines.put(j, $convert($unpack(&row[k / GROUPS], k % GROUPS)));
                }
            }
        )*
    };
}

unpackings! {
    unpack_q5_0: BlockQ5_0, small, avx512::gemm_q5_0::unpack;
    unpack_q8_0: BlockQ8_0, wide, avx512::gemm_q8_0::unpack;
    unpack_q5_k: BlockQ5K, unsigned, avx512::gemm_q5_k::unpack;
    unpack_q6_k: BlockQ6K, wide, avx512::gemm_q6_k::unpack;
}

/// Formats without an unpacking of their own: dequantized as anywhere, then rounded.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn unpack_any<B: Block>(row: &[B], k: Range<usize>, mut lines: Lines) {
    let mut floats = [[[0.0; 16]; 2]; SPAN];
    let flat = floats.as_flattened_mut().as_flattened_mut();
    let span = k.start * BF16_LEN / B::LEN..k.end * BF16_LEN / B::LEN;
    for (block, out) in row[span].iter().zip(flat.chunks_exact_mut(B::LEN)) {
        block.dequantize(out);
    }
    for (j, floats) in floats[..k.len()].iter().enumerate() {
        let [low, high] = floats.each_ref().map(|x| _mm512_castsi512_ps(load(x)));
        lines.put(j, to_bf16(low, high));
    }
}

/// Defines the kernels of each format: of one matrix, and of two that a gated unit joins.
macro_rules! rows {
    ($($name:ident $gated:ident: $block:ident, $unpack:expr;)*) => {
        $(
            /// `y[t, r] = sum_k w[r, k] x[t, k]`.
            #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
            pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
                gemm::<quant::$block>(w, x, y, |row, k, lines| $unpack(row, k, lines));
            }

            /// See [`GatedRows`].
            #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
            pub(crate) fn $gated(rows: &mut GatedRows) {
                gated::<quant::$block>(rows, |row, k, lines| $unpack(row, k, lines));
            }
        )*
    };
}

rows! {
    q4_0 gated_q4_0: BlockQ4_0, unpack_q4_0;
    q4_1 gated_q4_1: BlockQ4_1, unpack_q4_1;
    q5_0 gated_q5_0: BlockQ5_0, unpack_q5_0;
    q8_0 gated_q8_0: BlockQ8_0, unpack_q8_0;
    q4_k gated_q4_k: BlockQ4K, unpack_q4_k;
    q5_k gated_q5_k: BlockQ5K, unpack_q5_k;
    q6_k gated_q6_k: BlockQ6K, unpack_q6_k;
    bf16 gated_bf16: BlockBF16, unpack_any;
    q5_1 gated_q5_1: BlockQ5_1, unpack_any;
    q2_k gated_q2_k: BlockQ2K, unpack_any;
    q3_k gated_q3_k: BlockQ3K, unpack_any;
    iq4_nl gated_iq4_nl: BlockIQ4NL, unpack_any;
    iq4_xs gated_iq4_xs: BlockIQ4XS, unpack_any;
    tq1_0 gated_tq1_0: BlockTQ1_0, unpack_any;
    tq2_0 gated_tq2_0: BlockTQ2_0, unpack_any;
    mxfp4 gated_mxfp4: BlockMXFP4, unpack_any;
}
