//! 3 bits, 6-bit scale per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{
    Block, DType, QK_K,
    q2_k::{group_bytes, group_shift},
};

/// A block of Q3_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ3K {
    /// The third bits: bit j of byte i is weight `32 * j + i`'s.
    pub hmask: [u8; 32],
    /// The lower two bits, laid out as in Q2_K.
    pub qs: [u8; 64],
    /// Sixteen 6-bit scales: the lower four bits in eight bytes, the upper two in four.
    pub scales: [u8; 12],
    /// Scale of the scales, a half float.
    pub d: u16,
}

impl BlockQ3K {
    /// The scales of the sixteen groups of 16 weights, -32 to 31.
    pub fn scales(&self) -> [i8; 16] {
        std::array::from_fn(|i| {
            let low = self.scales[i % 8] >> (i / 8 * 4) & 15;
            let high = self.scales[8 + i % 4] >> (i / 4 * 2) & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

impl Block for BlockQ3K {
    const DTYPE: DType = DType::Q3_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let scales = self.scales();
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(scales[i]);
            let (qs, shift) = (group_bytes(&self.qs, i), group_shift(i));
            let hmask = &self.hmask[i % 2 * 16..][..16];
            for ((out, q), h) in out.iter_mut().zip(qs).zip(hmask) {
                let q = q >> shift & 3 | (h >> (i / 2) & 1) << 2;
                *out = scale * (f32::from(q) - 4.0);
            }
        }
    }
}
