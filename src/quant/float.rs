//! Plain floats: a block is one weight.

use bytemuck::{Pod, Zeroable};
use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::{Block, DType, Quantize, f16_to_f32, f32_to_f16};

/// A 32-bit float.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub struct BlockF32(pub f32);

/// A 16-bit float's bits.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub struct BlockF16(pub u16);

/// The upper half of a 32-bit float's bits.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(transparent)]
pub struct BlockBF16(pub u16);

impl Block for BlockF32 {
    const DTYPE: DType = DType::F32;
    const LEN: usize = 1;
    fn dequantize(&self, out: &mut [f32]) {
        out[0] = self.0;
    }
}

impl Block for BlockF16 {
    const DTYPE: DType = DType::F16;
    const LEN: usize = 1;
    fn dequantize(&self, out: &mut [f32]) {
        out[0] = f16_to_f32(self.0);
    }
    fn dequantize_all(blocks: &[Self], out: &mut [f32]) {
        let halves: &[f16] = bytemuck::cast_slice::<_, u16>(blocks).reinterpret_cast();
        halves.convert_to_f32_slice(out);
    }
}

impl Block for BlockBF16 {
    const DTYPE: DType = DType::BF16;
    const LEN: usize = 1;
    fn dequantize(&self, out: &mut [f32]) {
        out[0] = f32::from_bits(u32::from(self.0) << 16);
    }
}

impl Quantize for BlockF32 {
    fn quantize(x: &[f32]) -> Self {
        Self(x[0])
    }
}

impl Quantize for BlockF16 {
    fn quantize(x: &[f32]) -> Self {
        Self(f32_to_f16(x[0]))
    }
}

impl Quantize for BlockBF16 {
    fn quantize(x: &[f32]) -> Self {
        Self(half::bf16::from_f32(x[0]).to_bits())
    }
}
