//! The tensor table: types, shapes, and where in the file each tensor lies.

use std::fmt::{self, Display};
use std::io::Read;

use super::reader::{Fault, Reader, bad, quoted};
use crate::quant::DType;

/// Bytes of the longest tensor name (ggml's own limit is 63).
const MAX_NAME_BYTES: usize = 255;
/// Dimensions of a tensor.
const MAX_DIMS: usize = 4;

/// The type of a tensor's elements: a format that Kinglet reads, or another of ggml's, by number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum TensorType {
    /// A format of [`DType`].
    Known(DType),
    /// Another number: kept, listed, not loaded.
    Foreign(u32),
}

/// ggml's types that are no weight format of Kinglet: number, name, elements and bytes of a block. (0, 0) stands for
/// a type that has left ggml or packs whole rows, so that its size does not follow from the shape.
#[rustfmt::skip]
const FOREIGN: &[(u32, &str, usize, usize)] = &[
    (4, "Q4_2", 0, 0), (5, "Q4_3", 0, 0), (9, "Q8_1", 32, 36), (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4),
    (27, "I64", 1, 8), (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (31, "Q4_0_4_4", 0, 0),
    (32, "Q4_0_4_8", 0, 0), (33, "Q4_0_8_8", 0, 0), (36, "I2_S", 0, 0), (37, "IQ4_NL_4_8", 0, 0),
    (38, "IQ4_NL_8_8", 0, 0), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18), (42, "Q2_0", 0, 0),
];

impl TensorType {
    /// The type with GGUF's number `id`.
    pub fn from_id(id: u32) -> Self {
        DType::from_id(id).map_or(Self::Foreign(id), Self::Known)
    }

    /// GGUF's number.
    pub fn id(self) -> u32 {
        match self {
            Self::Known(t) => t as u32,
            Self::Foreign(id) => id,
        }
    }

    /// The weight format, if it is one that Kinglet reads.
    pub fn dtype(self) -> Option<DType> {
        match self {
            Self::Known(t) => Some(t),
            Self::Foreign(_) => None,
        }
    }

    /// Elements and bytes of a block; `None` if they are not known.
    fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::Known(t) => Some((t.block_len(), t.block_bytes())),
            Self::Foreign(id) => {
                let (.., len, bytes) = *FOREIGN.iter().find(|t| t.0 == id)?;
                (len > 0).then_some((len, bytes))
            }
        }
    }
}

impl From<DType> for TensorType {
    fn from(t: DType) -> Self {
        Self::Known(t)
    }
}

/// The name as ggml writes it; `unknown (99)` for a number without a name.
impl Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(t) => f.pad(t.name()),
            Self::Foreign(id) => match FOREIGN.iter().find(|t| t.0 == *id) {
                Some((_, name, ..)) => f.pad(name),
                None => f.pad(&format!("unknown ({id})")),
            },
        }
    }
}

/// An entry of the tensor table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// The name: `blk.3.attn_q.weight`.
    pub name: String,
    /// The type of the elements.
    pub dtype: TensorType,
    /// Sizes, the contiguous dimension first; trailing ones are 1.
    pub shape: [usize; 4],
    /// How many sizes the file gives: 1 to 4.
    pub n_dims: usize,
    /// The part of a split file that holds the data; 0 in a single file.
    pub part: usize,
    /// Where the data begins, in bytes from the start of that part.
    pub offset: u64,
    /// Bytes of the data. For a foreign type of unknown layout: what lies between it and the next tensor.
    pub bytes: usize,
}

impl TensorInfo {
    /// The number of elements.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The sizes that the file gives.
    pub fn dims(&self) -> &[usize] {
        &self.shape[..self.n_dims]
    }
}

/// Checks the sizes `dims` of a tensor of type `dtype`; returns the shape and, where the layout is known, the bytes.
pub(crate) fn checked_size(
    dtype: TensorType,
    dims: &[u64],
) -> Result<([usize; 4], Option<usize>), Fault> {
    if !(1..=MAX_DIMS).contains(&dims.len()) {
        return bad!("expected 1 to {MAX_DIMS} dimensions, found {}", dims.len());
    }
    let mut shape = [1; 4];
    for (to, from) in shape.iter_mut().zip(dims) {
        *to = match usize::try_from(*from) {
            Ok(n) if n > 0 => n,
            _ => return bad!("expected dimensions of at least 1, found {dims:?}"),
        };
    }
    let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let Some(elements) = elements.filter(|n| *n <= isize::MAX as usize) else {
        return bad!("expected at most {} elements, found {dims:?}", isize::MAX);
    };
    let Some((block_len, block_bytes)) = dtype.block() else {
        return Ok((shape, None));
    };
    if !shape[0].is_multiple_of(block_len) {
        return bad!(
            "expected a first dimension in blocks of {block_len} ({dtype}), found {}",
            shape[0]
        );
    }
    match (elements / block_len).checked_mul(block_bytes) {
        Some(bytes) if bytes <= isize::MAX as usize => Ok((shape, Some(bytes))),
        _ => bad!(
            "expected at most {} bytes, found {dims:?} of {dtype}",
            isize::MAX
        ),
    }
}

/// Bytes of the shortest entry of the table: a name of one byte, one dimension.
pub(crate) const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// Reads entry `i` of the table of a file whose tensors are aligned to `alignment`. The offset still counts from the
/// data section, and `bytes` is 0 where the type does not tell.
pub(crate) fn read_entry<R: Read>(
    r: &mut Reader<R>,
    i: usize,
    alignment: u64,
) -> Result<TensorInfo, Fault> {
    let mut name = Vec::new();
    r.string(&mut name, "length of the name", MAX_NAME_BYTES)
        .map_err(|e| e.within(format_args!("tensor {i}")))?;
    let name = match String::from_utf8(name) {
        Ok(name) if !name.is_empty() => name,
        Ok(_) => return bad!("tensor {i}: expected a name, found an empty one"),
        Err(e) => {
            let found = quoted(e.as_bytes());
            return bad!("tensor {i}: expected a name in UTF-8, found {found}");
        }
    };
    let mut rest = || {
        let n_dims = r.u32("number of dimensions")? as usize;
        let mut dims = [0; MAX_DIMS];
        let Some(dims) = dims.get_mut(..n_dims) else {
            return bad!("expected 1 to {MAX_DIMS} dimensions, found {n_dims}");
        };
        for dim in &mut *dims {
            *dim = r.u64("dimension")?;
        }
        let dtype = TensorType::from_id(r.u32("type")?);
        let offset = r.u64("offset")?;
        let (shape, bytes) = checked_size(dtype, dims)?;
        if !offset.is_multiple_of(alignment) {
            return bad!("expected an offset in multiples of {alignment}, found {offset}");
        }
        Ok((dtype, shape, n_dims, offset, bytes.unwrap_or(0)))
    };
    match rest() {
        Ok((dtype, shape, n_dims, offset, bytes)) => Ok(TensorInfo {
            name,
            dtype,
            shape,
            n_dims,
            part: 0,
            offset,
            bytes,
        }),
        Err(e) => Err(e.within(format_args!("tensor {}", quoted(name.as_bytes())))),
    }
}
