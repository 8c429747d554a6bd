//! Ternary weights, four to a byte, one scale per 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K, Quantize, f32_to_f16, q2_k::pack2, search};

/// A block of TQ2_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ2_0 {
    /// Two bits a weight: 32 bytes serve 128 weights, the first 32 weights in bits 0 and 1.
    pub qs: [u8; 64],
    /// The scale, a half float.
    pub d: u16,
}

impl Block for BlockTQ2_0 {
    const DTYPE: DType = DType::TQ2_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let qs = &self.qs[i / 4 * 32..][..32];
            for (out, q) in out.iter_mut().zip(qs) {
                *out = d * (f32::from(q >> (i % 4 * 2) & 3) - 1.0);
            }
        }
    }
}

impl Quantize for BlockTQ2_0 {
    fn quantize(x: &[f32]) -> Self {
        let d = search::magnitude(x);
        let inverse = search::inverse(d);
        let code = |x: f32| (search::nearest_away((x * inverse).clamp(-1.0, 1.0)) + 1) as u8;
        Self {
            qs: pack2(&std::array::from_fn(|i| code(x[i]))),
            d: f32_to_f16(d),
        }
    }
}
