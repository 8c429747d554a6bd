//! GEMM in bf16 tiles: `sums` (rows, tokens) `= W X`, 32 rows by 32 tokens in registers.
//!
//! 256 weights of each row, a super-block, are unpacked at a time into tiles that stay in the second-level cache for
//! all tokens; 32 tokens of as many activations stay in the first. Sums wait in memory between these spans of 256 and
//! are turned at the end. Weights and activations are rounded to 8 bits of precision, a few times finer than 8-bit
//! blocks; scales are in the weights, so no sum is touched between products. Tried instead, int8 tiles with block
//! scales outside: a store and a multiplication for each 32 products, 0.41 T products/s of a core where this reaches 0.9.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::{Tiles, load, store, to_bf16, transpose};
use crate::backend::cpu::acts::{Acts, BF16_LEN, BF16_TOKENS, Tile};
use crate::backend::cpu::avx512vnni::{self as avx512, gemm::Scales};
use crate::backend::cpu::pool::OutCols;
use crate::quant::{self, Block, blocks};

/// Tiles along a row that are unpacked at a time: 256 weights.
const SPAN: usize = 8;

/// Weight rows of two tiles.
const ROWS: usize = 32;

/// Tokens whose sums wait in memory together: with 256 rows half a megabyte.
const TOKENS: usize = 512;

/// Unpacked weights and waiting sums: kept from call to call, so that steady work allocates nothing.
#[derive(Default)]
struct Space {
    /// `(pairs of rows, k)`.
    weights: Vec<[Tile; 2]>,
    /// `(groups of tokens, pairs of rows)`, each rows by tokens.
    sums: Vec<[Tile; 4]>,
}

thread_local! {
    static SPACE: RefCell<Space> = RefCell::default();
}

/// The loops of a GEMM. `unpack` writes tiles `k` of a row of blocks, a line of 32 weights each.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn gemm<B: Block>(
    w: &[u8],
    x: &Acts,
    y: &mut OutCols,
    unpack: impl Fn(&[B], Range<usize>, &mut [[u8; 64]; SPAN]),
) {
    let n_k = x.n_in / BF16_LEN;
    let n_rows = y.n_cols();
    let n_pairs = n_rows.div_ceil(ROWS);
    let w = blocks::<B>(w);
    let row_blocks = x.n_in / B::LEN;
    SPACE.with_borrow_mut(|space| {
        let empty = Tile([[0; 64]; 16]);
        let n_sums = n_pairs * x.n_tokens.min(TOKENS).div_ceil(BF16_TOKENS);
        if space.weights.len() < n_pairs * SPAN {
            space.weights.resize(n_pairs * SPAN, [empty; 2]);
        }
        if space.sums.len() < n_sums {
            space.sums.resize(n_sums, [empty; 4]);
        }
        let tiles = Tiles::configure();
        for first_token in (0..x.n_tokens).step_by(TOKENS) {
            let n_tokens = TOKENS.min(x.n_tokens - first_token);
            for first in (0..n_k).step_by(SPAN) {
                let k = first..(first + SPAN).min(n_k);
                let weights = &mut space.weights[..n_pairs * k.len()];
                for (i, weights) in weights.chunks_exact_mut(k.len()).enumerate() {
                    for row in 0..ROWS {
                        let mut lines = [[0; 64]; SPAN];
                        if i * ROWS + row < n_rows {
                            let row = &w[(i * ROWS + row) * row_blocks..][..row_blocks];
                            unpack(row, k.clone(), &mut lines);
                        }
                        for j in 0..k.len() {
                            weights[j][row / 16].0[row % 16] = lines[j];
                        }
                    }
                }
                let groups = space.sums.chunks_exact_mut(n_pairs);
                for (group, sums) in (0..n_tokens.div_ceil(BF16_TOKENS)).zip(groups) {
                    let x = x.bf16_group(first_token / BF16_TOKENS + group);
                    let x = &x[k.clone()];
                    let half = n_tokens - group * BF16_TOKENS <= BF16_TOKENS / 2;
                    for (weights, sums) in weights.chunks_exact(k.len()).zip(sums) {
                        if half {
                            tiles.multiply_first(weights, x, sums, first == 0);
                        } else {
                            tiles.multiply(weights, x, sums, first == 0);
                        }
                    }
                }
            }
            let groups = space.sums.chunks_exact(n_pairs);
            for (group, sums) in (0..n_tokens.div_ceil(BF16_TOKENS)).zip(groups) {
                for (pair, sums) in sums.iter().enumerate() {
                    for (i, sums) in sums.iter().enumerate() {
                        let token = group * BF16_TOKENS + i % 2 * 16;
                        let tokens = token..(token + 16).min(n_tokens);
                        let row = pair * ROWS + i / 2 * 16;
                        let rows = row..(row + 16).min(n_rows);
                        if !tokens.is_empty() && !rows.is_empty() {
                            write(sums, y, first_token + tokens.start, tokens.len(), rows);
                        }
                    }
                }
            }
        }
    });
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

/// Rows of formats that AVX-512 unpacks too: 32 weights at a time.
macro_rules! rows {
    ($($name:ident: $block:ident, $convert:ident, $unpack:path;)*) => {
        $(
            /// `y[t, r] = sum_k w[r, k] x[t, k]`.
            #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
            #[allow(clippy::modulo_one, reason = "formats with one group a block")]
            pub(crate) fn $name(w: &[u8], x: &Acts, y: &mut OutCols) {
                const GROUPS: usize = quant::$block::LEN / BF16_LEN;
                gemm::<quant::$block>(w, x, y, |row, k, lines| {
                    for (k, line) in k.zip(lines) {
                        store($convert($unpack(&row[k / GROUPS], k % GROUPS)), line);
                    }
                });
            }
        )*
    };
}

rows! {
    q4_0: BlockQ4_0, small, avx512::gemm_q4_0::unpack;
    q4_1: BlockQ4_1, small, avx512::gemm_q4_1::unpack;
    q5_0: BlockQ5_0, small, avx512::gemm_q5_0::unpack;
    q8_0: BlockQ8_0, wide, avx512::gemm_q8_0::unpack;
    q4_k: BlockQ4K, small, avx512::gemm_q4_k::unpack;
    q5_k: BlockQ5K, unsigned, avx512::gemm_q5_k::unpack;
    q6_k: BlockQ6K, wide, avx512::gemm_q6_k::unpack;
}

/// Formats without an unpacking of their own: dequantized as anywhere, then rounded.
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn any<B: Block>(w: &[u8], x: &Acts, y: &mut OutCols) {
    gemm::<B>(w, x, y, |row, k, lines| {
        let mut floats = [[[0.0; 16]; 2]; SPAN];
        let flat = floats.as_flattened_mut().as_flattened_mut();
        let span = k.start * BF16_LEN / B::LEN..k.end * BF16_LEN / B::LEN;
        for (block, out) in row[span].iter().zip(flat.chunks_exact_mut(B::LEN)) {
            block.dequantize(out);
        }
        for (floats, line) in floats[..k.len()].iter().zip(lines) {
            let [low, high] = floats.each_ref().map(|x| _mm512_castsi512_ps(load(x)));
            store(to_bf16(low, high), line);
        }
    });
}
