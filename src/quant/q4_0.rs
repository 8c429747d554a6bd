//! 4 bits, one scale per 32 weights: `w[i] = d * (q[i] - 8)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, f32_to_f16, search};

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

impl Quantize for BlockQ4_0 {
    /// The extreme weight becomes -8, so that its sign has the finer half.
    fn quantize(x: &[f32]) -> Self {
        let d = search::extreme(x) / -8.0;
        let inverse = search::inverse(d);
        let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
        Self {
            d: f32_to_f16(d),
            qs: std::array::from_fn(|i| code(x[i]) | code(x[i + 16]) << 4),
        }
    }
}
