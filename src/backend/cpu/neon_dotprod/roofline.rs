//! The loop that measures how fast bytes are multiplied and added.

use std::arch::aarch64::*;

use super::sdot;
use crate::backend::cpu::neon::load_i8;
use crate::backend::cpu::table::Products;

/// Sixteen sums in registers: enough to wait for none. The unsigned side is below 128.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn products_i8(p: &mut Products<u8, i8, 64>) {
    let mut sums = [[vdupq_n_s32(0); 4]; 4];
    for _ in 0..p.rounds {
        let (w, x) = std::hint::black_box((p.w, p.x));
        let w: &[[[i8; 16]; 4]; 4] = bytemuck::cast_ref(w);
        let x: &[[[i8; 16]; 4]; 4] = bytemuck::cast_ref(x);
        for x in x {
            for (w, sums) in w.iter().zip(&mut sums) {
                for ((w, x), sum) in w.iter().zip(x).zip(sums) {
                    *sum = sdot(*sum, load_i8(w), load_i8(x));
                }
            }
        }
    }
    for sum in sums.as_flattened() {
        p.sum += vaddlvq_s32(*sum) as f64;
    }
}
