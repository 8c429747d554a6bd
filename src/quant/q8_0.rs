//! 8 bits, one scale per 32 weights: `w[i] = d * q[i]`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, f32_to_f16, search};

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

impl Quantize for BlockQ8_0 {
    fn quantize(x: &[f32]) -> Self {
        let d = search::magnitude(x) / 127.0;
        let inverse = search::inverse(d);
        Self {
            d: f32_to_f16(d),
            qs: std::array::from_fn(|i| search::nearest_away(x[i] * inverse) as i8),
        }
    }
}
