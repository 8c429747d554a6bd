//! 3 bits, 6-bit scale per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{
    Block, DType, QK_K, Quantize, f16_to_f32, f32_to_f16,
    q2_k::{group_bytes, group_shift, pack2},
    search,
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
    /// The scale of group `i` of 16 weights, -32 to 31.
    #[inline]
    pub fn scale(&self, i: usize) -> i8 {
        let low = self.scales[i % 8] >> (i / 8 % 2 * 4) & 15;
        let high = self.scales[8 + i % 4] >> (i / 4 % 4 * 2) & 3;
        (low | high << 4) as i8 - 32
    }
}

impl Block for BlockQ3K {
    const DTYPE: DType = DType::Q3_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let scale = d * f32::from(self.scale(i));
            let (qs, shift) = (group_bytes(&self.qs, i), group_shift(i));
            let hmask = &self.hmask[i % 2 * 16..][..16];
            for ((out, q), h) in out.iter_mut().zip(qs).zip(hmask) {
                let q = q >> shift & 3 | (h >> (i / 2) & 1) << 2;
                *out = scale * (f32::from(q) - 4.0);
            }
        }
    }
}

impl Quantize for BlockQ3K {
    fn quantize(x: &[f32]) -> Self {
        let groups = x.as_chunks::<16>().0;
        let mut codes = [[0; 16]; 16];
        let found: [f32; 16] =
            std::array::from_fn(|i| search::descent(&groups[i], 4, &mut codes[i]));
        // The extreme scale becomes -32; where all are zero the six bits are too.
        let top = search::extreme(&found);
        let inverse = -32.0 / top;
        let scales = if top == 0.0 {
            [0; 16]
        } else {
            found.map(|s| (search::nearest(inverse * s).clamp(-32, 31) + 32) as u8)
        };
        let mut block = Self {
            hmask: [0; 32],
            qs: [0; 64],
            scales: pack_scales(&scales),
            d: f32_to_f16(if top == 0.0 { 0.0 } else { 1.0 / inverse }),
        };
        let d = f16_to_f32(block.d);
        let scales = (0..16).map(|i| block.scale(i));
        for ((codes, x), scale) in codes.iter_mut().zip(groups).zip(scales) {
            let scale = d * f32::from(scale);
            if scale != 0.0 {
                *codes = x.map(|x| (search::nearest(x / scale).clamp(-4, 3) + 4) as u8);
            }
        }
        let codes: &[u8; QK_K] = bytemuck::cast_ref(&codes);
        for (i, q) in codes.iter().enumerate() {
            block.hmask[i % 32] |= (q >> 2) << (i / 32);
        }
        block.qs = pack2(codes);
        block
    }
}

/// Lays out sixteen 6-bit numbers.
fn pack_scales(scales: &[u8; 16]) -> [u8; 12] {
    let mut packed = [0; 12];
    for (i, s) in scales.iter().enumerate() {
        packed[i % 8] |= (s & 15) << (i / 8 * 4);
        packed[8 + i % 4] |= (s >> 4) << (i / 4 * 2);
    }
    packed
}
