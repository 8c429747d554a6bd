//! 2 bits, 4-bit scale and minimum per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of Q2_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ2K {
    /// Per 16 weights: scale in the low nibble, minimum in the high one.
    pub scales: [u8; 16],
    /// Two bits a weight: 32 bytes serve 128 weights, the first 32 weights in bits 0 and 1.
    pub qs: [u8; 64],
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
}

impl Block for BlockQ2K {
    const DTYPE: DType = DType::Q2_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let dmin = super::f16_to_f32(self.dmin);
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(self.scales[i] & 15);
            let min = dmin * f32::from(self.scales[i] >> 4);
            let (qs, shift) = (group_bytes(&self.qs, i), group_shift(i));
            for (out, q) in out.iter_mut().zip(qs) {
                *out = scale * f32::from(q >> shift & 3) - min;
            }
        }
    }
}

/// The bytes that hold two bits of each of the weights `16 * i..16 * i + 16` (Q2_K and Q3_K): 32 bytes serve 128
/// weights, the first 32 weights in bits 0 and 1, the next 32 in bits 2 and 3 and so on.
pub(super) fn group_bytes(qs: &[u8; 64], i: usize) -> &[u8] {
    let at = i / 8 * 32 + i % 2 * 16;
    &qs[at..at + 16]
}

/// The position in those bytes.
pub(super) fn group_shift(i: usize) -> usize {
    i % 8 / 2 * 2
}
