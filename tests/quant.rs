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

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
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
