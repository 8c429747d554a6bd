//! Gated short convolution (LFM2): gate, convolve and gate in one pass over the rows, channels innermost.

use crate::backend::cpu::table::ShortConvRows;

/// See [`ShortConvRows`].
#[inline(always)]
pub(crate) fn short_conv(rows: &mut ShortConvRows) {
    let n = rows.n_channels;
    let n_taps = rows.taps.len() / n;
    for (i, out) in rows.out.chunks_exact_mut(n).enumerate() {
        let t = rows.first + i;
        out.fill(0.0);
        for (j, taps) in rows.taps.chunks_exact(n).enumerate() {
            // The row of u that tap j meets, counted from the oldest row of the state.
            let at = t + j;
            if at < n_taps - 1 {
                let u = &rows.state[at * n..][..n];
                out.iter_mut()
                    .zip(taps)
                    .zip(u)
                    .for_each(|((y, k), u)| *y += k * u);
            } else {
                let row = &rows.bcx[(at - (n_taps - 1)) * 3 * n..][..3 * n];
                let (b, x) = (&row[..n], &row[2 * n..]);
                for (((y, k), b), x) in out.iter_mut().zip(taps).zip(b).zip(x) {
                    *y += k * (b * x);
                }
            }
        }
        let c = &rows.bcx[t * 3 * n + n..][..n];
        out.iter_mut().zip(c).for_each(|(y, c)| *y *= c);
    }
}
