//! 4 bits through a table of 16 values, 6-bit scale per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of IQ4_XS.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4XS {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// The upper two bits of the eight scales.
    pub scales_h: u16,
    /// The lower four bits of the eight scales.
    pub scales_l: [u8; 4],
    /// Per 32 weights 16 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl Block for BlockIQ4XS {
    const DTYPE: DType = DType::IQ4_XS;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
