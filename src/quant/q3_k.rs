//! 3 bits, 6-bit scale per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q3_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// The third bits.
    pub hmask: [u8; 32],
    /// The lower two bits.
    pub qs: [u8; 64],
    /// Sixteen 6-bit scales.
    pub scales: [u8; 12],
    /// Scale of the scales, a half float.
    pub d: u16,
}

impl Block for BlockQ3K {
    const DTYPE: DType = DType::Q3_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
