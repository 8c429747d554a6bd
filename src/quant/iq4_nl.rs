//! 4 bits through a table of 16 values, one scale per 32 weights.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType};

/// What the sixteen codes of IQ4_NL and IQ4_XS stand for.
pub const KVALUES_IQ4NL: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// A block of IQ4_NL.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockIQ4NL {
    /// The scale, a half float.
    pub d: u16,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl Block for BlockIQ4NL {
    const DTYPE: DType = DType::IQ4_NL;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (i, q) in self.qs.into_iter().enumerate() {
            out[i] = d * f32::from(KVALUES_IQ4NL[usize::from(q & 15)]);
            out[i + 16] = d * f32::from(KVALUES_IQ4NL[usize::from(q >> 4)]);
        }
    }
}
