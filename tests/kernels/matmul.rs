//! GEMV and GEMM: random blocks over each format's whole range.

use kinglet::backend::Activation;
use kinglet::backend::cpu::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8_LEN, Q8Row, Q8RowMut, Tile};
use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::panels;
use kinglet::backend::cpu::pool::OutCols;
use kinglet::backend::cpu::table::{
    self, ActFormat, GatedRows, Kernel, Layout, MatMul, Operations, Ready,
};
use kinglet::quant::{self, DType};

use crate::blocks::{Fill, random_blocks};
use crate::common::{Random, assert_near, bf16, scalar_row, vector_rows};

/// Activations in both formats.
struct Inputs {
    n_tokens: usize,
    n_in: usize,
    f32: Vec<f32>,
    q8: Vec<f32>,
    bf16: Vec<[Tile; 2]>,
}

impl Inputs {
    fn random(n_tokens: usize, n_in: usize, random: &mut Random) -> Self {
        let mut f32 = random.floats(n_tokens * n_in, 3.0);
        // Rows of the largest 8-bit values, all of one sign or by turns; else a block with zeros and one with a large
        // value.
        let len = f32.len();
        match random.below(6) {
            0 => f32.fill(2.5),
            1 => f32.fill(-2.5),
            2 => f32.iter_mut().for_each(|x| *x = 2.5f32.copysign(*x)),
            _ => {}
        }
        f32[len - n_in.min(7)..].fill(0.0);
        f32[random.below(len)] = 1e4;
        let mut inputs = Self {
            n_tokens,
            n_in,
            f32,
            q8: Vec::new(),
            bf16: Vec::new(),
        };
        if n_in.is_multiple_of(Q8_LEN) {
            let quantize = scalar_row(table::QUANTIZE);
            let bytes = Q8Row::bytes(n_in);
            inputs.q8 = vec![0.0; n_tokens * bytes / 4];
            let rows: &mut [u8] = bytemuck::cast_slice_mut(&mut inputs.q8);
            for (x, row) in inputs
                .f32
                .chunks_exact(n_in)
                .zip(rows.chunks_exact_mut(bytes))
            {
                quantize.run(x, &mut Q8RowMut::new(row, n_in));
            }
        }
        if n_in.is_multiple_of(BF16_LEN) {
            let pack = scalar_row(table::PACK_BF16);
            let n_k = n_in / BF16_LEN;
            let empty = [Tile([[0; 64]; 16]); 2];
            inputs.bf16 = vec![empty; n_tokens.div_ceil(BF16_TOKENS) * n_k];
            let groups = inputs.bf16.chunks_exact_mut(n_k);
            for (x, group) in inputs.f32.chunks(BF16_TOKENS * n_in).zip(groups) {
                pack.run(x, n_in, group);
            }
        }
        inputs
    }

    fn acts(&self) -> Acts<'_> {
        Acts {
            n_tokens: self.n_tokens,
            n_in: self.n_in,
            f32: &self.f32,
            q8: bytemuck::cast_slice(&self.q8),
            bf16: &self.bf16,
        }
    }

    /// The activations that a kernel of `format` sees, exactly.
    fn exact(&self, format: ActFormat) -> Vec<f64> {
        match format {
            ActFormat::F32 => self.f32.iter().map(|x| f64::from(*x)).collect(),
            ActFormat::Bf16 => self.f32.iter().map(|x| f64::from(bf16(*x))).collect(),
            ActFormat::Q8 => (0..self.n_tokens)
                .flat_map(|t| {
                    let row = self.acts().q8_row(t);
                    let d = |i: usize| f64::from(row.d[i / Q8_LEN]);
                    let x = row
                        .q
                        .iter()
                        .enumerate()
                        .map(move |(i, q)| f64::from(*q) * d(i));
                    x.collect::<Vec<_>>()
                })
                .collect(),
        }
    }
}

/// `w` are rows; a kernel over panels gets them packed.
fn run(
    (row, kernel): (&MatMul, Ready<MatMul>),
    w: &[u8],
    inputs: &Inputs,
    n_rows: usize,
) -> Vec<f32> {
    let mut y = vec![f32::NAN; inputs.n_tokens * n_rows];
    let mut packed = Vec::new();
    if kernel.layout() == Layout::Panels {
        let bytes = panels::panel_bytes(row.weights, inputs.n_in).expect("packed formats");
        packed = vec![0; n_rows / panels::ROWS * bytes];
        let rows = w.chunks_exact(w.len() / n_rows * panels::ROWS);
        for (panel, rows) in packed.chunks_exact_mut(bytes).zip(rows) {
            panels::pack(row.weights, rows, panel);
        }
    }
    let w = if packed.is_empty() { w } else { &packed };
    kernel.run(w, &inputs.acts(), &mut OutCols::whole(&mut y, n_rows));
    y
}

/// `(product, bound)` for each `(token, row)`. The bound is on the error of a sum of floats in any order of blocks:
/// a block of 32 is added up, then the blocks: so no term takes part in more than `32 + n / 32` roundings, and those
/// of weights with a minimum have a few more. The magnitude of a term is that of the greatest weight around it, since
/// scale and minimum may cancel in the weight itself.
fn reference(
    dtype: DType,
    format: ActFormat,
    w: &[u8],
    inputs: &Inputs,
    n_rows: usize,
) -> Vec<(f64, f64)> {
    let n = inputs.n_in;
    let mut weights = vec![0.0; n_rows * n];
    quant::dequantize(dtype, w, &mut weights);
    let x = inputs.exact(format);
    let roundings = match format {
        ActFormat::F32 => n + 8,
        ActFormat::Q8 => 48 + n / 16,
        ActFormat::Bf16 => n + 8,
    };
    let mut out = Vec::new();
    for x in x.chunks_exact(n) {
        for w in weights.chunks_exact(n) {
            let product = w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            let magnitude: f64 = w
                .chunks(Q8_LEN)
                .zip(x.chunks(Q8_LEN))
                .map(|(w, x)| {
                    let max = w.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                    let sum: f64 = x.iter().map(|x| x.abs()).sum();
                    2.0 * f64::from(max) * sum
                })
                .sum();
            let bound = roundings as f64 * f64::from(f32::EPSILON) / 2.0 * magnitude;
            out.push((product, bound));
        }
    }
    out
}

fn lengths(dtype: DType) -> Vec<usize> {
    match dtype.block_len() {
        1 => vec![1, 7, 16, 33, 64, 100, 576],
        32 => vec![32, 64, 96, 128, 160, 192, 224, 256, 320, 576, 1536],
        _ => vec![256, 512, 768, 2048],
    }
}

fn check(tables: &'static [MatMul], tokens: &[usize], rows: &[usize]) {
    for &dtype in DType::ALL {
        let of_type = || tables.iter().filter(move |k| k.weights == dtype);
        if of_type().next().is_none() {
            continue;
        }
        let scalar_row = of_type().find(|k| k.isa() == Isa::Scalar);
        let scalar_row = scalar_row.expect("a scalar row");
        let scalar = Ready::new(scalar_row).expect("scalar runs everywhere");
        let fast: Vec<_> = vector_rows(tables)
            .filter(|(k, _)| k.weights == dtype)
            .collect();
        let mut random = Random::new(dtype as u64 + 1);
        for n_in in lengths(dtype) {
            for &n_tokens in tokens {
                for &n_rows in rows {
                    let fill = match random.below(8) {
                        0 => Fill::Byte(0xff),
                        1 => Fill::Byte(0x00),
                        2 => Fill::Byte(0x80),
                        3 => Fill::Byte(0x7f),
                        _ => Fill::Random,
                    };
                    let n_blocks = n_rows * n_in / dtype.block_len();
                    let w = random_blocks(dtype, n_blocks, fill, &mut random);
                    let inputs = Inputs::random(n_tokens, n_in, &mut random);
                    let expected = reference(dtype, scalar.acts(), &w, &inputs, n_rows);
                    let compare = |kernel: Ready<MatMul>, y: &[f32]| {
                        for (i, (y, (exact, bound))) in y.iter().zip(&expected).enumerate() {
                            let at = format!(
                                "{} n_in {n_in} n_tokens {n_tokens} n_rows {n_rows} {fill:?} output {i}",
                                kernel.name()
                            );
                            assert_near(*y, *exact, *bound, &at);
                        }
                    };
                    let y = run((scalar_row, scalar), &w, &inputs, n_rows);
                    compare(scalar, &y);
                    for (row, kernel) in &fast {
                        assert!(kernel.acts() == scalar.acts(), "{}", kernel.name());
                        let fast = run((row, *kernel), &w, &inputs, n_rows);
                        compare(*kernel, &fast);
                        for (fast, (y, (_, bound))) in fast.iter().zip(y.iter().zip(&expected)) {
                            assert_near(*fast, f64::from(*y), 2.0 * bound, &kernel.name());
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn gemv_rows_agree() {
    check(table::GEMV, &[1, 3], &[1, 2, 3, 4, 5, 8, 9]);
}

#[test]
fn gemv_rows_over_panels_agree() {
    check(table::GEMV_PANELS, &[1, 3], &[16, 32, 80]);
}

#[test]
fn gemm_rows_agree() {
    check(table::GEMM, &[1, 2, 3, 5, 17], &[1, 4, 9, 16, 33]);
}

/// Some rows of a product are those of the whole one, whichever are beside them.
#[test]
fn picked_rows_are_those_of_the_gemv() {
    let mut random = Random::new(77);
    for row in table::PICKED {
        let same = |k: &&MatMul| k.weights == row.weights && k.isa() == row.isa();
        let gemv_row = table::GEMV.iter().find(same).expect("a GEMV beside it");
        let (Some(picked), Some(gemv)) = (Ready::new(row), Ready::new(gemv_row)) else {
            continue;
        };
        for n_in in lengths(row.weights) {
            let n_rows = 37;
            let n_blocks = n_rows * n_in / row.weights.block_len();
            let w = random_blocks(row.weights, n_blocks, Fill::Random, &mut random);
            let inputs = Inputs::random(1, n_in, &mut random);
            let whole = run((gemv_row, gemv), &w, &inputs, n_rows);
            for n_picks in [0, 1, 3, 4, 6, 19, n_rows] {
                let mut picks: Vec<u32> = (0..n_rows as u32).collect();
                while picks.len() > n_picks {
                    picks.remove(random.below(picks.len()));
                }
                let mut y = vec![f32::NAN; n_picks];
                picked.run(&w, &picks, &inputs.acts(), &mut y);
                for (pick, y) in picks.iter().zip(y) {
                    let expected = whole[*pick as usize];
                    assert!(
                        y.to_bits() == expected.to_bits(),
                        "{} n_in {n_in} row {pick}: {y}, in the whole product {expected}",
                        picked.name()
                    );
                }
            }
        }
    }
}

/// Rows of a matrix unit round each weight to bf16: a relative 2^-8 at most, and a few roundings before that.
#[test]
fn tile_rows_are_near() {
    let mut random = Random::new(31);
    for (kernel, ready) in vector_rows(table::TILES) {
        let dtype = kernel.weights;
        for n_in in lengths(dtype) {
            if !n_in.is_multiple_of(BF16_LEN) {
                continue;
            }
            for (n_tokens, n_rows) in [(6, 1), (16, 17), (17, 32), (33, 33), (50, 70), (600, 5)] {
                let n_blocks = n_rows * n_in / dtype.block_len();
                let w = random_blocks(dtype, n_blocks, Fill::Random, &mut random);
                let inputs = Inputs::random(n_tokens, n_in, &mut random);
                let expected = reference(dtype, ActFormat::Bf16, &w, &inputs, n_rows);
                let mut weights = vec![0.0; n_rows * n_in];
                quant::dequantize(dtype, &w, &mut weights);
                let y = run((kernel, ready), &w, &inputs, n_rows);
                let x = inputs.exact(ActFormat::Bf16);
                for (i, (y, (exact, bound))) in y.iter().zip(&expected).enumerate() {
                    let (token, row) = (i / n_rows, i % n_rows);
                    let w = &weights[row * n_in..][..n_in];
                    let x = &x[token * n_in..][..n_in];
                    let size: f64 = w
                        .iter()
                        .zip(x)
                        .map(|(w, x)| (f64::from(*w) * x).abs())
                        .sum();
                    let at = format!(
                        "{} n_in {n_in} n_tokens {n_tokens} n_rows {n_rows} output {i}",
                        kernel.name()
                    );
                    assert_near(*y, *exact, bound + size / 256.0, &at);
                }
            }
        }
    }
}

/// Two matrices joined by a gated unit: the same tiles, bit for bit, as from the matrices one by one, the gated unit and
/// the packing, however the rows are cut.
#[test]
fn gated_rows_are_their_parts() {
    let mut random = Random::new(37);
    let operations = Operations::best();
    for (kernel, ready) in vector_rows(table::GATED) {
        let dtype = kernel.weights;
        let row = table::TILES.iter().find(|row| row.weights == dtype);
        let row = row.expect("a row of the same level");
        let tiles = (row, Ready::new(row).expect("of the same level"));
        for n_in in lengths(dtype)
            .into_iter()
            .filter(|n| n.is_multiple_of(BF16_LEN))
        {
            for (n_tokens, n_rows) in [(6, 32), (17, 64), (33, 96), (600, 32)] {
                let n_blocks = n_rows * n_in / dtype.block_len();
                let [gate, up] =
                    [(); 2].map(|()| random_blocks(dtype, n_blocks, Fill::Random, &mut random));
                let inputs = Inputs::random(n_tokens, n_in, &mut random);
                let mut h = run(tiles, &gate, &inputs, n_rows);
                operations
                    .glu
                    .run(Activation::Silu, &mut h, &run(tiles, &up, &inputs, n_rows));
                let n_chunks = n_rows / BF16_LEN;
                let empty = [Tile([[0; 64]; 16]); 2];
                let mut expected = vec![empty; n_tokens.div_ceil(BF16_TOKENS) * n_chunks];
                for (h, group) in h
                    .chunks(BF16_TOKENS * n_rows)
                    .zip(expected.chunks_exact_mut(n_chunks))
                {
                    operations.pack_bf16.run(h, n_rows, group);
                }
                let mut found = vec![[Tile([[0x55; 64]; 16]); 2]; expected.len()];
                ready.run(&mut GatedRows {
                    gate: &gate,
                    up: &up,
                    x: &inputs.acts(),
                    activation: Activation::Silu,
                    out: OutCols::whole(&mut found, n_chunks),
                });
                assert!(
                    found == expected,
                    "{} n_in {n_in} n_tokens {n_tokens} n_rows {n_rows}",
                    kernel.name()
                );
            }
        }
    }
}

/// Every row of a matrix must be the same whichever rows and tokens are computed with it: results may not depend on
/// how work is cut.
#[test]
fn results_do_not_depend_on_the_cut() {
    let rows = vector_rows(table::GEMV).chain(vector_rows(table::GEMM));
    let rows = rows.chain(vector_rows(table::GEMV_PANELS));
    for (kernel, ready) in rows.chain(vector_rows(table::TILES)) {
        let mut random = Random::new(5);
        let (n_rows, cuts): (usize, &[usize]) = match kernel.layout {
            Layout::Rows => (21, &[1, 5, 16, 20]),
            Layout::Panels => (80, &[16, 48]),
        };
        let (dtype, n_in, n_tokens) = (kernel.weights, 768, 19);
        let n_blocks = n_rows * n_in / dtype.block_len();
        let w = random_blocks(dtype, n_blocks, Fill::Random, &mut random);
        let inputs = Inputs::random(n_tokens, n_in, &mut random);
        let whole = run((kernel, ready), &w, &inputs, n_rows);
        let row_bytes = dtype.row_bytes(n_in).expect("whole blocks");
        for &cut in cuts {
            let (first, second) = w.split_at(cut * row_bytes);
            let first = run((kernel, ready), first, &inputs, cut);
            let second = run((kernel, ready), second, &inputs, n_rows - cut);
            for t in 0..n_tokens {
                let (a, b) = whole[t * n_rows..][..n_rows].split_at(cut);
                assert_eq!(a, &first[t * cut..][..cut], "{}", kernel.name());
                let rest = n_rows - cut;
                assert_eq!(b, &second[t * rest..][..rest], "{}", kernel.name());
            }
        }
    }
}
