//! 4 bits, scale and minimum per 32 weights: `w[i] = d * q[i] + m`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of Q4_1.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4_1 {
    /// The scale, a half float.
    pub d: u16,
    /// The minimum, a half float.
    pub m: u16,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockQ4_1 {
    const DTYPE: DType = DType::Q4_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let m = super::f16_to_f32(self.m);
        for (i, q) in self.qs.into_iter().enumerate() {
            out[i] = d * f32::from(q & 15) + m;
            out[i + 16] = d * f32::from(q >> 4) + m;
        }
    }
}
