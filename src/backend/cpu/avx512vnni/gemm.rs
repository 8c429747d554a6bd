//! GEMM over quantized weights: 32 rows by six tokens in registers.
//!
//! The rows are unpacked once into panels of 16: the lanes of a vector are rows, each with four adjacent weights as
//! signed bytes, so a sum needs no folding and a scale vector serves all tokens. `vpdpbusd` takes the activations plus
//! 128 as its unsigned side; the sums start from `-128 sum(w)`. Scales are applied once per block, outside the dot.

use std::arch::x86_64::*;
use std::cell::RefCell;

use super::{load, load256};
use crate::backend::cpu::acts::{Acts, Q8_LEN};
pub(in crate::backend::cpu) use crate::backend::cpu::avx2::gemm::Scales;
use crate::backend::cpu::avx2::unpack;
use crate::backend::cpu::pool::OutCols;
use crate::quant::{self, Block, blocks};

/// Rows of two panels.
pub(super) const ROWS: usize = 32;

/// Tokens whose sums fit in registers, twice: whole and of the running block.
const TOKENS: usize = 6;

/// 32 weights of each of 32 rows.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Unit {
    /// Weights 4i to 4i + 3 of the 16 rows of each panel.
    q: [[[i8; 64]; 2]; 8],
    /// -128 times the sum of the weights that share a scale.
    start: [[[i32; 16]; 2]; 2],
    /// Scales: of all 32 weights, or of the first and the last 16.
    d: [[[f32; 16]; 2]; 2],
    /// Minima.
    m: [[f32; 16]; 2],
}

const EMPTY: Unit = Unit {
    q: [[[0; 64]; 2]; 8],
    start: [[[0; 16]; 2]; 2],
    d: [[[0.0; 16]; 2]; 2],
    m: [[0.0; 16]; 2],
};

thread_local! {
    /// The unpacked rows: kept from call to call, so that steady work allocates nothing.
    static UNITS: RefCell<Vec<Unit>> = const { RefCell::new(Vec::new()) };
}

/// The loops of a GEMM. `unpack` gives 32 weights and their scales; `HALVES` is 2 where 16 weights share a scale.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn gemm<B: Block, const HALVES: usize, const MIN: bool>(
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
                        let mut q = [_mm256_setzero_si256(); 16];
                        for (lane, q) in q.iter_mut().enumerate() {
                            let row = panel * 16 + lane;
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
            let mut t = 0;
            while t + TOKENS <= x.n_tokens {
                tile::<TOKENS, HALVES, MIN>(units, x, t, y, first..first + n_rows);
                t += TOKENS;
            }
            match x.n_tokens - t {
                1 => tile::<1, HALVES, MIN>(units, x, t, y, first..first + n_rows),
                2 => tile::<2, HALVES, MIN>(units, x, t, y, first..first + n_rows),
                3 => tile::<3, HALVES, MIN>(units, x, t, y, first..first + n_rows),
                4 => tile::<4, HALVES, MIN>(units, x, t, y, first..first + n_rows),
                5 => tile::<5, HALVES, MIN>(units, x, t, y, first..first + n_rows),
                _ => {}
            }
        }
    });
}

/// Turns 16 rows of 32 weights into eight vectors of 16 rows.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn place<const HALVES: usize>(unit: &mut Unit, panel: usize, rows: [__m256i; 16]) {
    // Vectors of rows i and i + 4: of each, weights 0..16 and 16..32.
    let pair = |i: usize| {
        let low = _mm512_castsi256_si512(rows[i]);
        _mm512_inserti64x4::<1>(low, rows[i + 4])
    };
    // Of four such pairs, weights 4i.. and 16 + 4i.. of four rows in each run of four lanes.
    let turn = |a, b, c, d| {
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab_low, cd_low),
            _mm512_unpackhi_epi64(ab_low, cd_low),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    };
    let low = turn(pair(0), pair(1), pair(2), pair(3));
    let high = turn(pair(8), pair(9), pair(10), pair(11));
    let mut sums = [_mm512_setzero_si512(); 2];
    let ones = _mm512_set1_epi8(1);
    for i in 0..4 {
        let first = _mm512_shuffle_i32x4::<0b10_00_10_00>(low[i], high[i]);
        let last = _mm512_shuffle_i32x4::<0b11_01_11_01>(low[i], high[i]);
        super::store(first, &mut unit.q[i][panel]);
        super::store(last, &mut unit.q[i + 4][panel]);
        sums[0] = _mm512_dpbusd_epi32(sums[0], ones, first);
        sums[HALVES - 1] = _mm512_dpbusd_epi32(sums[HALVES - 1], ones, last);
    }
    for (sum, start) in sums.into_iter().zip(&mut unit.start).take(HALVES) {
        let sum = _mm512_slli_epi32::<7>(sum);
        super::store(
            _mm512_sub_epi32(_mm512_setzero_si512(), sum),
            &mut start[panel],
        );
    }
}

/// `T` tokens from `token` on, by the rows of two panels.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tile<const T: usize, const HALVES: usize, const MIN: bool>(
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
        x[t] = &bytemuck::cast_slice(row.u)[..n];
        d[t] = &row.d[..n];
        s[t] = &row.s[..n];
    }
    let mut sums = [[_mm512_setzero_ps(); 2]; T];
    for (i, unit) in units.iter().enumerate() {
        for half in 0..HALVES {
            let mut dots = [[load(&unit.start[half][0]), load(&unit.start[half][1])]; T];
            for k in half * 4..half * 4 + 8 / HALVES {
                let w = [load(&unit.q[k][0]), load(&unit.q[k][1])];
                for (dots, x) in dots.iter_mut().zip(x) {
                    let x = _mm512_set1_epi32(i32::from_le_bytes(x[i][k]));
                    for (dot, w) in dots.iter_mut().zip(w) {
                        *dot = _mm512_dpbusd_epi32(*dot, x, w);
                    }
                }
            }
            for ((sums, dots), d) in sums.iter_mut().zip(dots).zip(d) {
                let d = _mm512_set1_ps(d[i]);
                for ((sum, dot), scale) in sums.iter_mut().zip(dots).zip(&unit.d[half]) {
                    let scale = _mm512_mul_ps(super::floats::load(scale), d);
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, *sum);
                }
            }
        }
        if MIN {
            for (sums, s) in sums.iter_mut().zip(s) {
                let s = _mm512_set1_ps(s[i]);
                for (sum, m) in sums.iter_mut().zip(&unit.m) {
                    *sum = _mm512_fmadd_ps(super::floats::load(m), s, *sum);
                }
            }
        }
    }
    for (t, sums) in sums.iter().enumerate() {
        let out = &mut y.row(token + t)[cols.clone()];
        if let Ok(out) = <&mut [f32; ROWS]>::try_from(&mut *out) {
            let [low, high]: &mut [[f32; 16]; 2] = bytemuck::cast_mut(out);
            super::floats::store(sums[0], low);
            super::floats::store(sums[1], high);
        } else {
            let mut all = [[0.0; 16]; 2];
            super::floats::store(sums[0], &mut all[0]);
            super::floats::store(sums[1], &mut all[1]);
            out.copy_from_slice(&all.as_flattened()[..out.len()]);
        }
    }
}

/// The float of a half float.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn float(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into())))
}

/// The 32 weights of a block of nibbles.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn nibbles32(qs: &[u8; 16]) -> __m256i {
    let x = super::load128(qs);
    let both = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(x), _mm_srli_epi16::<4>(x));
    _mm256_and_si256(both, _mm256_set1_epi8(15))
}

/// Nibbles of 32 bytes: the low ones for an even `group`, else the high ones.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn nibbles_of(qs: &[u8; 128], group: usize) -> __m256i {
    let bytes: &[[u8; 32]; 4] = bytemuck::cast_ref(qs);
    let shift = _mm_cvtsi32_si128(4 * (group as i32 % 2));
    let x = _mm256_srl_epi16(load256(&bytes[group / 2 % 4]), shift);
    _mm256_and_si256(x, _mm256_set1_epi8(15))
}

/// Defines GEMMs of formats that AVX2 unpacks.
macro_rules! unpacked {
    ($($format:ident: $block:ident, $halves:literal, $min:literal;)*) => {$(
        /// `y[t, r] = sum_k w[r, k] x[t, k]`.
        #[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni")]
        pub(crate) fn $format(w: &[u8], x: &Acts, y: &mut OutCols) {
            gemm::<quant::$block, $halves, $min>(w, x, y, |w, group| unpack::$format(w, group));
        }
    )*};
}

unpacked! {
    q5_1: BlockQ5_1, 1, true;
    q3_k: BlockQ3K, 2, false;
    iq4_nl: BlockIQ4NL, 1, false;
    iq4_xs: BlockIQ4XS, 1, false;
    mxfp4: BlockMXFP4, 1, false;
    tq2_0: BlockTQ2_0, 1, false;
}
