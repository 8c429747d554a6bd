//! Many tokens: four rows of weights are unpacked into a panel once, whose codes `sdot` multiplies with four activations
//! of a token at a time. The four lanes of a sum are four rows, so that nothing is added across lanes.

use std::arch::aarch64::*;

use bytemuck::Zeroable;

use super::sdot_lane;
use crate::backend::cpu::acts::{Acts, Q8_LEN};
use crate::backend::cpu::neon::{load_f32, load_i8, padded, store_f32, store_i8};
use crate::backend::cpu::pool::OutCols;

/// Rows of a panel.
const ROWS: usize = 4;

/// 32 weights of four rows: `scale * code + min`.
#[derive(Clone, Copy, Zeroable)]
#[repr(C)]
struct Group {
    /// Four adjacent codes of each row, eight times.
    codes: [[i8; 16]; 8],
    /// The scales of the rows: the second, or for formats with two scales to a group one for each 16 weights.
    scales: [[f32; ROWS]; 2],
    mins: [f32; ROWS],
}

/// Rows to columns, of numbers of four bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn transpose(x: [uint32x4_t; 4]) -> [uint32x4_t; 4] {
    let pair = |a, b| {
        let (even, odd) = (vtrn1q_u32(a, b), vtrn2q_u32(a, b));
        (vreinterpretq_u64_u32(even), vreinterpretq_u64_u32(odd))
    };
    let ((a, b), (c, d)) = (pair(x[0], x[1]), pair(x[2], x[3]));
    [
        vreinterpretq_u32_u64(vtrn1q_u64(a, c)),
        vreinterpretq_u32_u64(vtrn1q_u64(b, d)),
        vreinterpretq_u32_u64(vtrn2q_u64(a, c)),
        vreinterpretq_u32_u64(vtrn2q_u64(b, d)),
    ]
}

/// Column `i` of four rows of floats.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn columns(x: [float32x4_t; 4]) -> [float32x4_t; 4] {
    let bits = |i: usize| vreinterpretq_u32_f32(x[i]);
    let [a, b, c, d] = transpose([bits(0), bits(1), bits(2), bits(3)]);
    [
        vreinterpretq_f32_u32(a),
        vreinterpretq_f32_u32(b),
        vreinterpretq_f32_u32(c),
        vreinterpretq_f32_u32(d),
    ]
}

/// Adds the products of four times four codes of each row and 16 activations of `T` tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn add_dots<const T: usize>(
    dots: &mut [int32x4_t; T],
    codes: &[[i8; 16]; 4],
    q: &[&[[i8; 16]; 2]; T],
    half: usize,
) {
    let mut x = [vdupq_n_s8(0); T];
    for t in 0..T {
        x[t] = load_i8(&q[t][half]);
    }
    let w = load_i8(&codes[0]);
    for t in 0..T {
        dots[t] = sdot_lane::<0>(dots[t], w, x[t]);
    }
    let w = load_i8(&codes[1]);
    for t in 0..T {
        dots[t] = sdot_lane::<1>(dots[t], w, x[t]);
    }
    let w = load_i8(&codes[2]);
    for t in 0..T {
        dots[t] = sdot_lane::<2>(dots[t], w, x[t]);
    }
    let w = load_i8(&codes[3]);
    for t in 0..T {
        dots[t] = sdot_lane::<3>(dots[t], w, x[t]);
    }
}

/// The products of a panel with tokens `first..first + T`. `SPLIT`: two scales to a group; `MINS`: there are minima.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn products<const T: usize, const SPLIT: bool, const MINS: bool>(
    panel: &[Group],
    x: &Acts,
    first: usize,
) -> [float32x4_t; T] {
    let n = panel.len();
    let mut q: [&[[[i8; 16]; 2]]; T] = [&[]; T];
    let (mut d, mut s): ([&[f32]; T], [&[f32]; T]) = ([&[]; T], [&[]; T]);
    for t in 0..T {
        let row = x.q8_row(first + t);
        q[t] = &row.q.as_chunks::<16>().0.as_chunks::<2>().0[..n];
        (d[t], s[t]) = (&row.d[..n], &row.s[..n]);
    }
    let mut sums = [vdupq_n_f32(0.0); T];
    for (g, group) in panel.iter().enumerate() {
        let mut x = [&[[0; 16]; 2]; T];
        for t in 0..T {
            x[t] = &q[t][g];
        }
        let mut dots = [vdupq_n_s32(0); T];
        let [codes, codes_1]: &[[[i8; 16]; 4]; 2] = bytemuck::cast_ref(&group.codes);
        add_dots(&mut dots, codes, &x, 0);
        if SPLIT {
            let scale = load_f32(&group.scales[0]);
            for t in 0..T {
                let scale = vmulq_n_f32(scale, d[t][g]);
                sums[t] = vfmaq_f32(sums[t], vcvtq_f32_s32(dots[t]), scale);
            }
            dots = [vdupq_n_s32(0); T];
        }
        add_dots(&mut dots, codes_1, &x, 1);
        let scale = load_f32(&group.scales[1]);
        for t in 0..T {
            let scale = vmulq_n_f32(scale, d[t][g]);
            sums[t] = vfmaq_f32(sums[t], vcvtq_f32_s32(dots[t]), scale);
        }
        if MINS {
            let min = load_f32(&group.mins);
            for t in 0..T {
                sums[t] = vfmaq_n_f32(sums[t], min, s[t][g]);
            }
        }
    }
    sums
}

/// Writes columns `first..` (four, or as many as there are) of all tokens.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn multiply<const SPLIT: bool, const MINS: bool>(
    panel: &[Group],
    x: &Acts,
    first: usize,
    y: &mut OutCols,
) {
    #[inline]
    #[target_feature(enable = "neon,dotprod")]
    fn tokens<const T: usize, const SPLIT: bool, const MINS: bool>(
        panel: &[Group],
        x: &Acts,
        t: usize,
        first: usize,
        y: &mut OutCols,
    ) {
        for (i, sums) in products::<T, SPLIT, MINS>(panel, x, t)
            .into_iter()
            .enumerate()
        {
            let y = &mut y.row(t + i)[first..];
            if let Some(y) = y.first_chunk_mut::<ROWS>() {
                store_f32(y, sums);
            } else {
                let mut all = [0.0; ROWS];
                store_f32(&mut all, sums);
                y.copy_from_slice(&all[..y.len()]);
            }
        }
    }

    let mut t = 0;
    while t + 8 <= x.n_tokens {
        tokens::<8, SPLIT, MINS>(panel, x, t, first, y);
        t += 8;
    }
    while t + 4 <= x.n_tokens {
        tokens::<4, SPLIT, MINS>(panel, x, t, first, y);
        t += 4;
    }
    while t < x.n_tokens {
        tokens::<1, SPLIT, MINS>(panel, x, t, first, y);
        t += 1;
    }
}

macro_rules! gemm {
    ($($format:ident),*) => {
        $(
            /// `y[t, r] = sum_k w[r, k] x[t, k]`.
            #[target_feature(enable = "neon,dotprod")]
            pub(crate) fn $format(w: &[u8], x: &Acts, y: &mut OutCols) {
                use crate::backend::cpu::neon::$format::{
                    Block, GROUPS, MINS, OFFSET, SCALES, Unit, mins, scales, unpack,
                };

                /// Four rows of a unit.
                #[inline]
                #[target_feature(enable = "neon,dotprod")]
                fn unpack_rows(w: [&Unit; ROWS], groups: &mut [Group]) {
                    let codes = [unpack(w[0]), unpack(w[1]), unpack(w[2]), unpack(w[3])];
                    let offset = vdupq_n_s8(OFFSET as i8);
                    for (g, group) in groups.iter_mut().enumerate() {
                        for half in 0..2 {
                            let row = |r: usize| {
                                vreinterpretq_u32_s8(vsubq_s8(codes[r][g][half], offset))
                            };
                            let quads = transpose([row(0), row(1), row(2), row(3)]);
                            for (to, quad) in group.codes[4 * half..].iter_mut().zip(quads) {
                                store_i8(to, vreinterpretq_s8_u32(quad));
                            }
                        }
                    }
                    let all = [scales(w[0]), scales(w[1]), scales(w[2]), scales(w[3])];
                    for i in 0..SCALES {
                        let columns = columns([all[0][i], all[1][i], all[2][i], all[3][i]]);
                        for (j, scales) in columns.into_iter().enumerate() {
                            let at = 4 * i + j;
                            if SCALES * 4 == GROUPS {
                                if let Some(group) = groups.get_mut(at) {
                                    store_f32(&mut group.scales[1], scales);
                                }
                            } else if let Some(group) = groups.get_mut(at / 2) {
                                store_f32(&mut group.scales[at % 2], scales);
                            }
                        }
                    }
                    let all = [mins(w[0]), mins(w[1]), mins(w[2]), mins(w[3])];
                    let [a, b, c, d] = &all;
                    for (i, (((a, b), c), d)) in a.iter().zip(b).zip(c).zip(d).enumerate() {
                        let columns = columns([*a, *b, *c, *d]);
                        for (group, mins) in groups.iter_mut().skip(4 * i).zip(columns) {
                            store_f32(&mut group.mins, mins);
                        }
                    }
                }

                const BLOCKS: usize = size_of::<Unit>() / size_of::<Block>();
                const SPLIT: bool = SCALES * 4 != GROUPS;
                let n_blocks = x.n_in / <Block as crate::quant::Block>::LEN;
                let mut panel = vec![Group::zeroed(); x.n_in / Q8_LEN];
                let w = crate::quant::blocks::<Block>(w);
                for (i, w) in w.chunks(ROWS * n_blocks).enumerate() {
                    // Rows that are not there: any will do.
                    let row = |r: usize| w.get(r * n_blocks..).filter(|w| !w.is_empty()).unwrap_or(w);
                    let rows = [0, 1, 2, 3].map(|r| row(r)[..n_blocks].as_chunks::<BLOCKS>());
                    let (groups, last) = panel.as_chunks_mut::<GROUPS>();
                    for (u, groups) in groups.iter_mut().enumerate() {
                        unpack_rows(rows.map(|row| &row.0[u]), groups);
                    }
                    if !last.is_empty() {
                        let units: [Unit; ROWS] = rows.map(|row| padded(row.1));
                        unpack_rows(units.each_ref(), last);
                    }
                    multiply::<SPLIT, { MINS > 0 }>(&panel, x, i * ROWS, y);
                }
            }
        )*
    };
}

gemm!(q4_0, q4_1, q5_0, q8_0, q4_k, q5_k, q6_k);
