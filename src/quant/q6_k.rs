//! 6 bits, 8-bit scale per 16 weights, super-blocks of 256: `w[i] = d * scale * (q[i] - 32)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q6_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// The lower four bits.
    pub ql: [u8; 128],
    /// The upper two bits.
    pub qh: [u8; 64],
    /// Per 16 weights.
    pub scales: [i8; 16],
    /// Scale of the scales, a half float.
    pub d: u16,
}

impl Block for BlockQ6K {
    const DTYPE: DType = DType::Q6_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
