//! Random blocks of every weight format.

use kinglet::quant::DType;

use crate::common::Random;

/// Where the half floats of a block lie.
fn half_floats(dtype: DType) -> &'static [usize] {
    match dtype {
        DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::IQ4_XS => &[0],
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        DType::TQ1_0 => &[52],
        DType::TQ2_0 => &[64],
        DType::F16 => &[0],
        DType::F32 | DType::BF16 | DType::MXFP4 => &[],
    }
}

/// What the quants of a matrix are.
#[derive(Clone, Copy, Debug)]
pub enum Fill {
    Random,
    Byte(u8),
}

/// `n` blocks: all bits random or all bytes alike, scales finite (zeros and subnormals among them).
pub fn random_blocks(dtype: DType, n: usize, fill: Fill, random: &mut Random) -> Vec<u8> {
    let bytes = dtype.block_bytes();
    let mut data: Vec<u8> = (0..n * bytes)
        .map(|_| match fill {
            Fill::Random => random.bits() as u8,
            Fill::Byte(byte) => byte,
        })
        .collect();
    for block in data.chunks_exact_mut(bytes) {
        match dtype {
            DType::F32 => block.copy_from_slice(&random.float().to_le_bytes()),
            DType::BF16 => block.copy_from_slice(&random.float().to_le_bytes()[2..]),
            // An exponent around 1: powers of two beyond would overflow the sums.
            DType::MXFP4 => block[0] = 112 + random.below(32) as u8,
            _ => {}
        }
        for at in half_floats(dtype) {
            // Below 2 in magnitude; one in sixteen has a random exponent up to 65504.
            let bits = random.bits() as u16;
            let bits = match random.below(16) {
                0 if bits & 0x7c00 != 0x7c00 => bits,
                1 => bits & 0x83ff,
                _ => bits & 0xbfff,
            };
            block[*at..at + 2].copy_from_slice(&bits.to_le_bytes());
        }
    }
    data
}
