//! 6 bits, 8-bit scale per 16 weights, super-blocks of 256: `w[i] = d * scale * (q[i] - 32)`.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K, Quantize, f16_to_f32, f32_to_f16, search};

/// A block of Q6_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ6K {
    /// The lower four bits: 64 bytes serve 128 weights, the first 64 weights in the low nibbles.
    pub ql: [u8; 128],
    /// The upper two bits: 32 bytes serve 128 weights, the first 32 weights in bits 0 and 1.
    pub qh: [u8; 64],
    /// Per 16 weights.
    pub scales: [i8; 16],
    /// Scale of the scales, a half float.
    pub d: u16,
}

impl Block for BlockQ6K {
    const DTYPE: DType = DType::Q6_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(self.scales[i]);
            // 128 weights take 64 bytes of `ql` and 32 of `qh`.
            let (half, i) = (i / 8, i % 8);
            let ql = &self.ql[half * 64 + i % 4 * 16..][..16];
            let qh = &self.qh[half * 32 + i % 2 * 16..][..16];
            for ((out, l), h) in out.iter_mut().zip(ql).zip(qh) {
                let q = l >> (i / 4 * 4) & 15 | (h >> (i / 2 * 2) & 3) << 4;
                *out = scale * (f32::from(q) - 32.0);
            }
        }
    }
}

impl Quantize for BlockQ6K {
    fn quantize(x: &[f32]) -> Self {
        let groups = x.as_chunks::<16>().0;
        let mut codes = [[0; 16]; 16];
        let found: [f32; 16] =
            std::array::from_fn(|i| search::symmetric(&groups[i], 32, &mut codes[i]));
        let top = search::extreme(&found);
        if top.abs() < search::ZERO {
            return Self::zeroed();
        }
        // The extreme scale becomes -128.
        let inverse = -128.0 / top;
        let mut block = Self {
            ql: [0; 128],
            qh: [0; 64],
            scales: found.map(|s| search::nearest(inverse * s).min(127) as i8),
            d: f32_to_f16(1.0 / inverse),
        };
        let d = f16_to_f32(block.d);
        for ((codes, x), scale) in codes.iter_mut().zip(groups).zip(block.scales) {
            let scale = d * f32::from(scale);
            if scale != 0.0 {
                *codes = x.map(|x| (search::nearest(x / scale).clamp(-32, 31) + 32) as u8);
            }
        }
        let codes: &[u8; QK_K] = bytemuck::cast_ref(&codes);
        for (i, q) in codes.iter().enumerate() {
            let (half, i) = (i / 128, i % 128);
            block.ql[half * 64 + i % 64] |= (q & 15) << (i / 64 * 4);
            block.qh[half * 32 + i % 32] |= (q >> 4) << (i / 32 * 2);
        }
        block
    }
}
