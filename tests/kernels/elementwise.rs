//! Quantization, norms, rotary embedding, gated units, conversions, short convolution.

use kinglet::backend::Activation;
use kinglet::backend::cpu::acts::{Q8_LEN, Q8RowMut, Tile};
use kinglet::backend::cpu::logits::Largest;
use kinglet::backend::cpu::ranking::{Sides, order};
use kinglet::backend::cpu::table::{self, Ready, ShortConv, ShortConvRows};

use crate::common::{Random, all_rows, assert_near, bf16, scalar_row, vector_rows};

const EPSILON: f64 = f32::EPSILON as f64 / 2.0;

/// Lengths around each vector width.
const LENGTHS: &[usize] = &[1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 576, 1000];

/// Ordinary numbers with zeros, signs of zero, subnormals and large ones among them.
fn varied(n: usize, random: &mut Random) -> Vec<f32> {
    let value = |random: &mut Random| match random.below(12) {
        0 => 0.0,
        1 => -0.0,
        2 => random.float() * 1e-40,
        3 => random.float() * 1e5,
        4 => random.float() * 1e-3,
        _ => random.float() * 8.0,
    };
    (0..n).map(|_| value(random)).collect()
}

#[test]
fn quantize_rows_are_equal_and_near() {
    let mut random = Random::new(1);
    for n in [32, 64, 96, 576, 1536] {
        let mut x = varied(n, &mut random);
        x[..Q8_LEN].fill(0.0);
        let blocks = n / Q8_LEN;
        let run = |kernel: Ready<table::Quantize>| {
            let (mut q, mut u) = (vec![1; n], vec![1; n]);
            let (mut d, mut s) = (vec![1.0; blocks], vec![1.0; blocks]);
            let mut sums = vec![1; 2 * blocks];
            let mut row = Q8RowMut {
                q: &mut q,
                u: &mut u,
                d: &mut d,
                s: &mut s,
                n: &mut sums,
            };
            kernel.run(&x, &mut row);
            let sum = |q: &[i8]| q.iter().map(|q| i32::from(*q)).sum::<i32>();
            assert!(q.chunks(16).map(sum).eq(sums), "{}", kernel.name());
            assert!(
                q.iter()
                    .zip(&u)
                    .all(|(q, u)| i32::from(*u) == i32::from(*q) + 128)
            );
            (q, d, s)
        };
        let (q, d, s) = run(scalar_row(table::QUANTIZE));
        for (i, x) in x.iter().enumerate() {
            let d = f64::from(d[i / Q8_LEN]);
            assert!((-127..=127).contains(&q[i]));
            // Half a step, and the rounding of the scale and its inverse.
            assert_near(*x, f64::from(q[i]) * d, d * 0.500_05 + 1e-44, &"quantize");
        }
        for (i, s) in s.iter().enumerate() {
            let sum: f64 = q[i * Q8_LEN..][..Q8_LEN]
                .iter()
                .map(|q| f64::from(*q))
                .sum();
            let exact = sum * f64::from(d[i]);
            assert_near(*s, exact, EPSILON * exact.abs() + 1e-44, &"sum");
        }
        for (_, kernel) in vector_rows(table::QUANTIZE) {
            assert!(
                run(kernel) == (q.clone(), d.clone(), s.clone()),
                "{} {n}",
                kernel.name()
            );
        }
    }
}

#[test]
fn rms_norm_rows_agree() {
    let mut random = Random::new(2);
    let rows = vector_rows(table::RMS_NORM).map(|(_, k)| k);
    let rows: Vec<_> = rows.chain([scalar_row(table::RMS_NORM)]).collect();
    for &n in LENGTHS {
        let (x, gain) = (random.floats(n, 5.0), random.floats(n, 2.0));
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64;
        let scale = 1.0 / (mean + f64::from(1e-5f32)).sqrt();
        for kernel in &rows {
            let mut y = vec![f32::NAN; n];
            kernel.run(&x, &gain, 1e-5, &mut y);
            for i in 0..n {
                let exact = f64::from(x[i]) * scale * f64::from(gain[i]);
                // The sum of squares: n / 16 + 16 terms in a chain, halved by the root; then some five roundings.
                let roundings = n as f64 / 32.0 + 16.0;
                let tolerance = roundings * EPSILON * exact.abs() + 1e-44;
                assert_near(
                    y[i],
                    exact,
                    tolerance,
                    &format!("{} {n} {i}", kernel.name()),
                );
            }
        }
    }
}

#[test]
fn rope_rows_agree() {
    let mut random = Random::new(3);
    let halves = vector_rows(table::ROPE_HALVES).map(|(_, k)| k);
    let halves: Vec<_> = halves.chain([scalar_row(table::ROPE_HALVES)]).collect();
    let neighbours = vector_rows(table::ROPE_NEIGHBOURS).map(|(_, k)| k);
    let neighbours: Vec<_> = neighbours
        .chain([scalar_row(table::ROPE_NEIGHBOURS)])
        .collect();
    for &half in LENGTHS {
        // Some elements that do not rotate follow.
        for rest in [0, 8] {
            let x = random.floats(2 * half + rest, 4.0);
            let angles = random.floats(half, 3.0);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let check = |y: &[f32], pair: &dyn Fn(usize) -> (usize, usize), name: &str| {
                for i in 0..half {
                    let (a, b) = pair(i);
                    let (xa, xb) = (f64::from(x[a]), f64::from(x[b]));
                    let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
                    let tolerance = 3.0 * EPSILON * (xa.abs() + xb.abs());
                    assert_near(y[a], xa * c - xb * s, tolerance, &name);
                    assert_near(y[b], xa * s + xb * c, tolerance, &name);
                }
                assert_eq!(y[2 * half..], x[2 * half..], "{name}");
            };
            for kernel in &halves {
                let mut y = x.clone();
                kernel.run(&mut y, &cos, &sin);
                check(&y, &|i| (i, i + half), kernel.name());
            }
            for kernel in &neighbours {
                let mut y = x.clone();
                kernel.run(&mut y[..2 * half], &cos, &sin);
                check(&y, &|i| (2 * i, 2 * i + 1), kernel.name());
            }
        }
    }
}

#[test]
fn glu_rows_agree() {
    let mut random = Random::new(4);
    let rows = vector_rows(table::GLU).map(|(_, k)| k);
    let rows: Vec<_> = rows.chain([scalar_row(table::GLU)]).collect();
    for &n in LENGTHS {
        let mut gate = varied(n, &mut random);
        let up = random.floats(n, 3.0);
        // Ends of the range of the exponential.
        for (x, extreme) in gate
            .iter_mut()
            .zip([-1e30, 1e30, -87.2, -87.4, -88.8, 88.7, 104.0])
        {
            *x = extreme;
        }
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Relu] {
            for kernel in &rows {
                let mut y = gate.clone();
                kernel.run(activation, &mut y, &up);
                for i in 0..n {
                    let (g, u) = (f64::from(gate[i]), f64::from(up[i]));
                    let z = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g * g * g);
                    let (exact, exponent) = match activation {
                        Activation::Silu => (g / (1.0 + (-g).exp()) * u, g),
                        Activation::GeluTanh => (g / (1.0 + (-2.0 * z).exp()) * u, 2.0 * z),
                        Activation::Relu => (g.max(0.0) * u, 0.0),
                    };
                    // An exponential's error grows with its argument's rounding; below e^-87 a row may give 0.
                    let exponent = exponent.abs().min(100.0);
                    let relative = (8.0 + 4.0 * exponent) * EPSILON;
                    let tolerance = relative * exact.abs() + 2e-38 * (g * u).abs() + 1e-44;
                    let at = format!("{} {activation:?} {n} {i} of {g}", kernel.name());
                    assert_near(y[i], exact, tolerance, &at);
                }
            }
        }
    }
}

#[test]
fn add_rows_are_equal() {
    let mut random = Random::new(5);
    for &n in LENGTHS {
        let (x, y) = (varied(n, &mut random), varied(n, &mut random));
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let rows = vector_rows(table::ADD).map(|(_, k)| k);
        for kernel in rows.chain([scalar_row(table::ADD)]) {
            let mut z = x.clone();
            kernel.run(&mut z, &y);
            assert_eq!(z, sums, "{}", kernel.name());
        }
    }
}

#[test]
fn to_f16_rows_are_equal() {
    // Every half float, the points halfway between neighbours and the floats next to those: all that rounding meets.
    let mut x = Vec::new();
    for bits in 0..=0xffffu16 {
        let value = kinglet::quant::f16_to_f32(bits);
        if value.is_finite() {
            let next = kinglet::quant::f16_to_f32(bits + 1);
            let halfway = if next.is_finite() {
                (value + next) / 2.0
            } else {
                value.signum() * 65520.0
            };
            x.extend([value, halfway, halfway.next_up(), halfway.next_down()]);
        }
    }
    x.extend([f32::INFINITY, f32::NEG_INFINITY, 1e-10, -1e-10, 1e30, 5.0]);
    let run = |kernel: Ready<table::ToF16>, x: &[f32]| {
        let mut y = vec![0x5555; x.len()];
        kernel.run(x, &mut y);
        y
    };
    let scalar = scalar_row(table::TO_F16);
    for n in [x.len(), 1, 7, 8, 17, 100] {
        let x = &x[x.len() - n..];
        let expected = run(scalar, x);
        for (x, y) in x.iter().zip(&expected) {
            // The nearest, and of two the even one.
            let error =
                |bits: u16| (f64::from(kinglet::quant::f16_to_f32(bits)) - f64::from(*x)).abs();
            if x.abs() < 65520.0 {
                for other in [y.wrapping_sub(1), y + 1] {
                    let better = error(other) < error(*y);
                    let odd_tie = error(other) == error(*y) && y % 2 != 0;
                    assert!(!better && !odd_tie, "{x}");
                }
            } else {
                assert_eq!(y & 0x7fff, 0x7c00, "{x}");
            }
        }
        for (_, kernel) in vector_rows(table::TO_F16) {
            assert_eq!(run(kernel, x), expected, "{}", kernel.name());
        }
    }
    for kernel in vector_rows(table::TO_F16).map(|(_, k)| k).chain([scalar]) {
        let y = run(kernel, &[f32::NAN; 9]);
        assert!(y.iter().all(|y| y & 0x7fff > 0x7c00), "{}", kernel.name());
    }
}

#[test]
fn products_with_turned_rows_are_their_sums() {
    let mut random = Random::new(7);
    for (n_in, n_panels) in [(64, 3), (20, 1), (256, 2)] {
        let panels = random.floats(n_panels * n_in * table::PANEL_ROWS, 2.0);
        let queries = random.floats(21 * n_in, 2.0);
        let run = |kernel: Ready<table::MultiplyPanels>, n: usize| {
            let mut out = vec![f32::NAN; n * n_panels * table::PANEL_ROWS];
            kernel.run(&mut table::PanelProducts {
                queries: &queries[..n * n_in],
                n_in,
                panels: &panels,
                out: &mut out,
            });
            out
        };
        let scalar = scalar_row(table::MULTIPLY_PANELS);
        let all = vector_rows(table::MULTIPLY_PANELS).map(|(_, kernel)| kernel);
        for kernel in all.chain([scalar]) {
            let whole = run(kernel, 21);
            for (at, found) in whole.iter().enumerate() {
                let row = at % (n_panels * table::PANEL_ROWS);
                let query = &queries[at / (n_panels * table::PANEL_ROWS) * n_in..][..n_in];
                let product = |c: usize| {
                    let panel = row / table::PANEL_ROWS * n_in + c;
                    let x = panels[panel * table::PANEL_ROWS + row % table::PANEL_ROWS];
                    f64::from(query[c]) * f64::from(x)
                };
                let expected = (0..n_in).map(product).sum::<f64>();
                let off = (f64::from(*found) - expected).abs();
                assert!(off < 1e-4, "{}: {found} {expected}", kernel.name());
            }
            // What is beside a query does not matter.
            for n in [1, 7, 8, 16] {
                let n_out = n * n_panels * table::PANEL_ROWS;
                assert!(run(kernel, n) == whole[..n_out], "{}", kernel.name());
            }
        }
    }
}

fn convolve(
    kernel: Ready<ShortConv>,
    bcx: &[f32],
    taps: &[f32],
    state: &[f32],
    n: usize,
    rows: (usize, usize),
) -> Vec<f32> {
    let mut out = vec![f32::NAN; (rows.1 - rows.0) * n];
    kernel.run(&mut ShortConvRows {
        bcx,
        n_channels: n,
        taps,
        state,
        first: rows.0,
        out: &mut out,
    });
    out
}

#[test]
fn short_conv_rows_agree() {
    let mut random = Random::new(6);
    let kernels = vector_rows(table::SHORT_CONV).map(|(_, k)| k);
    let kernels: Vec<_> = kernels.chain([scalar_row(table::SHORT_CONV)]).collect();
    for n in [1, 5, 16, 48, 100] {
        for n_taps in [1, 2, 3, 4] {
            for n_tokens in [1, 2, 3, 9] {
                let bcx = random.floats(n_tokens * 3 * n, 2.0);
                let taps = random.floats(n_taps * n, 1.0);
                let state = random.floats((n_taps - 1) * n, 2.0);
                // All inputs of the convolution in a row, the oldest of the state first.
                let mut u: Vec<f64> = state.iter().map(|u| f64::from(*u)).collect();
                for row in bcx.chunks_exact(3 * n) {
                    u.extend((0..n).map(|i| f64::from(row[i]) * f64::from(row[2 * n + i])));
                }
                for kernel in &kernels {
                    let y = convolve(*kernel, &bcx, &taps, &state, n, (0, n_tokens));
                    for (i, y) in y.iter().enumerate() {
                        let (t, channel) = (i / n, i % n);
                        let gate = f64::from(bcx[t * 3 * n + n + channel]);
                        let term =
                            |j: usize| f64::from(taps[j * n + channel]) * u[(t + j) * n + channel];
                        let exact = gate * (0..n_taps).map(term).sum::<f64>();
                        let size = gate.abs() * (0..n_taps).map(|j| term(j).abs()).sum::<f64>();
                        let tolerance = (n_taps + 3) as f64 * EPSILON * size + 1e-44;
                        assert_near(*y, exact, tolerance, &kernel.name());
                    }
                    // In two parts the rows are the same.
                    let cut = n_tokens / 2;
                    let mut parts = convolve(*kernel, &bcx, &taps, &state, n, (0, cut));
                    parts.extend(convolve(*kernel, &bcx, &taps, &state, n, (cut, n_tokens)));
                    assert_eq!(parts, y, "{}", kernel.name());
                }
            }
        }
    }
}

#[test]
fn pack_bf16_rows_are_equal() {
    let mut random = Random::new(23);
    for (n_tokens, n_in) in [(1, 32), (15, 64), (16, 96), (17, 576), (32, 256)] {
        let mut x = random.floats(n_tokens * n_in, 4.0);
        x[0] = f32::MAX;
        x[1] = -0.0;
        x[2] = f32::from_bits(0x3f80_8000); // a tie
        x[3] = f32::from_bits(0x3f81_8000);
        let run = |kernel: Ready<table::PackBf16>| {
            let mut group = vec![[Tile([[0xff; 64]; 16]); 2]; n_in / 32];
            kernel.run(&x, n_in, &mut group);
            group
        };
        let expected = run(scalar_row(table::PACK_BF16));
        // Token t, values 2p and 2p + 1 of tile k: row p of the tile of its half, lane t.
        for (t, x) in x.chunks_exact(n_in).enumerate() {
            for (i, x) in x.iter().enumerate() {
                let row = &expected[i / 32][t / 16].0[i % 32 / 2];
                let at = t % 16 * 4 + i % 2 * 2;
                let bits = u16::from_le_bytes([row[at], row[at + 1]]);
                assert_eq!(
                    u32::from(bits) << 16,
                    bf16(*x).to_bits(),
                    "token {t} value {i}"
                );
            }
        }
        for (_, kernel) in vector_rows(table::PACK_BF16) {
            assert!(
                run(kernel) == expected,
                "{} {n_tokens} by {n_in}",
                kernel.name()
            );
        }
    }
}

#[test]
fn passes_over_logits_give_the_same_bits() {
    let mut random = Random::new(8);
    for n in [0, 1, 7, 64, 100, 1000] {
        let mut logits: Vec<f32> = (0..n).map(|_| random.float() * 60.0).collect();
        for special in [None, Some(f32::NEG_INFINITY), Some(f32::NAN)] {
            if let (Some(special), true) = (special, n > 0) {
                logits[random.below(n)] = special;
            }
            let largest = |kernel: Ready<table::LargestOf>| {
                let mut found = Largest::default();
                kernel.run(&logits, &mut found);
                found
            };
            let expected = largest(scalar_row(table::LARGEST));
            let max = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
            let has_nan = logits.iter().any(|x| x.is_nan());
            assert_eq!(expected, Largest { max, has_nan });
            for (_, kernel) in vector_rows(table::LARGEST) {
                assert_eq!(largest(kernel), expected, "{}", kernel.name());
            }
            if has_nan {
                continue; // nobody weighs them
            }
            let weights = |kernel: Ready<table::Weigh>| {
                let mut weights = vec![9.0f32; n];
                kernel.run(&logits, max, &mut weights);
                weights.iter().map(|w| w.to_bits()).collect::<Vec<_>>()
            };
            let expected = weights(scalar_row(table::WEIGH));
            for (_, kernel) in vector_rows(table::WEIGH) {
                assert_eq!(weights(kernel), expected, "{}", kernel.name());
            }
        }
    }
}

#[test]
fn passes_over_scores_of_chunks_give_the_same_numbers() {
    let mut random = Random::new(9);
    for n in [0, 1, 15, 64, 100, 333] {
        let mut queries: Vec<Vec<f32>> = (0..3)
            .map(|_| (0..n).map(|_| random.float() * 9.0).collect())
            .collect();
        for special in [None, Some(f32::NEG_INFINITY), Some(f32::NAN)] {
            if let (Some(special), true) = (special, n > 0) {
                queries[random.below(3)][random.below(n)] = special;
            }
            // By the definition: how near a query's score comes to its best one.
            let best = |query: &Vec<f32>| query.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let key = |i: usize| {
                let below = queries.iter().map(|query| query[i] - best(query));
                let below = below.filter(|below| !below.is_nan());
                below.map(order).max().unwrap_or(i32::MIN)
            };
            let expected: Vec<i32> = (0..n).map(key).collect();
            let middle = expected.get(n / 2).copied().unwrap_or(0);
            for kernel in all_rows(table::RANK) {
                let mut keys = vec![i32::MIN; n];
                queries
                    .iter()
                    .for_each(|query| kernel.run(query, &mut keys));
                assert_eq!(keys, expected, "{}", kernel.name());
            }
            for least in [i32::MIN, middle, middle.saturating_add(1), i32::MAX] {
                let at_least = |i: &usize| expected[*i] >= least;
                let (above, below): (Vec<i32>, Vec<i32>) =
                    expected.iter().partition(|key| **key >= least);
                let sides = Sides {
                    n: above.len(),
                    least: above.into_iter().min().unwrap_or(i32::MAX),
                    most: below.into_iter().max().unwrap_or(i32::MIN),
                };
                for kernel in all_rows(table::DIVIDE) {
                    let mut found = Sides::default();
                    kernel.run(&expected, least, &mut found);
                    assert_eq!(found, sides, "{}", kernel.name());
                }
                for kernel in all_rows(table::MARK) {
                    let mut words = vec![!0u64; n.div_ceil(64)];
                    kernel.run(&expected, least, &mut words);
                    let is_set = |i: &usize| words[i / 64] >> (i % 64) & 1 == 1;
                    let name = kernel.name();
                    assert!((0..n).all(|i| is_set(&i) == at_least(&i)), "{name}");
                    let beyond = words
                        .last()
                        .map_or(0, |last| last.unbounded_shr((n - 1) as u32 % 64 + 1));
                    assert_eq!(beyond, 0, "{name}");
                }
            }
        }
    }
}
