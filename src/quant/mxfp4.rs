//! OCP microscaling: 4-bit floats (E2M1), one power of two per 32 weights.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of MXFP4.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// The exponent (E8M0).
    pub e: u8,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockMXFP4 {
    const DTYPE: DType = DType::MXFP4;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
