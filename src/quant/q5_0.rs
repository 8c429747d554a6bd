//! 5 bits, one scale per 32 weights: `w[i] = d * (q[i] - 16)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of Q5_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_0 {
    /// The scale, a half float.
    pub d: u16,
    /// The fifth bit of weight i is bit i, little endian.
    pub qh: [u8; 4],
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockQ5_0 {
    const DTYPE: DType = DType::Q5_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        unimplemented!("{out:?}")
    }
}
