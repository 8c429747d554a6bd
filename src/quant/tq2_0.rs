//! Ternary weights, four to a byte, one scale per 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of TQ2_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ2_0 {
    /// Two bits a weight.
    pub qs: [u8; 64],
    /// The scale, a half float.
    pub d: u16,
}

impl Block for BlockTQ2_0 {
    const DTYPE: DType = DType::TQ2_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
