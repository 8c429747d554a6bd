//! 4 bits, scale and minimum per 32 weights: `w[i] = d * q[i] + m`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, f32_to_f16, search};

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

impl Quantize for BlockQ4_1 {
    fn quantize(x: &[f32]) -> Self {
        let (min, max) = search::range(x);
        let d = (max - min) / 15.0;
        let inverse = search::inverse(d);
        let code = |x: f32| (((x - min) * inverse + 0.5) as u8).min(15);
        Self {
            d: f32_to_f16(d),
            m: f32_to_f16(min),
            qs: std::array::from_fn(|i| code(x[i]) | code(x[i + 16]) << 4),
        }
    }
}
