//! aarch64 with NEON, the level that every such CPU has; what `neon_dotprod` shares with it.
//!
//! A format's file says how a *unit* of its blocks (4 blocks of 32 weights, or a super-block of 256) becomes 8-bit
//! codes, scales and minima, in the order of the weights:
//!
//! - `Unit`, `GROUPS`: the blocks, and the groups of 32 weights in them;
//! - `SCALES`: vectors of four scales (there may be two scales to a group);
//! - `unpack`: the codes, from which `OFFSET` is still to be subtracted;
//! - `scales`: a weight is `scale * (code - OFFSET)`;
//! - `MINS`, `mins`: vectors of four minima to be added, one to a group; most formats have none.
//!
//! From these the macros below make a GEMV for each level, and `neon_dotprod` its GEMM.
//!
//! Rows of the table that only compile scalar bodies again are not here: NEON belongs to the target, so the scalar
//! rows have it.
#![allow(
    unsafe_code,
    reason = "loads and stores through array references; no NEON load takes one"
)]

use std::arch::aarch64::*;

use bytemuck::Zeroable;

use crate::backend::cpu::acts::Q8_LEN;

pub(crate) mod attend;
pub(crate) mod elementwise;
pub(crate) mod gemv;
pub(crate) mod gemv_float;
pub(crate) mod q4_0;
pub(crate) mod q4_1;
pub(crate) mod q4_k;
pub(crate) mod q5_0;
pub(crate) mod q5_k;
pub(crate) mod q6_k;
pub(crate) mod q8_0;
pub(crate) mod roofline;

/// Defines, for the level with `$features`, a GEMV per `$format`: `y[t, r] = sum_k w[r, k] x[t, k]`. The file has
/// `dot16` and `dot32` in scope.
///
/// Rows are taken four at a time: they share the loads of the activations. A last unit that is not full reaches back
/// over blocks that are done already, whose activations get the scale 0; where there is nothing to reach back to, it is
/// filled up with zeros.
///
/// Here and in the formats' files: no `map` where it is hot, since it may stay a call, with the vectors in memory.
macro_rules! gemv_rows {
    ($features:literal: $($format:ident),*) => {
        #[inline]
        #[target_feature(enable = $features)]
        fn dots<const GROUPS: usize, const SCALES: usize>(
            w: [[std::arch::aarch64::int8x16_t; 2]; GROUPS],
            x: &crate::backend::cpu::neon::UnitActs<GROUPS, SCALES>,
        ) -> [std::arch::aarch64::int32x4_t; SCALES] {
            use crate::backend::cpu::neon::{UnitActs, sums_of_lanes};

            let mut dots = [std::arch::aarch64::vdupq_n_s32(0); SCALES];
            for (i, dots) in dots.iter_mut().enumerate() {
                let part = |j: usize| {
                    if UnitActs::<GROUPS, SCALES>::SPLIT {
                        let (at, half) = (2 * i + j / 2, j % 2);
                        dot16(w[at][half], x.q[at][half])
                    } else {
                        dot32(w[4 * i + j], x.q[4 * i + j])
                    }
                };
                *dots = sums_of_lanes([part(0), part(1), part(2), part(3)]);
            }
            dots
        }

        $(
            /// `y[t, r] = sum_k w[r, k] x[t, k]`.
            #[target_feature(enable = $features)]
            pub(crate) fn $format(
                w: &[u8],
                x: &crate::backend::cpu::acts::Acts,
                y: &mut crate::backend::cpu::pool::OutCols,
            ) {
                use std::arch::aarch64::*;

                use crate::backend::cpu::acts::{Q8_LEN, Q8Row};
                use crate::backend::cpu::neon::$format::{
                    Block, GROUPS, OFFSET, SCALES, Unit, mins, scales, unpack,
                };
                use crate::backend::cpu::neon::{UnitActs, padded};

                #[inline]
                #[target_feature(enable = $features)]
                fn add(w: &Unit, x: &UnitActs<GROUPS, SCALES>, mut sum: float32x4_t) -> float32x4_t {
                    let dots = dots(unpack(w), x);
                    let d = scales(w);
                    for i in 0..SCALES {
                        let dot = if OFFSET == 0 {
                            dots[i]
                        } else {
                            vmlsq_s32(dots[i], x.sums[i], vdupq_n_s32(OFFSET))
                        };
                        sum = vfmaq_f32(sum, vcvtq_f32_s32(dot), vmulq_f32(d[i], x.d[i]));
                    }
                    for (min, s) in mins(w).into_iter().zip(x.s) {
                        sum = vfmaq_f32(sum, min, s);
                    }
                    sum
                }

                #[inline]
                #[target_feature(enable = $features)]
                fn products<const R: usize>(w: &[Block], x: &Q8Row) -> [f32; R] {
                    const BLOCKS: usize = size_of::<Unit>() / size_of::<Block>();
                    let n_blocks = w.len() / R;
                    let (q, q_rest) = x.q.as_chunks::<Q8_LEN>().0.as_chunks::<GROUPS>();
                    let (d, d_rest) = x.d.as_chunks::<GROUPS>();
                    let (s, s_rest) = x.s.as_chunks::<GROUPS>();
                    let rows: [(&[Unit], &[Block]); R] = std::array::from_fn(|r| {
                        let (units, rest) = w[r * n_blocks..][..n_blocks].as_chunks::<BLOCKS>();
                        (&units[..q.len()], rest)
                    });
                    let (d, s) = (&d[..q.len()], &s[..q.len()]);
                    let mut sums = [vdupq_n_f32(0.0); R];
                    for i in 0..q.len() {
                        let x = UnitActs::new(&q[i], &d[i], &s[i]);
                        for r in 0..R {
                            sums[r] = add(&rows[r].0[i], &x, sums[r]);
                        }
                    }
                    let n_rest = q_rest.len();
                    if n_rest > 0 && n_blocks >= BLOCKS {
                        let (mut d, mut s) = ([0.0; GROUPS], [0.0; GROUPS]);
                        d[GROUPS - n_rest..].copy_from_slice(d_rest);
                        s[GROUPS - n_rest..].copy_from_slice(s_rest);
                        let q = x.q.as_chunks::<Q8_LEN>().0.last_chunk().expect("a unit");
                        let x = UnitActs::new(q, &d, &s);
                        for r in 0..R {
                            let w = w[..(r + 1) * n_blocks].last_chunk().expect("a unit");
                            sums[r] = add(w, &x, sums[r]);
                        }
                    } else if n_rest > 0 {
                        let x = UnitActs::new(&padded(q_rest), &padded(d_rest), &padded(s_rest));
                        for r in 0..R {
                            sums[r] = add(&padded(rows[r].1), &x, sums[r]);
                        }
                    }
                    sums.map(|sum| vaddvq_f32(sum))
                }

                let w = crate::quant::blocks::<Block>(w);
                let n_blocks = x.n_in / <Block as crate::quant::Block>::LEN;
                for t in 0..x.n_tokens {
                    let x = x.q8_row(t);
                    let (fours, rest) = y.row(t).as_chunks_mut::<4>();
                    let (w, w_rest) = w.split_at(4 * n_blocks * fours.len());
                    for (y, w) in fours.iter_mut().zip(w.chunks_exact(4 * n_blocks)) {
                        *y = products::<4>(w, &x);
                    }
                    for (y, w) in rest.iter_mut().zip(w_rest.chunks_exact(n_blocks)) {
                        [*y] = products::<1>(w, &x);
                    }
                }
            }
        )*
    };
}
pub(super) use gemv_rows;

/// 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_u8(x: &[u8; 16]) -> uint8x16_t {
    // SAFETY: reads the 16 bytes of a borrowed array.
    unsafe { vld1q_u8(x.as_ptr()) }
}

/// 16 signed bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_i8(x: &[i8; 16]) -> int8x16_t {
    // SAFETY: reads the 16 bytes of a borrowed array.
    unsafe { vld1q_s8(x.as_ptr()) }
}

/// Four floats.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn load_f32(x: &[f32; 4]) -> float32x4_t {
    // SAFETY: reads the four floats of a borrowed array.
    unsafe { vld1q_f32(x.as_ptr()) }
}

/// Eight 16-bit numbers.
#[inline]
#[target_feature(enable = "neon")]
fn load_u16(x: &[u16; 8]) -> uint16x8_t {
    // SAFETY: reads the eight numbers of a borrowed array.
    unsafe { vld1q_u16(x.as_ptr()) }
}

/// Writes 16 signed bytes.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store_i8(y: &mut [i8; 16], x: int8x16_t) {
    // SAFETY: writes the 16 bytes of an exclusively borrowed array.
    unsafe { vst1q_s8(y.as_mut_ptr(), x) }
}

/// Writes four floats.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn store_f32(y: &mut [f32; 4], x: float32x4_t) {
    // SAFETY: writes the four floats of an exclusively borrowed array.
    unsafe { vst1q_f32(y.as_mut_ptr(), x) }
}

/// Writes four 16-bit numbers.
#[inline]
#[target_feature(enable = "neon")]
fn store_u16(y: &mut [u16; 4], x: uint16x4_t) {
    // SAFETY: writes the four numbers of an exclusively borrowed array.
    unsafe { vst1_u16(y.as_mut_ptr(), x) }
}

/// Four 16-bit numbers from four places.
#[inline]
#[target_feature(enable = "neon")]
fn gather_u16(x: [&u16; 4]) -> uint16x4_t {
    // SAFETY: each load reads one borrowed number.
    unsafe {
        let gathered = vld1_dup_u16(x[0]);
        let gathered = vld1_lane_u16::<1>(x[1], gathered);
        let gathered = vld1_lane_u16::<2>(x[2], gathered);
        vld1_lane_u16::<3>(x[3], gathered)
    }
}

/// Half floats to floats.
#[inline]
#[target_feature(enable = "neon")]
fn halves(bits: uint16x4_t) -> float32x4_t {
    vcvt_f32_f16(vreinterpret_f16_u16(bits))
}

/// A half float in all lanes.
#[inline]
#[target_feature(enable = "neon")]
fn splat_half(bits: u16) -> float32x4_t {
    halves(vdup_n_u16(bits))
}

/// The low and the high nibbles of bytes.
#[inline]
#[target_feature(enable = "neon")]
fn nibbles(x: &[u8; 16]) -> [uint8x16_t; 2] {
    let x = load_u8(x);
    [vandq_u8(x, vdupq_n_u8(15)), vshrq_n_u8::<4>(x)]
}

/// Sixteen signed bytes as floats.
#[inline]
#[target_feature(enable = "neon")]
fn floats(x: int8x16_t) -> [float32x4_t; 4] {
    let (low, high) = (vmovl_s8(vget_low_s8(x)), vmovl_high_s8(x));
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
        vcvtq_f32_s32(vmovl_high_s16(low)),
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
        vcvtq_f32_s32(vmovl_high_s16(high)),
    ]
}

/// The sums of the lanes of four vectors.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn sums_of_lanes(x: [int32x4_t; 4]) -> int32x4_t {
    vpaddq_s32(vpaddq_s32(x[0], x[1]), vpaddq_s32(x[2], x[3]))
}

/// Products of 32 codes and activations in four partial sums. Exact for codes in -128..=127 and activations in
/// -127..=127: two products stay below 2^15.
#[inline]
#[target_feature(enable = "neon")]
fn dot32(w: [int8x16_t; 2], x: [int8x16_t; 2]) -> int32x4_t {
    let low = vmull_s8(vget_low_s8(w[0]), vget_low_s8(x[0]));
    let low = vmlal_s8(low, vget_low_s8(w[1]), vget_low_s8(x[1]));
    let high = vmull_high_s8(w[0], x[0]);
    let high = vmlal_high_s8(high, w[1], x[1]);
    vpadalq_s16(vpaddlq_s16(low), high)
}

/// Products of 16 codes and activations in four partial sums. Exact as `dot32` is.
#[inline]
#[target_feature(enable = "neon")]
fn dot16(w: int8x16_t, x: int8x16_t) -> int32x4_t {
    let products = vmull_s8(vget_low_s8(w), vget_low_s8(x));
    vpaddlq_s16(vmlal_high_s8(products, w, x))
}

/// The sum of 16 bytes in four partial sums.
#[inline]
#[target_feature(enable = "neon")]
fn sum16(x: int8x16_t) -> int32x4_t {
    vpaddlq_s16(vpaddlq_s8(x))
}

/// Each lane twice.
#[inline]
#[target_feature(enable = "neon")]
fn each_twice(x: float32x4_t) -> [float32x4_t; 2] {
    [vzip1q_f32(x, x), vzip2q_f32(x, x)]
}

/// The activations that meet a unit: `GROUPS` groups of 32, `SCALES` vectors of four scales.
#[derive(Clone, Copy)]
pub(super) struct UnitActs<const GROUPS: usize, const SCALES: usize> {
    /// The codes.
    pub q: [[int8x16_t; 2]; GROUPS],
    /// What each scale of the weights is multiplied with.
    pub d: [float32x4_t; SCALES],
    /// What each minimum is multiplied with; of use where a group has one scale.
    pub s: [float32x4_t; SCALES],
    /// The sum of the codes that share a scale.
    pub sums: [int32x4_t; SCALES],
}

impl<const GROUPS: usize, const SCALES: usize> UnitActs<GROUPS, SCALES> {
    /// Whether a group has two scales.
    pub const SPLIT: bool = SCALES * 2 == GROUPS;

    #[inline]
    #[target_feature(enable = "neon")]
    pub fn new(q: &[[i8; Q8_LEN]; GROUPS], d: &[f32; GROUPS], s: &[f32; GROUPS]) -> Self {
        let zero = vdupq_n_f32(0.0);
        let mut acts = Self {
            q: [[vdupq_n_s8(0); 2]; GROUPS],
            d: [zero; SCALES],
            s: [zero; SCALES],
            sums: [vdupq_n_s32(0); SCALES],
        };
        for (to, q) in acts.q.iter_mut().zip(q) {
            let [a, b] = bytemuck::cast_ref::<_, [[i8; 16]; 2]>(q);
            *to = [load_i8(a), load_i8(b)];
        }
        let (d, s) = (d.as_chunks::<4>().0, s.as_chunks::<4>().0);
        for i in 0..SCALES {
            let sum = |j: usize| {
                if Self::SPLIT {
                    sum16(acts.q[2 * i + j / 2][j % 2])
                } else {
                    let [a, b] = acts.q[4 * i + j];
                    vaddq_s32(sum16(a), sum16(b))
                }
            };
            acts.sums[i] = sums_of_lanes([sum(0), sum(1), sum(2), sum(3)]);
            if Self::SPLIT {
                acts.d[i] = each_twice(load_f32(&d[i / 2]))[i % 2];
            } else {
                acts.d[i] = load_f32(&d[i]);
                acts.s[i] = load_f32(&s[i]);
            }
        }
        acts
    }
}

/// `x`, and zeros up to the length `N`.
#[inline]
pub(super) fn padded<T: Zeroable + Copy, const N: usize>(x: &[T]) -> [T; N] {
    let mut padded = [T::zeroed(); N];
    padded[..x.len()].copy_from_slice(x);
    padded
}
