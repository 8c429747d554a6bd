//! The loops that measure how fast tiles are multiplied and added.

use super::Tiles;
use crate::backend::cpu::acts::Tile;
use crate::backend::cpu::table::Products;
use crate::backend::cpu::{avx512vnni, scalar};

/// Rounds that a product of two tiles makes: each of the 4 by 4 products of rows is there 16 times.
const ROUNDS: usize = 16;

/// A tile's rows are the four `w` again and again; its columns, in runs of `4 / size` values, the four `x`.
fn tiles(w: [[u8; 64]; 4], x: [[u8; 64]; 4]) -> (Tile, Tile) {
    let (mut rows, mut columns) = ([[0; 64]; 16], [[0; 64]; 16]);
    for i in 0..16 {
        rows[i] = w[i % 4];
        for column in 0..16 {
            columns[i][4 * column..][..4].copy_from_slice(&x[column % 4][4 * i..][..4]);
        }
    }
    (Tile(rows), Tile(columns))
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn products_i8(p: &mut Products<u8, i8, 64>) {
    let (w, x) = tiles(*p.w, bytemuck::cast(*p.x));
    let n = p.rounds / (4 * ROUNDS);
    for sums in Tiles::configure().repeat_i8(&w, &x, n) {
        let sums: [i32; 256] = bytemuck::cast(sums);
        p.sum += sums.iter().map(|sum| i64::from(*sum)).sum::<i64>() as f64;
    }
    let mut rest = Products {
        rounds: p.rounds % (4 * ROUNDS),
        ..*p
    };
    avx512vnni::roofline::products_i8(&mut rest);
    p.sum = rest.sum;
}

#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn products_bf16(p: &mut Products<u16, u16, 32>) {
    let (w, x) = tiles(bytemuck::cast(*p.w), bytemuck::cast(*p.x));
    let n = p.rounds / (4 * ROUNDS);
    for sums in Tiles::configure().repeat_bf16(&w, &x, n) {
        // Lane by lane: one sum after the other would take a fifth of the time.
        let sums: [[f32; 16]; 16] = bytemuck::cast(sums);
        let mut lanes = [0.0; 16];
        for sums in sums {
            for (lane, sum) in lanes.iter_mut().zip(sums) {
                *lane += f64::from(sum);
            }
        }
        p.sum += lanes.iter().sum::<f64>();
    }
    let mut rest = Products {
        rounds: p.rounds % (4 * ROUNDS),
        ..*p
    };
    scalar::roofline::products_bf16(&mut rest);
    p.sum = rest.sum;
}
