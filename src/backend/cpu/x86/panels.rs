//! GEMV over panels: each lane is a row.

use crate::backend::cpu::acts::Q8Row;

/// The activations that meet a packed block: `G` groups of 32.
pub(in crate::backend::cpu) struct Groups<'a, const G: usize> {
    /// Of each group two times sixteen, four to a line.
    pub q: &'a [[[[i8; 4]; 4]; 2]; G],
    /// Sums of the sixteen.
    pub n: &'a [[i32; 2]; G],
    /// Scales.
    pub d: &'a [f32; G],
    /// Scaled sums.
    pub s: &'a [f32; G],
}

/// The groups of a row, block by block.
#[inline(always)]
pub(in crate::backend::cpu) fn groups<'a, const G: usize>(
    x: &Q8Row<'a>,
) -> impl ExactSizeIterator<Item = Groups<'a, G>> {
    let q = bytemuck::cast_slice::<_, [[[i8; 4]; 4]; 2]>(x.q)
        .as_chunks::<G>()
        .0;
    let n = bytemuck::cast_slice::<_, [i32; 2]>(x.n).as_chunks::<G>().0;
    let scales = x.d.as_chunks::<G>().0.iter().zip(x.s.as_chunks::<G>().0);
    let groups = q.iter().zip(n).zip(scales);
    groups.map(|((q, n), (d, s))| Groups { q, n, d, s })
}

/// Defines the GEMVs of a level from the operations of its `lanes.rs`: vectors `I` of four bytes of each row, or their
/// sums, and `F` of one float of each row.
macro_rules! panels {
    ($features:literal) => {
        use super::lanes as v;
        use crate::backend::cpu::acts::Acts;
        use crate::backend::cpu::panels::{
            Line, PanelQ4_0, PanelQ4_1, PanelQ4K, PanelQ5_0, PanelQ6K, PanelQ8_0, ROWS,
        };
        use crate::backend::cpu::pool::OutCols;
        use crate::backend::cpu::x86::panels::{Groups, groups};
        use crate::backend::cpu::x86::{prefetch, reads};

        /// Asks for what lies `ahead` of one of some parts of `x`, from the first to the last evenly: of fifty lines at
        /// once some are not fetched.
        #[inline]
        #[target_feature(enable = $features)]
        fn ask<T>(x: &T, ahead: usize, part: usize, parts: usize) {
            let bytes = size_of::<T>() / parts;
            for line in 0..bytes.div_ceil(64) {
                prefetch(x, ahead + part * bytes + 64 * line);
            }
        }

        /// The low or the high nibbles of lines.
        #[inline]
        #[target_feature(enable = $features)]
        fn nibbles(lines: &[Line; 4], high: bool) -> [v::I; 4] {
            let mut q = [v::start(0); 4];
            for (q, line) in q.iter_mut().zip(lines) {
                let line = v::line(line);
                *q = if high { v::high(line) } else { v::low(line) };
            }
            q
        }

        crate::backend::cpu::x86::panels::gemvs! { $features:
            /// `d * dx * (dot(q, x) - 8 * sum(x))`.
            q4_0: PanelQ4_0, 1, |w, x, sum, ahead| {
                ask(w, ahead, 0, 1);
                let dot = v::start(-8 * (x.n[0][0] + x.n[0][1]));
                let dot = v::dot(dot, nibbles(&w.qs, false), &x.q[0][0]);
                let dot = v::dot(dot, nibbles(&w.qs, true), &x.q[0][1]);
                v::fma(v::scaled(dot, x.d[0]), v::halves(&w.d), sum)
            };
            /// `d * dx * dot(q, x) + m * dx * sum(x)`.
            q4_1: PanelQ4_1, 1, |w, x, sum, ahead| {
                ask(w, ahead, 0, 1);
                let dot = v::dot(v::start(0), nibbles(&w.qs, false), &x.q[0][0]);
                let dot = v::dot(dot, nibbles(&w.qs, true), &x.q[0][1]);
                let sum = v::fma(v::halves(&w.m), v::splat(x.s[0]), sum);
                v::fma(v::scaled(dot, x.d[0]), v::halves(&w.d), sum)
            };
            /// `d * dx * (dot(q, x) - 16 * sum(x))`.
            q5_0: PanelQ5_0, 1, |w, x, sum, ahead| {
                ask(w, ahead, 0, 1);
                let mut dot = v::start(-16 * (x.n[0][0] + x.n[0][1]));
                let bits = v::line(&w.qh);
                for half in 0..2 {
                    let mut q = nibbles(&w.qs, half == 1);
                    for i in 0..4 {
                        q[i] = v::or(q[i], v::only(v::up(bits, 4 - 4 * half as i32 - i as i32), 0x10));
                    }
                    dot = v::dot(dot, q, &x.q[0][half]);
                }
                v::fma(v::scaled(dot, x.d[0]), v::halves(&w.d), sum)
            };
            /// `d * dx * dot(q, x)`.
            q8_0: PanelQ8_0, 1, |w, x, sum, ahead| {
                ask(w, ahead, 0, 1);
                let mut dot = v::start_signed(x.n[0][0] + x.n[0][1]);
                for half in 0..2 {
                    let mut q = [v::start(0); 4];
                    for i in 0..4 {
                        q[i] = v::line(&w.qs[4 * half + i]);
                    }
                    dot = v::dot_signed(dot, q, &x.q[0][half]);
                }
                v::fma(v::scaled(dot, x.d[0]), v::halves(&w.d), sum)
            };
            /// `d * sum(scale * dx * dot(q, x)) - dmin * sum(min * dx * sum(x))`.
            q4_k: PanelQ4K, 8, |w, x, sum, ahead| {
                let (mut products, mut mins) = (v::splat(0.0), v::splat(0.0));
                for group in 0..8 {
                    ask(w, ahead, group, 8);
                    let [first, last]: &[[Line; 4]; 2] = bytemuck::cast_ref(&w.qs[group / 2]);
                    let dot = v::dot(v::start(0), nibbles(first, group % 2 == 1), &x.q[group][0]);
                    let dot = v::dot(dot, nibbles(last, group % 2 == 1), &x.q[group][1]);
                    products = v::fma(v::scaled(dot, x.d[group]), v::bytes(&w.scales[group]), products);
                    mins = v::fma(v::bytes(&w.mins[group]), v::splat(-x.s[group]), mins);
                }
                let sum = v::fma(v::halves(&w.dmin), mins, sum);
                v::fma(v::halves(&w.d), products, sum)
            };
            /// `d * sum(scale * dx * (dot(q, x) - 32 * sum(x)))`.
            q6_k: PanelQ6K, 8, |w, x, sum, ahead| {
                let mut products = v::splat(0.0);
                for half in 0..2 {
                    for part in 0..2 {
                        let lines = &w.q[half][part];
                        for j in 0..4 {
                            ask(w, ahead, 8 * half + 4 * part + j, 16);
                            // As if requests that find no room were dropped: on an EPYC these long blocks come a tenth
                            // faster, from large pages, if asked for again.
                            if P == 1 {
                                ask(w, ahead / 8 * 5, 8 * half + 4 * part + j, 16);
                            }
                            let mut q = nibbles(&lines.ql[j % 2], j >= 2);
                            for i in 0..4 {
                                let bits = v::up(v::line(&lines.qh[i]), 4 - 2 * j as i32);
                                q[i] = v::or(q[i], v::only(bits, 0x30));
                            }
                            let group = 4 * half + j;
                            let dot = v::dot_wide(v::start(-32 * x.n[group][part]), q, &x.q[group][part]);
                            let scale = v::signed_bytes(&w.scales[2 * group + part]);
                            products = v::fma(v::scaled(dot, x.d[group]), scale, products);
                        }
                    }
                }
                v::fma(v::halves(&w.d), products, sum)
            };
        }
    };
}
pub(in crate::backend::cpu) use panels;

/// Defines GEMVs from what a packed block, of one of `P` panels that are read at a time, adds to the sums of its rows.
macro_rules! gemvs {
    ($features:literal: $($(#[$doc:meta])* $format:ident: $packed:ty, $groups:literal, |$w:ident, $x:ident, $sum:ident, $ahead:ident| $body:block;)*) => {$(
        pub(crate) mod $format {
            use super::*;

            $(#[$doc])*
            #[inline]
            #[target_feature(enable = $features)]
            fn block<const P: usize>($w: &$packed, $x: &Groups<$groups>, $sum: v::F, $ahead: usize) -> v::F $body

            #[inline]
            #[target_feature(enable = $features)]
            fn products<const P: usize>(w: [&[$packed]; P], x: &Q8Row, ahead: usize) -> [v::F; P] {
                let mut sums = [v::splat(0.0); P];
                let x = groups::<$groups>(x);
                let n_blocks = x.len();
                let mut panels = [&w[0][..n_blocks]; P];
                for (panel, w) in panels.iter_mut().zip(w) {
                    *panel = &w[..n_blocks];
                }
                for (i, x) in x.enumerate() {
                    for p in 0..P {
                        sums[p] = block::<P>(&panels[p][i], &x, sums[p], ahead);
                    }
                }
                sums
            }

            /// `y[t, r] = sum_k w[r, k] x[t, k]`.
            #[target_feature(enable = $features)]
            pub(crate) fn gemv(w: &[u8], x: &Acts, y: &mut OutCols) {
                let w: &[$packed] = bytemuck::cast_slice(w);
                let n_blocks = x.n_in / (32 * $groups);
                let n_panels = y.n_cols() / ROWS;
                let reads = reads();
                let ahead = reads.panel_ahead;
                let pairs = if reads.pairs { n_panels / 2 } else { 0 };
                let panel = |i: usize| &w[i * n_blocks..(i + 1) * n_blocks];
                for t in 0..x.n_tokens {
                    let x = x.q8_row(t);
                    let y = y.row(t).as_chunks_mut::<ROWS>().0;
                    for i in 0..pairs {
                        // Near its end a stream asks for the start of the next call's, as in the others.
                        let bytes = size_of_val(panel(i));
                        let beyond = if (pairs - i) * bytes > ahead {
                            0
                        } else {
                            size_of_val(w) - pairs * bytes
                        };
                        let sums = products([panel(i), panel(pairs + i)], &x, ahead + beyond);
                        v::store(sums[0], &mut y[i]);
                        v::store(sums[1], &mut y[pairs + i]);
                    }
                    for (i, y) in y.iter_mut().enumerate().skip(2 * pairs) {
                        let [sums] = products([panel(i)], &x, ahead);
                        v::store(sums, y);
                    }
                }
            }
        }
    )*};
}
pub(in crate::backend::cpu) use gemvs;
