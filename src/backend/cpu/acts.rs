//! Activations as kernels read them: floats, and 8-bit blocks where the weights are quantized.
//!
//! `q8`: per 32 values `x[i] = d * q[i]` with `d = max|x| / 127` in `f32`, and `s = d * sum(q)`, which a format with a
//! minimum multiplies with it. `u[i] = q[i] + 128` repeats the values for kernels that multiply unsigned activations by
//! signed weights; `n` has the sum of each 16 `q`, from which sums start where weights have an offset.
//!
//! `bf16`: for matrix units, groups of 32 tokens. Of each group, for each 32 values along the row, two tiles of 16
//! tokens: 16 rows of `(token, 2)`, the pairs of adjacent values of a token side by side. Absent tokens are zeros.

use bytemuck::{Pod, Zeroable};

/// Values in a block of quantized activations.
pub const Q8_LEN: usize = 32;

/// Tokens in a group of bf16 tiles.
pub const BF16_TOKENS: usize = 32;

/// Values of a token in a bf16 tile.
pub const BF16_LEN: usize = 32;

/// Floats of a buffer for `n_tokens` quantized rows of `n_in` values.
pub(crate) fn q8_floats(n_tokens: usize, n_in: usize) -> usize {
    n_tokens * Q8Row::bytes(n_in) / size_of::<f32>()
}

/// Floats of a buffer for `n_tokens` rows of `n_in` values in bf16 tiles.
pub(crate) fn bf16_floats(n_tokens: usize, n_in: usize) -> usize {
    let tiles = n_tokens.div_ceil(BF16_TOKENS) * (n_in / BF16_LEN);
    tiles * size_of::<[Tile; 2]>() / size_of::<f32>()
}

/// What a tile register of a matrix unit holds: 16 rows of 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Tile(pub [[u8; 64]; 16]);

/// A batch of activation rows, `(n_tokens, n_in)`.
#[derive(Clone, Copy)]
pub struct Acts<'a> {
    /// Rows.
    pub n_tokens: usize,
    /// Row length.
    pub n_in: usize,
    /// The floats, `(n_tokens, n_in)`.
    pub f32: &'a [f32],
    /// The same in 8 bits, `n_tokens` rows of [`Q8Row::bytes`]; empty if no kernel asked for them.
    pub q8: &'a [u8],
    /// The same in bf16 tiles, `(n_tokens / 32, n_in / 32)`, rounded up; empty if no kernel asked for them.
    pub bf16: &'a [[Tile; 2]],
}

/// One quantized row.
#[derive(Clone, Copy)]
pub struct Q8Row<'a> {
    /// `(n_in)`, in -127..=127.
    pub q: &'a [i8],
    /// `q + 128`, `(n_in)`.
    pub u: &'a [u8],
    /// Scales, `(n_in / 32)`.
    pub d: &'a [f32],
    /// `d` times the sum of its 32 `q`, `(n_in / 32)`.
    pub s: &'a [f32],
    /// Sums of 16 `q`, `(n_in / 16)`.
    pub n: &'a [i32],
}

/// One row to be quantized.
pub struct Q8RowMut<'a> {
    /// As in [`Q8Row`].
    pub q: &'a mut [i8],
    /// As in [`Q8Row`].
    pub u: &'a mut [u8],
    /// As in [`Q8Row`].
    pub d: &'a mut [f32],
    /// As in [`Q8Row`].
    pub s: &'a mut [f32],
    /// As in [`Q8Row`].
    pub n: &'a mut [i32],
}

impl Q8Row<'_> {
    /// Bytes of a row of `n_in` values: a multiple of 64, so that rows keep the alignment of their buffer.
    pub const fn bytes(n_in: usize) -> usize {
        (2 * n_in + n_in / 8 + n_in / 8 + n_in / 4).next_multiple_of(64)
    }
}

impl<'a> Q8RowMut<'a> {
    /// The parts of a row's bytes.
    ///
    /// # Panics
    /// If `bytes` is shorter than [`Q8Row::bytes`] or not aligned to 4.
    pub fn new(bytes: &'a mut [u8], n_in: usize) -> Self {
        let (q, rest) = bytes.split_at_mut(n_in);
        let (u, rest) = rest.split_at_mut(n_in);
        let (d, rest) = rest.split_at_mut(n_in / 8);
        let (s, rest) = rest.split_at_mut(n_in / 8);
        Self {
            q: bytemuck::cast_slice_mut(q),
            u,
            d: bytemuck::cast_slice_mut(d),
            s: bytemuck::cast_slice_mut(s),
            n: bytemuck::cast_slice_mut(&mut rest[..n_in / 4]),
        }
    }
}

impl<'a> Acts<'a> {
    /// Row `token` as floats.
    pub fn row(&self, token: usize) -> &'a [f32] {
        &self.f32[token * self.n_in..][..self.n_in]
    }

    /// The tiles of tokens `32 * group..`.
    ///
    /// # Panics
    /// If the rows were not packed; the backend packs them for every kernel whose table row says so.
    pub fn bf16_group(&self, group: usize) -> &'a [[Tile; 2]] {
        let n_k = self.n_in / BF16_LEN;
        &self.bf16[group * n_k..][..n_k]
    }

    /// Row `token` in 8 bits.
    ///
    /// # Panics
    /// If the rows were not quantized; the backend quantizes them for every kernel whose table row says so.
    #[inline(always)] // six times in the innermost loop but one of a GEMM
    pub fn q8_row(&self, token: usize) -> Q8Row<'a> {
        let n = self.n_in;
        let row = &self.q8[token * Q8Row::bytes(n)..][..2 * n + n / 2];
        let (q, rest) = row.split_at(n);
        let (u, rest) = rest.split_at(n);
        let (d, rest) = rest.split_at(n / 8);
        let (s, n) = rest.split_at(n / 8);
        Q8Row {
            q: bytemuck::cast_slice(q),
            u,
            d: bytemuck::cast_slice(d),
            s: bytemuck::cast_slice(s),
            n: bytemuck::cast_slice(n),
        }
    }
}
