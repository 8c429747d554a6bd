//! Ternary weights, five to a byte, one scale per 256.

use bytemuck::{Pod, Zeroable};

use super::{Block, DType, QK_K};

/// A block of TQ1_0.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockTQ1_0 {
    /// 240 weights.
    pub qs: [u8; 48],
    /// The last 16 weights, four to a byte.
    pub qh: [u8; 4],
    /// The scale, a half float.
    pub d: u16,
}

impl Block for BlockTQ1_0 {
    const DTYPE: DType = DType::TQ1_0;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        // 32 bytes serve 160 weights, 16 bytes 80, four bytes the last 16.
        let (head, tail) = self.qs.split_at(32);
        let (out_head, out) = out.split_at_mut(160);
        let (out_tail, out_last) = out.split_at_mut(80);
        for (bytes, out) in [(head, out_head), (tail, out_tail), (&self.qh, out_last)] {
            for (n, out) in out.chunks_exact_mut(bytes.len()).enumerate() {
                for (out, byte) in out.iter_mut().zip(bytes) {
                    *out = d * (f32::from(trit(*byte, n)) - 1.0);
                }
            }
        }
    }
}

/// Trit `n` of a byte. The byte is the five trits as a fraction: 0.t0t1t2t3t4 in base 3, times 256, rounded up; so
/// multiplying by 3 moves the next trit in front of the point.
fn trit(byte: u8, n: usize) -> u8 {
    const POW3: [u8; 5] = [1, 3, 9, 27, 81];
    ((u16::from(byte.wrapping_mul(POW3[n])) * 3) >> 8) as u8
}
