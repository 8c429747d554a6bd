//! Weight formats: block layouts (bit-compatible with ggml), sizes, dequantize, quantize. One file per format.
//!
//! A row of `n` weights is `n / block_len` blocks. Blocks are plain structs cast from the mapped bytes; half floats
//! are kept as their bits (`u16`, little endian). Blocks have an alignment of 1 or 2, GGUF aligns tensors to at
//! least 8.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;

mod float;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod search;
mod tq1_0;
mod tq2_0;

pub use self::{
    float::{BlockBF16, BlockF16, BlockF32},
    iq4_nl::{BlockIQ4NL, KVALUES_IQ4NL},
    iq4_xs::BlockIQ4XS,
    mxfp4::{BlockMXFP4, KVALUES_MXFP4},
    q2_k::BlockQ2K,
    q3_k::BlockQ3K,
    q4_0::BlockQ4_0,
    q4_1::BlockQ4_1,
    q4_k::BlockQ4K,
    q5_0::BlockQ5_0,
    q5_1::BlockQ5_1,
    q5_k::BlockQ5K,
    q6_k::BlockQ6K,
    q8_0::BlockQ8_0,
    tq1_0::BlockTQ1_0,
    tq2_0::BlockTQ2_0,
};

pub(crate) use self::q4_k::pack_scales_mins;

/// Length of a super-block: the K, IQ4_XS and TQ formats.
pub const QK_K: usize = 256;

/// A block of a weight format, as it lies in the file.
pub trait Block: Pod {
    /// The format.
    const DTYPE: DType;
    /// Weights in a block.
    const LEN: usize;
    /// Writes the `LEN` weights of the block to `out`.
    fn dequantize(&self, out: &mut [f32]);
    /// Writes the weights of all `blocks`.
    fn dequantize_all(blocks: &[Self], out: &mut [f32]) {
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(Self::LEN)) {
            block.dequantize(out);
        }
    }
}

/// A block that can be made from floats.
pub trait Quantize: Block {
    /// The block nearest to the `LEN` weights of `x`, chosen as ggml's reference quantizer chooses.
    fn quantize(x: &[f32]) -> Self;
}

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $block:ty;)*) => {
        /// The weight formats that Kinglet reads. The numbers are GGUF's.
        #[allow(non_camel_case_types, reason = "the field writes these names so")]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u32)]
        pub enum DType { $($(#[$doc])* $variant = $id,)* }

        impl DType {
            /// Every format, in the order of GGUF's numbers.
            pub const ALL: &[DType] = &[$(DType::$variant),*];

            /// The name as ggml writes it: `Q4_K`.
            pub const fn name(self) -> &'static str {
                match self { $(DType::$variant => $name,)* }
            }

            /// Weights in a block.
            pub const fn block_len(self) -> usize {
                match self { $(DType::$variant => <$block as Block>::LEN,)* }
            }

            /// Bytes of a block.
            pub const fn block_bytes(self) -> usize {
                match self { $(DType::$variant => size_of::<$block>(),)* }
            }
        }

        /// Writes the weights of `bytes` (whole blocks of `dtype`) to `out`.
        ///
        /// # Panics
        /// If `bytes` and `out` do not hold the same number of whole blocks.
        pub fn dequantize(dtype: DType, bytes: &[u8], out: &mut [f32]) {
            match dtype { $(DType::$variant => dequantize_blocks::<$block>(bytes, out),)* }
        }
    };
}

dtypes! {
    /// 32-bit float.
    F32 = 0, "F32", BlockF32;
    /// 16-bit float.
    F16 = 1, "F16", BlockF16;
    /// 4 bits, one scale per 32.
    Q4_0 = 2, "Q4_0", BlockQ4_0;
    /// 4 bits, scale and minimum per 32.
    Q4_1 = 3, "Q4_1", BlockQ4_1;
    /// 5 bits, one scale per 32.
    Q5_0 = 6, "Q5_0", BlockQ5_0;
    /// 5 bits, scale and minimum per 32.
    Q5_1 = 7, "Q5_1", BlockQ5_1;
    /// 8 bits, one scale per 32.
    Q8_0 = 8, "Q8_0", BlockQ8_0;
    /// 2 bits, 4-bit scale and minimum per 16, super-blocks of 256.
    Q2_K = 10, "Q2_K", BlockQ2K;
    /// 3 bits, 6-bit scale per 16, super-blocks of 256.
    Q3_K = 11, "Q3_K", BlockQ3K;
    /// 4 bits, 6-bit scale and minimum per 32, super-blocks of 256.
    Q4_K = 12, "Q4_K", BlockQ4K;
    /// 5 bits, 6-bit scale and minimum per 32, super-blocks of 256.
    Q5_K = 13, "Q5_K", BlockQ5K;
    /// 6 bits, 8-bit scale per 16, super-blocks of 256.
    Q6_K = 14, "Q6_K", BlockQ6K;
    /// 4 bits through a table of 16 values, one scale per 32.
    IQ4_NL = 20, "IQ4_NL", BlockIQ4NL;
    /// 4 bits through a table of 16 values, 6-bit scale per 32, super-blocks of 256.
    IQ4_XS = 23, "IQ4_XS", BlockIQ4XS;
    /// The upper half of a 32-bit float.
    BF16 = 30, "BF16", BlockBF16;
    /// Ternary, five to a byte, one scale per 256.
    TQ1_0 = 34, "TQ1_0", BlockTQ1_0;
    /// Ternary, four to a byte, one scale per 256.
    TQ2_0 = 35, "TQ2_0", BlockTQ2_0;
    /// OCP microscaling: 4-bit floats (E2M1), one power of two per 32.
    MXFP4 = 39, "MXFP4", BlockMXFP4;
}

impl DType {
    /// The format with GGUF's number `id`.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| *t as u32 == id)
    }

    /// The format called `name` in either case: `q4_k`, `Q4_K`.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|t| t.name().eq_ignore_ascii_case(name))
    }

    /// Bytes of a row of `n` weights; `None` if `n` is no whole number of blocks or the size overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        (n.is_multiple_of(self.block_len()))
            .then(|| (n / self.block_len()).checked_mul(self.block_bytes()))?
    }

    /// Whether [`quantize`] can make blocks of this format.
    pub fn can_quantize(self) -> bool {
        quantizer(self).is_some()
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The blocks that `bytes` holds.
///
/// # Panics
/// If `bytes` is misaligned or ends inside a block; the loader has checked both.
#[inline]
pub fn blocks<B: Block>(bytes: &[u8]) -> &[B] {
    bytemuck::cast_slice(bytes)
}

fn dequantize_blocks<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let blocks = blocks::<B>(bytes);
    assert_eq!(
        blocks.len() * B::LEN,
        out.len(),
        "{}: blocks and output differ in length",
        B::DTYPE
    );
    B::dequantize_all(blocks, out);
}

/// Weights to whole blocks.
type Quantizer = fn(&[f32], &mut [u8]);

/// The routine that makes blocks of `dtype`, if there is one.
fn quantizer(dtype: DType) -> Option<Quantizer> {
    Some(match dtype {
        DType::F32 => quantize_blocks::<BlockF32>,
        DType::F16 => quantize_blocks::<BlockF16>,
        DType::BF16 => quantize_blocks::<BlockBF16>,
        DType::Q8_0 => quantize_blocks::<BlockQ8_0>,
        DType::Q4_0 => quantize_blocks::<BlockQ4_0>,
        DType::Q4_1 => quantize_blocks::<BlockQ4_1>,
        DType::Q5_0 => quantize_blocks::<BlockQ5_0>,
        DType::Q5_1 => quantize_blocks::<BlockQ5_1>,
        DType::Q2_K => quantize_blocks::<BlockQ2K>,
        DType::Q3_K => quantize_blocks::<BlockQ3K>,
        DType::Q4_K => quantize_blocks::<BlockQ4K>,
        DType::Q5_K => quantize_blocks::<BlockQ5K>,
        DType::Q6_K => quantize_blocks::<BlockQ6K>,
        DType::TQ2_0 => quantize_blocks::<BlockTQ2_0>,
        DType::MXFP4 => quantize_blocks::<BlockMXFP4>,
        DType::IQ4_NL | DType::IQ4_XS | DType::TQ1_0 => return None,
    })
}

/// Writes the weights `x` to `out` as whole blocks of `dtype`, chosen as ggml's reference quantizer chooses. Infinities,
/// NaN and magnitudes beyond a half float give blocks whose weights mean nothing: the caller looks for them.
///
/// # Panics
/// If [`DType::can_quantize`] denies it, or if `x` and `out` do not hold the same number of whole blocks.
pub fn quantize(dtype: DType, x: &[f32], out: &mut [u8]) {
    match quantizer(dtype) {
        Some(quantize) => quantize(x, out),
        None => panic!("{dtype}: read only"),
    }
}

fn quantize_blocks<B: Quantize>(x: &[f32], out: &mut [u8]) {
    assert!(
        x.len().is_multiple_of(B::LEN) && out.len() / size_of::<B>() == x.len() / B::LEN,
        "{}: blocks and input differ in length",
        B::DTYPE
    );
    for (x, out) in x
        .chunks_exact(B::LEN)
        .zip(out.chunks_exact_mut(size_of::<B>()))
    {
        out.copy_from_slice(bytemuck::bytes_of(&B::quantize(x)));
    }
}

/// Half float bits to `f32`.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    half::f16::from_bits(bits).to_f32()
}

/// `f32` to half float bits, rounding to nearest even.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    half::f16::from_f32(x).to_bits()
}

/// A range of bytes that somebody keeps alive: a mapped file, or an owned buffer.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    /// Where the bytes are pages of a file.
    pages: Option<Arc<dyn Pages>>,
    range: Range<usize>,
}

/// Memory that the system can fill from a file ahead of time, and drop and fill again.
pub trait Pages: Send + Sync {
    /// The bytes `range` will be read soon.
    fn prefetch(&self, range: Range<usize>);

    /// The bytes `range`, and what came into memory with them, will not be read for a while.
    fn release(&self, range: Range<usize>);
}

impl Bytes {
    /// The bytes `range` of `owner`.
    ///
    /// # Panics
    /// If `range` does not lie in `owner`.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= (*owner).as_ref().len(),
            "byte range outside its owner"
        );
        Self {
            owner,
            pages: None,
            range,
        }
    }

    /// As [`Bytes::new`], of an owner whose pages can be prefetched and released.
    ///
    /// # Panics
    /// If `range` does not lie in `owner`.
    pub fn paged<O: AsRef<[u8]> + Pages + 'static>(owner: Arc<O>, range: Range<usize>) -> Self {
        Self {
            pages: Some(Arc::clone(&owner) as Arc<dyn Pages>),
            ..Self::new(owner, range)
        }
    }

    /// Whether the system can drop them and read them again.
    pub fn is_paged(&self) -> bool {
        self.pages.is_some()
    }

    /// The bytes `part` of these will be read soon.
    pub fn prefetch(&self, part: Range<usize>) {
        if let Some(pages) = &self.pages {
            pages.prefetch(self.range.start + part.start..self.range.start + part.end);
        }
    }

    /// The bytes `part` of these will not be read for a while.
    pub fn release(&self, part: Range<usize>) {
        if let Some(pages) = &self.pages {
            pages.release(self.range.start + part.start..self.range.start + part.end);
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

/// A tensor of a model file: weights by reference.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The name in the file: `blk.3.attn_q.weight`.
    pub name: String,
    /// The weight format.
    pub dtype: DType,
    /// Sizes in GGUF's order: the contiguous dimension first, four entries, trailing ones are 1.
    pub shape: [usize; 4],
    /// Whole blocks, `shape` many weights.
    pub data: Bytes,
}

impl Tensor {
    /// The contiguous dimension: the inputs of a matrix.
    pub fn n_in(&self) -> usize {
        self.shape[0]
    }

    /// The rows: the outputs of a matrix.
    pub fn n_out(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// All weights as floats.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        dequantize(self.dtype, &self.data, &mut out);
        out
    }
}
