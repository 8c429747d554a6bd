//! 4 bits, 6-bit scale and minimum per 32 weights, super-blocks of 256.

use bytemuck::{Pod, Zeroable};

use super::{
    Block, DType, QK_K, Quantize, f16_to_f32, f32_to_f16,
    search::{self, Affine, Steps},
};

/// A block of Q4_K.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct BlockQ4K {
    /// Scale of the scales, a half float.
    pub d: u16,
    /// Scale of the minima, a half float.
    pub dmin: u16,
    /// Eight 6-bit scales and eight 6-bit minima.
    pub scales: [u8; 12],
    /// Per 64 weights 32 bytes: low nibbles first.
    pub qs: [u8; 128],
}

impl BlockQ4K {
    /// The scales and the minima of the eight groups of 32 weights, 0 to 63.
    #[inline]
    pub fn scales_mins(&self) -> ([u8; 8], [u8; 8]) {
        unpack_scales_mins(&self.scales)
    }
}

impl Block for BlockQ4K {
    const DTYPE: DType = DType::Q4_K;
    const LEN: usize = QK_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = super::f16_to_f32(self.d);
        let dmin = super::f16_to_f32(self.dmin);
        let (scales, mins) = self.scales_mins();
        for (i, out) in out.chunks_exact_mut(32).enumerate() {
            let scale = d * f32::from(scales[i]);
            let min = dmin * f32::from(mins[i]);
            let qs = &self.qs[i / 2 * 32..][..32];
            for (out, q) in out.iter_mut().zip(qs) {
                *out = scale * f32::from(q >> (i % 2 * 4) & 15) - min;
            }
        }
    }
}

/// Eight 6-bit scales and eight 6-bit minima (Q4_K and Q5_K). Bytes 0 to 3 are scales 0 to 3, bytes 4 to 7 minima 0 to
/// 3, each with two bits to spare; bytes 8 to 11 hold the lower halves of scales and minima 4 to 7, whose upper two
/// bits are in the spare ones.
#[inline]
pub(super) fn unpack_scales_mins(p: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for i in 0..4 {
        scales[i] = p[i] & 63;
        mins[i] = p[i + 4] & 63;
        scales[i + 4] = p[i + 8] & 15 | p[i] >> 6 << 4;
        mins[i + 4] = p[i + 8] >> 4 | p[i + 4] >> 6 << 4;
    }
    (scales, mins)
}

/// Lays out eight 6-bit scales and eight 6-bit minima: the inverse of [`unpack_scales_mins`].
pub(crate) fn pack_scales_mins(scales: &[u8; 8], mins: &[u8; 8]) -> [u8; 12] {
    std::array::from_fn(|i| match i {
        0..4 => scales[i] | scales[i + 4] >> 4 << 6,
        4..8 => mins[i - 4] | mins[i] >> 4 << 6,
        _ => scales[i - 4] & 15 | mins[i - 4] << 4,
    })
}

/// What Q4_K and Q5_K have in common: everything but where the bits of the codes go.
pub(super) struct Scaled {
    pub d: u16,
    pub dmin: u16,
    pub scales: [u8; 12],
    pub codes: [[u8; 32]; 8],
}

impl Scaled {
    /// Codes `0..=n` for the 256 weights `x`.
    pub fn new(x: &[f32], n: u8, steps: &Steps) -> Self {
        let groups = x.as_chunks::<32>().0;
        let mut codes = [[0; 32]; 8];
        let found: [Affine; 8] = std::array::from_fn(|i| {
            let x = &groups[i];
            let mut squares = 0.0;
            for x in x {
                squares += x * x;
            }
            let rms = (squares / 32.0).sqrt();
            let weights = x.map(|x| rms + x.abs());
            search::affine(x, &weights, n, steps, |e| e * e, &mut codes[i])
        });
        let top = |of: fn(&Affine) -> f32| search::greatest(found.iter().map(of));
        let (scale, min) = (top(|a| a.scale), top(|a| a.min));
        // Numbers of 6 bits: the share of the greatest in 63rds.
        let share = |of: f32, v: f32| {
            let inverse = if of > 0.0 { 63.0 / of } else { 0.0 };
            (search::nearest(inverse * v) as u8).min(63)
        };
        let scales = std::array::from_fn(|i| share(scale, found[i].scale));
        let mins = std::array::from_fn(|i| share(min, found[i].min));
        let (d, dmin) = (f32_to_f16(scale / 63.0), f32_to_f16(min / 63.0));
        for (i, x) in groups.iter().enumerate() {
            let scale = f16_to_f32(d) * f32::from(scales[i]);
            let min = f16_to_f32(dmin) * f32::from(mins[i]);
            if scale != 0.0 {
                let code = |x: f32| search::nearest((x + min) / scale).clamp(0, i32::from(n));
                codes[i] = x.map(|x| code(x) as u8);
            }
        }
        Self {
            d,
            dmin,
            scales: pack_scales_mins(&scales, &mins),
            codes,
        }
    }

    /// The lower four bits of the codes, 32 bytes per two groups.
    pub fn nibbles(&self) -> [u8; 128] {
        std::array::from_fn(|i| {
            let (pair, at) = (i / 32 * 2, i % 32);
            self.codes[pair][at] & 15 | self.codes[pair + 1][at] << 4
        })
    }
}

impl Quantize for BlockQ4K {
    fn quantize(x: &[f32]) -> Self {
        const STEPS: Steps = Steps {
            first: -1.0,
            step: 0.1,
            last: 20,
        };
        let scaled = Scaled::new(x, 15, &STEPS);
        Self {
            d: scaled.d,
            dmin: scaled.dmin,
            scales: scaled.scales,
            qs: scaled.nibbles(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_and_minima_come_back() {
        for i in 0..64 {
            let scales = std::array::from_fn(|j| (i + 7 * j as u8) % 64);
            let mins = std::array::from_fn(|j| (63 - i + 5 * j as u8) % 64);
            let packed = pack_scales_mins(&scales, &mins);
            assert_eq!(unpack_scales_mins(&packed), (scales, mins));
        }
    }
}
