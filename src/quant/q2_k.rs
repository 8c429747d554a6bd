//! 2 bits, 4-bit scale and minimum per 16 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{
    Block, DType, QK_K, Quantize, f16_to_f32, f32_to_f16,
    search::{self, Affine, Steps},
};

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

/// Lays out 256 two-bit numbers as Q2_K, Q3_K and TQ2_0 do.
pub(super) fn pack2(codes: &[u8; QK_K]) -> [u8; 64] {
    std::array::from_fn(|i| {
        let at = i / 32 * 128 + i % 32;
        (0..4).fold(0, |byte, k| byte | (codes[at + 32 * k] & 3) << (2 * k))
    })
}

impl Quantize for BlockQ2K {
    fn quantize(x: &[f32]) -> Self {
        const STEPS: Steps = Steps {
            first: -0.5,
            step: 0.1,
            last: 15,
        };
        let groups = x.as_chunks::<16>().0;
        let mut codes = [[0; 16]; 16];
        let found: [_; 16] = std::array::from_fn(|i| {
            let x = &groups[i];
            search::affine(x, &x.map(f32::abs), 3, &STEPS, f32::abs, &mut codes[i])
        });
        let top = |of: fn(&Affine) -> f32| search::greatest(found.iter().map(of));
        let (scale, min) = (top(|a| a.scale), top(|a| a.min));
        // Numbers of 4 bits: the share of the greatest in fifteenths.
        let share = |of: f32, v: f32| {
            let inverse = if of > 0.0 { 15.0 / of } else { 0.0 };
            (search::nearest(inverse * v) & 15) as u8
        };
        let mut block = Self {
            scales: std::array::from_fn(|i| {
                share(scale, found[i].scale) | share(min, found[i].min) << 4
            }),
            qs: [0; 64],
            d: f32_to_f16(scale / 15.0),
            dmin: f32_to_f16(min / 15.0),
        };
        let (d, dmin) = (f16_to_f32(block.d), f16_to_f32(block.dmin));
        for ((codes, x), packed) in codes.iter_mut().zip(groups).zip(block.scales) {
            let (scale, min) = (d * f32::from(packed & 15), dmin * f32::from(packed >> 4));
            if scale != 0.0 {
                *codes = x.map(|x| search::nearest((x + min) / scale).clamp(0, 3) as u8);
            }
        }
        block.qs = pack2(bytemuck::cast_ref(&codes));
        block
    }
}
