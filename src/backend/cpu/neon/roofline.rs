//! The loop that measures how fast floats are multiplied and added; memory is read as fast by the scalar rows.

use std::arch::aarch64::*;

use crate::backend::cpu::table::Products;

/// Sixteen sums in registers: enough to wait for none.
#[target_feature(enable = "neon")]
pub(crate) fn products_f32(p: &mut Products<f32, f32, 16>) {
    let mut sums = [[vdupq_n_f32(0.0); 4]; 4];
    for _ in 0..p.rounds {
        for x in std::hint::black_box(p.x) {
            for (w, sums) in p.w.iter().zip(&mut sums) {
                let pairs = w.as_chunks().0.iter().zip(x.as_chunks().0);
                for ((w, x), sum) in pairs.zip(sums) {
                    *sum = vfmaq_f32(*sum, super::load_f32(w), super::load_f32(x));
                }
            }
        }
    }
    for sum in sums.as_flattened() {
        p.sum += vaddvq_f64(vaddq_f64(
            vcvt_f64_f32(vget_low_f32(*sum)),
            vcvt_high_f64_f32(*sum),
        ));
    }
}
