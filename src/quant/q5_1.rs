//! 5 bits, scale and minimum per 32 weights: `w[i] = d * q[i] + m`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, q5_0};

/// A block of Q5_1.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5_1 {
    /// The scale, a half float.
    pub d: u16,
    /// The minimum, a half float.
    pub m: u16,
    /// The fifth bit of weight i is bit i, little endian.
    pub qh: [u8; 4],
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockQ5_1 {
    const DTYPE: DType = DType::Q5_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let m = super::f16_to_f32(self.m);
        for (out, q) in out.iter_mut().zip(q5_0::unpack(self.qh, &self.qs)) {
            *out = d * f32::from(q) + m;
        }
    }
}
