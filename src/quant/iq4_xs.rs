//! 4 bits through a table of 16 values, 6-bit scale per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K, iq4_nl::KVALUES_IQ4NL};

/// A block of IQ4_XS.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4XS {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// The upper two bits of the eight scales.
    pub scales_h: u16,
    /// The lower four bits of the eight scales.
    pub scales_l: [u8; 4],
    /// Per 32 weights 16 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl BlockIQ4XS {
    /// The scales of the eight groups of 32 weights, -32 to 31.
    #[inline]
    pub fn scales(&self) -> [i8; 8] {
        let high = self.scales_h;
        std::array::from_fn(|i| {
            let low = self.scales_l[i / 2] >> (i % 2 * 4) & 15;
            (low | ((high >> (i * 2) & 3) as u8) << 4) as i8 - 32
        })
    }
}

impl Block for BlockIQ4XS {
    const DTYPE: DType = DType::IQ4_XS;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let scales = self.scales();
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let scale = d * f32::from(scales[i]);
            let qs = &self.qs[i * 16..][..16];
            for (j, q) in qs.iter().enumerate() {
                out[j] = scale * f32::from(KVALUES_IQ4NL[usize::from(q & 15)]);
                out[j + 16] = scale * f32::from(KVALUES_IQ4NL[usize::from(q >> 4)]);
            }
        }
    }
}
