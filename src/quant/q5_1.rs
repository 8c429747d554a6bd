//! 5 bits, scale and minimum per 32 weights: `w[i] = d * q[i] + m`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, f32_to_f16, q5_0, search};

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

impl Quantize for BlockQ5_1 {
    fn quantize(x: &[f32]) -> Self {
        let (min, max) = search::range(x);
        let d = (max - min) / 31.0;
        let inverse = search::inverse(d);
        let codes = std::array::from_fn(|i| (((x[i] - min) * inverse + 0.5) as u8).min(31));
        let (qh, qs) = q5_0::pack(&codes);
        let (d, m) = (f32_to_f16(d), f32_to_f16(min));
        Self { d, m, qh, qs }
    }
}
