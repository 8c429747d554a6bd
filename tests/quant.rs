//! Weight formats against ggml's answers (`data/quant/README.md`), and what must hold for any input.

use kinglet::quant::{self, DType};
use proptest::prelude::*;

const N_RANDOM: usize = 768;

fn read(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/data/quant/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

fn dequantize(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    // Blocks want an alignment of up to 4.
    let mut aligned = vec![0_u32; bytes.len().div_ceil(4)];
    let aligned = &mut bytemuck::cast_slice_mut(&mut aligned)[..bytes.len()];
    aligned.copy_from_slice(bytes);
    let mut out = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    quant::dequantize(dtype, aligned, &mut out);
    out
}

fn quantize(dtype: DType, x: &[f32]) -> Vec<u8> {
    let mut out = vec![0; dtype.row_bytes(x.len()).unwrap()];
    quant::quantize(dtype, x, &mut out);
    out
}

/// What `make.py` wrote for a format.
struct Golden {
    blocks: Vec<u8>,
    weights: Vec<f32>,
    /// `weights.f32` quantized; empty for formats that are only read.
    quantized: Vec<u8>,
}

fn golden(dtype: DType) -> Golden {
    let all = read(&format!("{}.bin", dtype.name().to_ascii_lowercase()));
    let (blocks, rest) = all.split_at(dtype.row_bytes(N_RANDOM).unwrap());
    let (weights, quantized) = rest.split_at(4 * N_RANDOM);
    Golden {
        blocks: blocks.to_vec(),
        weights: floats(weights),
        quantized: quantized.to_vec(),
    }
}

fn formats() -> impl Iterator<Item = DType> {
    DType::ALL.iter().copied().filter(|t| *t != DType::F32)
}

fn quantizers() -> impl Iterator<Item = DType> {
    DType::ALL.iter().copied().filter(|t| t.can_quantize())
}

#[test]
fn dequantize_equals_ggml() {
    for dtype in formats() {
        let golden = golden(dtype);
        let ours = dequantize(dtype, &golden.blocks);
        for (i, (ours, theirs)) in ours.iter().zip(&golden.weights).enumerate() {
            assert_eq!(
                ours.to_bits(),
                theirs.to_bits(),
                "{dtype} weight {i}: {ours} {theirs}"
            );
        }
    }
}

#[test]
fn quantize_equals_ggml() {
    let x = floats(&read("weights.f32"));
    for dtype in formats().filter(|t| t.can_quantize()) {
        let golden = golden(dtype);
        assert!(!golden.quantized.is_empty(), "{dtype}: no golden blocks");
        let size = dtype.block_bytes();
        let ours = quantize(dtype, &x);
        assert_eq!(ours.len(), golden.quantized.len(), "{dtype}");
        let blocks = ours.chunks(size).zip(golden.quantized.chunks(size));
        for (i, (ours, theirs)) in blocks.enumerate() {
            let row = i * dtype.block_len() / 256;
            assert_eq!(ours, theirs, "{dtype} block {i} (row {row})");
        }
    }
}

#[test]
fn sizes_are_ggmls() {
    let sizes = DType::ALL
        .iter()
        .map(|t| (t.name(), *t as u32, t.block_len(), t.block_bytes()));
    let expected = [
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84),
        ("Q3_K", 11, 256, 110),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
        ("IQ4_NL", 20, 32, 18),
        ("IQ4_XS", 23, 256, 136),
        ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54),
        ("TQ2_0", 35, 256, 66),
        ("MXFP4", 39, 32, 17),
    ];
    assert!(sizes.eq(expected));
}

#[test]
fn names_and_numbers() {
    for dtype in DType::ALL.iter().copied() {
        assert_eq!(DType::from_id(dtype as u32), Some(dtype));
        assert_eq!(DType::from_name(dtype.name()), Some(dtype));
        assert_eq!(DType::from_name(&dtype.name().to_lowercase()), Some(dtype));
        assert_eq!(dtype.to_string(), dtype.name());
    }
    for id in [4, 5, 9, 15, 16, 31, 36, 40, u32::MAX] {
        assert_eq!(DType::from_id(id), None, "{id}");
    }
    for name in ["", "Q4", "Q4_K_M", "Q4_0 ", "IQ2_S"] {
        assert_eq!(DType::from_name(name), None, "{name}");
    }
}

#[test]
fn row_bytes_are_whole_blocks_and_fit() {
    assert_eq!(DType::Q4_0.row_bytes(0), Some(0));
    assert_eq!(DType::Q4_0.row_bytes(4096), Some(2304));
    assert_eq!(DType::Q6_K.row_bytes(1024), Some(840));
    for dtype in DType::ALL.iter().copied() {
        let (len, size) = (dtype.block_len(), dtype.block_bytes());
        let most = usize::MAX / len * len;
        assert_eq!(dtype.row_bytes(most).is_some(), size <= len, "{dtype}");
        if len > 1 {
            for n in [1, len - 1, len + 1, usize::MAX] {
                assert_eq!(dtype.row_bytes(n), None, "{dtype} {n}");
            }
        }
    }
}

#[test]
fn only_some_formats_are_read_only() {
    let read_only = DType::ALL.iter().filter(|t| !t.can_quantize());
    assert!(read_only.eq(&[DType::IQ4_NL, DType::IQ4_XS, DType::TQ1_0]));
}

/// The most by which a weight may change, in parts of the greatest magnitude among the 256 weights of a row.
fn error_bound(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
        DType::Q8_0 => 0.6 / 127.0,
        // The extreme weight takes the end of the side with one code more: its opposite is a whole step off.
        DType::Q4_0 => 1.05 / 8.0,
        DType::Q5_0 => 1.05 / 16.0,
        // Steps of (max - min) / codes, off by half of one.
        DType::Q4_1 => 1.05 / 15.0,
        DType::Q5_1 => 1.1 / 31.0,
        // Codes reach to 6, magnitudes to 8.
        DType::MXFP4 => 2.0 / 8.0,
        DType::TQ2_0 => 0.501,
        // Half a step, and as much again for scales and minima of six bits. No row of 40,000 reached these.
        DType::Q6_K => 0.035,
        DType::Q5_K => 0.08,
        DType::Q4_K => 0.14,
        // A quarter as Q4_0's eighth, and scales of six bits.
        DType::Q3_K => 0.25 + 1.0 / 32.0,
        DType::Q2_K => 0.55,
        _ => unreachable!("{dtype} is read only"),
    }
}

/// A row with groups of several sizes.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let group = (-3.0..3.0_f32, prop::collection::vec(-1.0..1.0_f32, 16));
    prop::collection::vec(group, 16).prop_map(|groups| {
        let scaled = |(e, x): (f32, Vec<f32>)| x.into_iter().map(move |x| x * e.exp2());
        groups.into_iter().flat_map(scaled).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn errors_are_bounded(x in row()) {
        let top = x.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        for dtype in quantizers() {
            let back = dequantize(dtype, &quantize(dtype, &x));
            for (x, back) in x.iter().zip(&back) {
                let bound = top * error_bound(dtype);
                prop_assert!((x - back).abs() <= bound, "{dtype}: {x} became {back}, top {top}");
            }
        }
    }

    /// Where the extreme weight is met exactly, what comes out is met exactly too.
    #[test]
    fn exact_formats_are_idempotent(x in row()) {
        let exact = [
            DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q5_0, DType::TQ2_0, DType::MXFP4,
        ];
        for dtype in exact {
            let once = dequantize(dtype, &quantize(dtype, &x));
            let twice = dequantize(dtype, &quantize(dtype, &once));
            for (once, twice) in once.iter().zip(&twice) {
                prop_assert_eq!(once, twice, "{}", dtype);
            }
        }
    }

    /// Each block depends on its own weights only.
    #[test]
    fn blocks_are_independent(a in row(), b in row()) {
        let both = [a.clone(), b.clone()].concat();
        for dtype in quantizers() {
            let apart = [quantize(dtype, &a), quantize(dtype, &b)].concat();
            prop_assert_eq!(quantize(dtype, &both), apart, "{}", dtype);
        }
    }

    #[test]
    fn any_floats_can_be_quantized(bits in prop::collection::vec(any::<u32>(), 256)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for dtype in quantizers() {
            quantize(dtype, &x);
        }
    }

    /// Any magnitude from the smallest subnormal up to one whose scale a half float holds comes back finite.
    #[test]
    fn finite_stays_finite(x in row(), exponent in -149..12_i32) {
        let x: Vec<f32> = x.iter().map(|x| x * 2_f32.powi(exponent)).collect();
        for dtype in quantizers() {
            let back = dequantize(dtype, &quantize(dtype, &x));
            prop_assert!(back.iter().all(|x| x.is_finite()), "{dtype}: {x:?}");
        }
    }

    #[test]
    fn any_bytes_can_be_dequantized(bytes in prop::collection::vec(any::<u8>(), 1024)) {
        for dtype in DType::ALL.iter().copied() {
            let whole = bytes.len() / dtype.block_bytes() * dtype.block_bytes();
            dequantize(dtype, &bytes[..whole]);
        }
    }
}

#[test]
fn peculiar_floats_can_be_quantized() {
    let peculiar = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        -0.0,
    ];
    for dtype in quantizers() {
        for first in peculiar {
            for rest in peculiar.into_iter().chain([0.0, 1.0]) {
                let mut x = [rest; 256];
                x[0] = first;
                quantize(dtype, &x);
            }
        }
    }
}
