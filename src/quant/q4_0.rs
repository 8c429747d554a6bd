//! 4 bits, one scale per 32 weights: `w[i] = d * (q[i] - 8)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of Q4_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_0 {
    /// The scale, a half float.
    pub d: u16,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockQ4_0 {
    const DTYPE: DType = DType::Q4_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (i, q) in self.qs.into_iter().enumerate() {
            out[i] = d * (f32::from(q & 15) - 8.0);
            out[i + 16] = d * (f32::from(q >> 4) - 8.0);
        }
    }
}
