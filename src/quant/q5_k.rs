//! 5 bits, 6-bit scale and minimum per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{
    Block, DType, QK_K, Quantize,
    q4_k::{Scaled, unpack_scales_mins},
    search::Steps,
};

/// A block of Q5_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ5K {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
    /// Eight 6-bit scales and eight 6-bit minima.
    pub scales: [u8; 12],
    /// The fifth bits: bit j of byte i is weight `32 * j + i`'s.
    pub qh: [u8; 32],
    /// Per 64 weights 32 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl BlockQ5K {
    /// The scales and the minima of the eight groups of 32 weights, 0 to 63.
    #[inline]
    pub fn scales_mins(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales_mins(&self.scales)
    }
}

impl Block for BlockQ5K {
    const DTYPE: DType = DType::Q5_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let dmin = super::f16_to_f32(self.dmin);
        let (scales, mins) = self.scales_mins();
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let scale = d * f32::from(scales[i]);
            let min = dmin * f32::from(mins[i]);
            let qs = &self.qs[i / 2 * 32..][..32];
            for ((out, q), h) in out.iter_mut().zip(qs).zip(self.qh) {
                let q = q >> (i % 2 * 4) & 15 | (h >> i & 1) << 4;
                *out = scale * f32::from(q) - min;
            }
        }
    }
}

impl Quantize for BlockQ5K {
    fn quantize(x: &[f32]) -> Self {
        const STEPS: Steps = Steps {
            first: -0.5,
            step: 0.1,
            last: 15,
        };
        let scaled = Scaled::new(x, 31, &STEPS);
        let mut qh = [0; 32];
        for (i, codes) in scaled.codes.iter().enumerate() {
            for (qh, q) in qh.iter_mut().zip(codes) {
                *qh |= (q >> 4) << i;
            }
        }
        Self {
            d: scaled.d,
            dmin: scaled.dmin,
            scales: scaled.scales,
            qh,
            qs: scaled.nibbles(),
        }
    }
}
