//! Ternary weights, five to a byte, one scale per 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of TQ1_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ1_0 {
    /// 240 weights.
    pub qs: [u8; 48],
    /// The last 16 weights, four to a byte.
    pub qh: [u8; 4],
    /// The scale, a half float.
    pub d: u16,
}

impl Block for BlockTQ1_0 {
    const DTYPE: DType = DType::TQ1_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
