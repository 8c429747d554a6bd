//! OCP microscaling: 4-bit floats (E2M1), one power of two per 32 weights.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, Quantize, search};

/// What the sixteen codes stand for: E2M1 times two, so that all are whole numbers.
pub const KVALUES_MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A block of MXFP4.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockMXFP4 {
    /// The exponent (E8M0).
    pub e: u8,
    /// Low nibbles are weights 0..16, high nibbles 16..32.
    pub qs: [u8; 16],
}

impl BlockMXFP4 {
    /// The scale of [`KVALUES_MXFP4`]: `2^(e - 128)`, that is half of what E8M0 says. Like ggml it takes `e = 255` as a
    /// number too (OCP: NaN).
    #[inline]
    pub fn scale(&self) -> f32 {
        exponent(self.e)
    }
}

impl Block for BlockMXFP4 {
    const DTYPE: DType = DType::MXFP4;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.scale();
        for (i, q) in self.qs.into_iter().enumerate() {
            out[i] = d * f32::from(KVALUES_MXFP4[usize::from(q & 15)]);
            out[i + 16] = d * f32::from(KVALUES_MXFP4[usize::from(q >> 4)]);
        }
    }
}

/// `2^(e - 128)`.
pub(super) fn exponent(e: u8) -> f32 {
    f32::from_bits(match e {
        0 => 0x0020_0000, // subnormal
        1 => 0x0040_0000, // subnormal
        _ => u32::from(e - 1) << 23,
    })
}

impl Quantize for BlockMXFP4 {
    /// The exponent makes the greatest magnitude fall into 4..8, of which the codes reach 6; each weight takes the
    /// nearest code, the first of equals.
    fn quantize(x: &[f32]) -> Self {
        let top = search::magnitude(x);
        // `log2` may round up to the next whole number just below a power of two. So it does in ggml.
        let e = if top > 0.0 {
            (top.log2().floor() + 125.0) as u8
        } else {
            0
        };
        let d = exponent(e);
        let code = |x: f32| {
            let error = |i: usize| (f32::from(KVALUES_MXFP4[i]) * d - x).abs();
            (1..16).fold(0, |best, i| if error(i) < error(best) { i } else { best }) as u8
        };
        Self {
            e,
            qs: std::array::from_fn(|i| code(x[i]) | code(x[i + 16]) << 4),
        }
    }
}
