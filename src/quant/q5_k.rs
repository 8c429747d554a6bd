//! 5 bits, 6-bit scale and minimum per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q5_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
    /// Eight 6-bit scales and eight 6-bit minima.
    pub scales: [u8; 12],
    /// The fifth bits.
    pub qh: [u8; 32],
    /// Per 64 weights 32 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl Block for BlockQ5K {
    const DTYPE: DType = DType::Q5_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
