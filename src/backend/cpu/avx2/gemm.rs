//! GEMM over quantized weights: 16 rows by four tokens in registers.
//!
//! The rows are unpacked once into panels of 8: the lanes of a vector are rows, each with four adjacent weights as
//! signed bytes, so a sum needs no folding and a scale vector serves all tokens. `maddubs` takes the activations plus
//! 128 as its unsigned side; `-128 sum(w)` is added to the sums. Where `|w|` leaves room, several pair sums are added in
//! 16 bits before they are widened. Scales are applied once per block, outside the dot.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::hint::black_box;

use super::{floats, load};
use crate::backend::cpu::acts::{Acts, Q8_LEN};
use crate::backend::cpu::pool::OutCols;
use crate::quant::{self, Block, blocks};

/// Rows of two panels.
const ROWS: usize = 16;

/// Tokens whose running 16-bit sums fit in registers.
const TOKENS: usize = 4;

/// 32 weights of each of 16 rows.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
struct Unit {
    /// Weights 4i to 4i + 3 of the 8 rows of each panel.
    q: [[[i8; 32]; 2]; 8],
    /// -128 times the sum of the weights that share a scale.
    start: [[[i32; 8]; 2]; 2],
    /// Scales: of all 32 weights, or of the first and the last 16.
    d: [[[f32; 8]; 2]; 2],
    /// Minima.
    m: [[f32; 8]; 2],
}

const EMPTY: Unit = Unit {
    q: [[[0; 32]; 2]; 8],
    start: [[[0; 8]; 2]; 2],
    d: [[[0.0; 8]; 2]; 2],
    m: [[0.0; 8]; 2],
};

thread_local! {
    /// The unpacked rows: kept from call to call, so that steady work allocates nothing.
    static UNITS: RefCell<Vec<Unit>> = const { RefCell::new(Vec::new()) };
}

/// Scale and minimum of each row of a unit, before they are put in place.
pub(in crate::backend::cpu) struct Scales {
    pub(in crate::backend::cpu) d: [f32; 2],
    pub(in crate::backend::cpu) m: f32,
}

/// The loops of a GEMM. `unpack` gives 32 weights and their scales; `HALVES` is 2 where 16 weights share a scale.
/// `CHAIN` pair sums stay in 16 bits: `CHAIN * 2 * 255 * max|w| <= 32767`; 0 if not even one does, then the sign of the
/// weights moves to the signed activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn gemm<B: Block, const HALVES: usize, const MIN: bool, const CHAIN: usize>(
    w: &[u8],
    x: &Acts,
    y: &mut OutCols,
    unpack: impl Fn(&B, usize) -> (__m256i, Scales),
) {
    let n_blocks = x.n_in / B::LEN;
    let groups = B::LEN / Q8_LEN;
    let w = blocks::<B>(w);
    UNITS.with_borrow_mut(|units| {
        if units.len() < n_blocks * groups {
            units.resize(n_blocks * groups, EMPTY);
        }
        let units = &mut units[..n_blocks * groups];
        for first in (0..y.n_cols()).step_by(ROWS) {
            let n_rows = ROWS.min(y.n_cols() - first);
            let rows = &w[first * n_blocks..(first + n_rows) * n_blocks];
            for (i, units) in units.chunks_exact_mut(groups).enumerate() {
                for (group, unit) in units.iter_mut().enumerate() {
                    for panel in 0..2 {
                        let mut q = [_mm256_setzero_si256(); 8];
                        for (lane, q) in q.iter_mut().enumerate() {
                            let row = panel * 8 + lane;
                            let mut scales = Scales {
                                d: [0.0; 2],
                                m: 0.0,
                            };
                            if row < n_rows {
                                (*q, scales) = unpack(&rows[row * n_blocks + i], group);
                            }
                            for half in 0..HALVES {
                                unit.d[half][panel][lane] = scales.d[half];
                            }
                            if MIN {
                                unit.m[panel][lane] = scales.m;
                            }
                        }
                        place::<HALVES>(unit, panel, q);
                    }
                }
            }
            let cols = first..first + n_rows;
            let mut t = 0;
            while t + TOKENS <= x.n_tokens {
                tile::<TOKENS, HALVES, MIN, CHAIN>(units, x, t, y, cols.clone());
                t += TOKENS;
            }
            match x.n_tokens - t {
                1 => tile::<1, HALVES, MIN, CHAIN>(units, x, t, y, cols),
                2 => tile::<2, HALVES, MIN, CHAIN>(units, x, t, y, cols),
                3 => tile::<3, HALVES, MIN, CHAIN>(units, x, t, y, cols),
                _ => {}
            }
        }
    });
}

/// Turns 8 rows of 32 weights into eight vectors of 8 rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn place<const HALVES: usize>(unit: &mut Unit, panel: usize, rows: [__m256i; 8]) {
    // Weights 4i.. of four rows in the lower lanes, 16 + 4i.. in the upper.
    let turn = |a, b, c, d| {
        let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab_low, cd_low),
            _mm256_unpackhi_epi64(ab_low, cd_low),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    };
    let low = turn(rows[0], rows[1], rows[2], rows[3]);
    let high = turn(rows[4], rows[5], rows[6], rows[7]);
    let mut sums = [_mm256_setzero_si256(); 2];
    let sum4 = |w| {
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), w);
        _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))
    };
    for i in 0..4 {
        let first = _mm256_permute2x128_si256::<0x20>(low[i], high[i]);
        let last = _mm256_permute2x128_si256::<0x31>(low[i], high[i]);
        super::store(first, &mut unit.q[i][panel]);
        super::store(last, &mut unit.q[i + 4][panel]);
        sums[0] = _mm256_add_epi32(sums[0], sum4(first));
        sums[HALVES - 1] = _mm256_add_epi32(sums[HALVES - 1], sum4(last));
    }
    for (sum, start) in sums.into_iter().zip(&mut unit.start).take(HALVES) {
        let sum = _mm256_slli_epi32::<7>(sum);
        super::store(
            _mm256_sub_epi32(_mm256_setzero_si256(), sum),
            &mut start[panel],
        );
    }
}

/// `T` tokens from `token` on, by the rows of two panels.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<const T: usize, const HALVES: usize, const MIN: bool, const CHAIN: usize>(
    units: &[Unit],
    x: &Acts,
    token: usize,
    y: &mut OutCols,
    cols: std::ops::Range<usize>,
) {
    let n = units.len();
    // Plain loops: closures and iterator adaptors that are not inlined cost as much as a block.
    let acts = x;
    let mut x: [&[[[u8; 4]; 8]]; T] = [&[]; T];
    let (mut d, mut s): ([&[f32]; T], [&[f32]; T]) = ([&[]; T], [&[]; T]);
    for t in 0..T {
        let row = acts.q8_row(token + t);
        let values = if CHAIN == 0 {
            bytemuck::cast_slice(row.q)
        } else {
            row.u
        };
        x[t] = &bytemuck::cast_slice(values)[..n];
        d[t] = &row.d[..n];
        s[t] = &row.s[..n];
    }
    let length = const { if CHAIN == 0 { 1 } else { CHAIN } };
    // A long chain of unknown length stays a loop; unrolled, it is rearranged until its sums spill.
    let chain = if CHAIN >= 4 {
        black_box(length)
    } else {
        length
    };
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[floats::splat(0.0); 2]; T];
    for (i, unit) in units.iter().enumerate() {
        let mut blocks = [&[[0; 4]; 8]; T];
        for (block, x) in blocks.iter_mut().zip(x) {
            *block = &x[i];
        }
        let x = blocks;
        for half in 0..HALVES {
            let start = if CHAIN == 0 {
                [_mm256_setzero_si256(); 2]
            } else {
                [load(&unit.start[half][0]), load(&unit.start[half][1])]
            };
            let mut dots = [start; T];
            for link in 0..8 / HALVES / length {
                let first = half * 4 + link * chain;
                let mut pairs = [[_mm256_setzero_si256(); 2]; T];
                for k in first..first + chain {
                    // The mask tells the compiler what is so anyway.
                    let k = k % 8;
                    let w = [load(&unit.q[k][0]), load(&unit.q[k][1])];
                    let size = [_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])];
                    for (pairs, x) in pairs.iter_mut().zip(x) {
                        let x = _mm256_set1_epi32(i32::from_le_bytes(x[k]));
                        for ((pair, w), size) in pairs.iter_mut().zip(w).zip(size) {
                            *pair = if CHAIN == 0 {
                                _mm256_maddubs_epi16(size, _mm256_sign_epi8(x, w))
                            } else {
                                _mm256_add_epi16(*pair, _mm256_maddubs_epi16(x, w))
                            };
                        }
                    }
                }
                for (dots, pairs) in dots.iter_mut().zip(pairs) {
                    for (dot, pair) in dots.iter_mut().zip(pairs) {
                        *dot = _mm256_add_epi32(*dot, _mm256_madd_epi16(pair, ones));
                    }
                }
            }
            for ((sums, dots), d) in sums.iter_mut().zip(dots).zip(d) {
                let d = floats::splat(d[i]);
                for ((sum, dot), scale) in sums.iter_mut().zip(dots).zip(&unit.d[half]) {
                    let scale = floats::mul(floats::load(scale), d);
                    *sum = floats::fma(_mm256_cvtepi32_ps(dot), scale, *sum);
                }
            }
        }
        if MIN {
            for (sums, s) in sums.iter_mut().zip(s) {
                let s = floats::splat(s[i]);
                for (sum, m) in sums.iter_mut().zip(&unit.m) {
                    *sum = floats::fma(floats::load(m), s, *sum);
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        let out = &mut y.row(token + t)[cols.clone()];
        if let Ok(out) = <&mut [f32; ROWS]>::try_from(&mut *out) {
            let [low, high]: &mut [[f32; 8]; 2] = bytemuck::cast_mut(out);
            super::floats::store(sums[0], low);
            super::floats::store(sums[1], high);
        } else {
            let mut all = [[0.0; 8]; 2];
            super::floats::store(sums[0], &mut all[0]);
            super::floats::store(sums[1], &mut all[1]);
            out.copy_from_slice(&all.as_flattened()[..out.len()]);
        }
    }
}

/// The float of a half float.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn float(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into())))
}

/// The 32 weights of a block of nibbles.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nibbles32(qs: &[u8; 16]) -> __m256i {
    let x = super::load128(qs);
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(x), _mm_srli_epi16::<4>(x));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Nibbles of 32 bytes: the low ones for an even `group`, else the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn nibbles_of(qs: &[u8; 128], group: usize) -> __m256i {
    let bytes: &[[u8; 32]; 4] = bytemuck::cast_ref(qs);
    let shift = _mm_cvtsi32_si128(4 * (group as i32 % 2));
    let x = _mm256_srl_epi16(load(&bytes[group / 2 % 4]), shift);
    _mm256_and_si256(x, _mm256_set1_epi8(15))
}

/// Defines GEMMs of formats that are unpacked by [`unpack`](super::unpack).
macro_rules! unpacked {
    ($($format:ident: $block:ident, $halves:literal, $min:literal, $chain:literal;)*) => {$(
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = "avx2,fma,f16c")]
        pub(crate) fn $format(w: &[u8], x: &Acts, y: &mut OutCols) {
            gemm::<quant::$block, $halves, $min, $chain>(w, x, y, |w, group| {
                super::unpack::$format(w, group)
            });
        }
    )*};
}

unpacked! {
    q5_1: BlockQ5_1, 1, true, 2;
    q3_k: BlockQ3K, 2, false, 4;
    iq4_nl: BlockIQ4NL, 1, false, 0;
    iq4_xs: BlockIQ4XS, 1, false, 0;
    mxfp4: BlockMXFP4, 1, false, 4;
    tq2_0: BlockTQ2_0, 1, false, 4;
}
