//! 4 bits through a table of 16 values, one scale per 32 weights.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of IQ4_NL.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4NL {
    /// The scale, a half float.
    pub d: u16,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockIQ4NL {
    const DTYPE: DType = DType::IQ4_NL;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
