//! 5 bits, one scale per 32 weights: `w[i] = d * (q[i] - 16)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, f32_to_f16, search};

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
        let d = super::f16_to_f32(self.d);
        for (out, q) in out.iter_mut().zip(unpack(self.qh, &self.qs)) {
            *out = d * (f32::from(q) - 16.0);
        }
    }
}

/// The 32 five-bit numbers of a block of Q5_0 or Q5_1, in the order of the weights.
pub(super) fn unpack(qh: [u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let qh = u32::from_le_bytes(qh);
    std::array::from_fn(|i| {
        let low = if i < 16 { qs[i] & 15 } else { qs[i - 16] >> 4 };
        low | ((qh >> i & 1) as u8) << 4
    })
}

/// Lays out 32 five-bit numbers: the inverse of [`unpack`].
pub(super) fn pack(codes: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let mut qh = 0;
    for (i, q) in codes.iter().enumerate() {
        qh |= u32::from(q >> 4) << i;
    }
    let qs = std::array::from_fn(|i| codes[i] & 15 | (codes[i + 16] & 15) << 4);
    (qh.to_le_bytes(), qs)
}

impl Quantize for BlockQ5_0 {
    /// The extreme weight becomes -16, so that its sign has the finer half.
    fn quantize(x: &[f32]) -> Self {
        let d = search::extreme(x) / -16.0;
        let inverse = search::inverse(d);
        let codes = std::array::from_fn(|i| ((x[i] * inverse + 16.5) as u8).min(31));
        let (qh, qs) = pack(&codes);
        let d = f32_to_f16(d);
        Self { d, qh, qs }
    }
}
