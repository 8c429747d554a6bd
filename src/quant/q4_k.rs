//! 4 bits, 6-bit scale and minimum per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q4_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
    /// Eight 6-bit scales and eight 6-bit minima.
    pub scales: [u8; 12],
    /// Per 64 weights 32 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl BlockQ4K {
    /// The scales and the minima of the eight groups of 32 weights, 0 to 63.
    #[inline]
    pub fn scales_mins(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales_mins(&self.scales)
    }
}

impl Block for BlockQ4K {
    const DTYPE: DType = DType::Q4_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let dmin = super::f16_to_f32(self.dmin);
        let (scales, mins) = self.scales_mins();
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let scale = d * f32::from(scales[i]);
            let min = dmin * f32::from(mins[i]);
            let qs = &self.qs[i / 2 * 32..][..32];
            for (out, q) in out.iter_mut().zip(qs) {
                *out = scale * f32::from(q >> (i % 2 * 4) & 15) - min;
            }
        }
    }
}

/// Eight 6-bit scales and eight 6-bit minima (Q4_K and Q5_K). Bytes 0 to 3 are scales 0 to 3, bytes 4 to 7 minima 0 to
/// 3, each with two bits to spare; bytes 8 to 11 hold the lower halves of scales and minima 4 to 7, whose upper two
/// bits are in the spare ones.
#[inline]
pub(super) fn unpack_scales_mins(p: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for i in 0..4 {
        scales[i] = p[i] & 63;
        mins[i] = p[i + 4] & 63;
        scales[i + 4] = p[i + 8] & 15 | p[i] >> 6 << 4;
        mins[i + 4] = p[i + 8] >> 4 | p[i + 4] >> 6 << 4;
    }
    (scales, mins)
}
