//! 8 bits, one scale per 32 weights: `w[i] = d * q[i]`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// A block of Q8_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ8_0 {
    /// The scale, a half float.
    pub d: u16,
    /// The weights.
    pub qs: [i8; 32],
}

impl Block for BlockQ8_0 {
    const DTYPE: DType = DType::Q8_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (out, q) in out.iter_mut().zip(self.qs) {
            *out = d * f32::from(q);
        }
    }
}
