//! The loops that measure what a machine can do at most. Baseline vectors are the compiler's to use.

use std::hint::black_box;

use crate::backend::cpu::table::{Line, Products};

fn xor(sums: &mut [u64; 8], line: &Line) {
    let words: [u64; 8] = bytemuck::cast(*line);
    sums.iter_mut()
        .zip(words)
        .for_each(|(sum, word)| *sum ^= word);
}

/// From start to end.
pub(crate) fn read_stream(x: &[Line], sum: &mut u64) {
    let mut sums = [0; 8];
    x.iter().for_each(|line| xor(&mut sums, line));
    *sum ^= sums.iter().fold(0, |a, b| a ^ b);
}

/// From four places at once.
pub(crate) fn read_streams(x: &[Line], sum: &mut u64) {
    let quarter = x.len() / 4;
    let (ab, cd) = x.split_at(2 * quarter);
    let ((a, b), (c, d)) = (ab.split_at(quarter), cd.split_at(quarter));
    let mut sums = [[0; 8]; 4];
    for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
        for (sums, line) in sums.iter_mut().zip([a, b, c, d]) {
            xor(sums, line);
        }
    }
    *sum ^= sums.as_flattened().iter().fold(0, |a, b| a ^ b);
    read_stream(&x[4 * quarter..], sum);
}

/// Sums in 32 bits.
pub(crate) fn products_i8(p: &mut Products<u8, i8, 64>) {
    for _ in 0..p.rounds {
        // Else one round would do for all.
        let (w, x) = black_box((p.w, p.x));
        let mut sum = 0;
        for w in w {
            for x in x {
                let products = w.iter().zip(x).map(|(w, x)| i32::from(*w) * i32::from(*x));
                sum += products.sum::<i32>();
            }
        }
        p.sum += f64::from(sum);
    }
}

/// Sums in each of 16 lanes.
pub(crate) fn products_f32(p: &mut Products<f32, f32, 16>) {
    let mut sums = [[0.0; 16]; 4];
    for _ in 0..p.rounds {
        let (w, x) = black_box((p.w, p.x));
        for (w, sums) in w.iter().zip(&mut sums) {
            for x in x {
                for ((w, x), sum) in w.iter().zip(x).zip(&mut *sums) {
                    *sum += w * x;
                }
            }
        }
    }
    p.sum += sums
        .as_flattened()
        .iter()
        .map(|x| f64::from(*x))
        .sum::<f64>();
}

/// Halves of floats: made whole first, as every level does that has no products of them.
pub(crate) fn products_bf16(p: &mut Products<u16, u16, 32>) {
    let whole = |half: u16| f32::from_bits(u32::from(half) << 16);
    let mut sums = [[0.0; 32]; 4];
    for _ in 0..p.rounds {
        let (w, x) = black_box((p.w, p.x));
        for (w, sums) in w.iter().zip(&mut sums) {
            for x in x {
                for ((w, x), sum) in w.iter().zip(x).zip(&mut *sums) {
                    *sum += whole(*w) * whole(*x);
                }
            }
        }
    }
    p.sum += sums
        .as_flattened()
        .iter()
        .map(|x| f64::from(*x))
        .sum::<f64>();
}
