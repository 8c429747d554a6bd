//! 2 bits, 4-bit scale and minimum per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q2_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per 16 weights: scale in the low nibble, minimum in the high one.
    pub scales: [u8; 16],
    /// Two bits a weight.
    pub qs: [u8; 64],
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
}

impl Block for BlockQ2K {
    const DTYPE: DType = DType::Q2_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
