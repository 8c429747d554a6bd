//! Panels: sixteen rows of a matrix side by side, for kernels whose lanes are rows. A sum needs no folding, scales are a
//! vector, and nibbles are taken apart once for all rows.
//!
//! A matrix of panels is `(n_out / 16, n_in / B::LEN)` packed blocks. Of each block the bytes with weights lie in lines:
//! four adjacent bytes of the first row, then of the second, and so on. No bit is lost, and a panel takes as many bytes
//! as its rows, of Q4_K three in a hundred more.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use bytemuck::{Pod, Zeroable};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::acts::Acts;
use super::isa::Isa;
use super::pool::OutCols;
use super::table::{self, MatMul, Ready};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::quant::{
    self, Block, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ6K, BlockQ8_0, DType, Tensor,
};

/// Rows of a panel.
pub const ROWS: usize = 16;

/// Four adjacent bytes of each row.
pub(super) type Line = [u8; 4 * ROWS];

/// A format that is packed.
pub(super) trait Panel: Block {
    /// One block of each row.
    type Packed: Pod;

    /// Packs the blocks of sixteen rows.
    fn pack(rows: &[&Self; ROWS]) -> Self::Packed;

    /// The block of a row.
    fn unpack(packed: &Self::Packed, row: usize) -> Self;
}

/// Lines of the bytes that `of` names.
fn lines<T, const N: usize, const L: usize>(
    rows: &[&T; ROWS],
    of: impl Fn(&T) -> &[u8; N],
) -> [Line; L] {
    const { assert!(N == 4 * L) };
    let mut lines = [[0; 4 * ROWS]; L];
    for (row, block) in rows.iter().enumerate() {
        let words = of(block).as_chunks::<4>().0;
        for (line, word) in lines.iter_mut().zip(words) {
            line.as_chunks_mut::<4>().0[row] = *word;
        }
    }
    lines
}

/// The bytes of a row.
fn bytes<const N: usize, const L: usize>(lines: &[Line; L], row: usize) -> [u8; N] {
    const { assert!(N == 4 * L) };
    let mut bytes = [0; N];
    for (line, word) in lines.iter().zip(bytes.as_chunks_mut::<4>().0) {
        *word = line.as_chunks::<4>().0[row];
    }
    bytes
}

/// Sixteen blocks of Q4_0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ4_0 {
    /// Line `i`: weights `4i..` in the low nibbles, `16 + 4i..` in the high ones.
    pub qs: [Line; 4],
    /// Scales.
    pub d: [u16; ROWS],
}

impl Panel for BlockQ4_0 {
    type Packed = PanelQ4_0;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ4_0 {
        PanelQ4_0 {
            qs: lines(rows, |block| &block.qs),
            d: rows.map(|block| block.d),
        }
    }

    fn unpack(packed: &PanelQ4_0, row: usize) -> Self {
        Self {
            d: packed.d[row],
            qs: bytes(&packed.qs, row),
        }
    }
}

/// Sixteen blocks of Q4_1.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ4_1 {
    /// As in [`PanelQ4_0`].
    pub qs: [Line; 4],
    /// Scales.
    pub d: [u16; ROWS],
    /// Minima.
    pub m: [u16; ROWS],
}

impl Panel for BlockQ4_1 {
    type Packed = PanelQ4_1;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ4_1 {
        PanelQ4_1 {
            qs: lines(rows, |block| &block.qs),
            d: rows.map(|block| block.d),
            m: rows.map(|block| block.m),
        }
    }

    fn unpack(packed: &PanelQ4_1, row: usize) -> Self {
        Self {
            d: packed.d[row],
            m: packed.m[row],
            qs: bytes(&packed.qs, row),
        }
    }
}

/// Sixteen blocks of Q5_0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ5_0 {
    /// As in [`PanelQ4_0`].
    pub qs: [Line; 4],
    /// Bit `i` of byte `c` of a row is the fifth bit of its weight `4i + c`.
    pub qh: Line,
    /// Scales.
    pub d: [u16; ROWS],
}

impl Panel for BlockQ5_0 {
    type Packed = PanelQ5_0;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ5_0 {
        let mut qh = [0; 4 * ROWS];
        for (block, turned) in rows.iter().zip(qh.as_chunks_mut::<4>().0) {
            let bits = u32::from_le_bytes(block.qh);
            *turned = std::array::from_fn(|c| {
                (0..8).map(|i| ((bits >> (4 * i + c) & 1) as u8) << i).sum()
            });
        }
        PanelQ5_0 {
            qs: lines(rows, |block| &block.qs),
            qh,
            d: rows.map(|block| block.d),
        }
    }

    fn unpack(packed: &PanelQ5_0, row: usize) -> Self {
        let turned = packed.qh.as_chunks::<4>().0[row];
        let bits: u32 = (0..32)
            .map(|i| u32::from(turned[i % 4] >> (i / 4) & 1) << i)
            .sum();
        Self {
            d: packed.d[row],
            qh: bits.to_le_bytes(),
            qs: bytes(&packed.qs, row),
        }
    }
}

/// Sixteen blocks of Q8_0.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ8_0 {
    /// Line `i`: weights `4i..`.
    pub qs: [Line; 8],
    /// Scales.
    pub d: [u16; ROWS],
}

impl Panel for BlockQ8_0 {
    type Packed = PanelQ8_0;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ8_0 {
        PanelQ8_0 {
            qs: lines::<_, 32, 8>(rows, |block| bytemuck::cast_ref(&block.qs)),
            d: rows.map(|block| block.d),
        }
    }

    fn unpack(packed: &PanelQ8_0, row: usize) -> Self {
        Self {
            d: packed.d[row],
            qs: bytemuck::cast(bytes::<32, 8>(&packed.qs, row)),
        }
    }
}

/// Sixteen blocks of Q4_K.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ4K {
    /// Of each two groups of 32 weights eight lines. Line `i`: weights `4i..`, of the first in the low nibbles, of the
    /// second in the high ones.
    pub qs: [[Line; 8]; 4],
    /// Of each group.
    pub scales: [[u8; ROWS]; 8],
    /// Of each group.
    pub mins: [[u8; ROWS]; 8],
    /// Scales of the scales.
    pub d: [u16; ROWS],
    /// Scales of the minima.
    pub dmin: [u16; ROWS],
}

impl Panel for BlockQ4K {
    type Packed = PanelQ4K;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ4K {
        let of_rows = rows.map(Self::scales_mins);
        PanelQ4K {
            qs: bytemuck::cast(lines::<_, 128, 32>(rows, |block| &block.qs)),
            scales: std::array::from_fn(|group| of_rows.map(|(scales, _)| scales[group])),
            mins: std::array::from_fn(|group| of_rows.map(|(_, mins)| mins[group])),
            d: rows.map(|block| block.d),
            dmin: rows.map(|block| block.dmin),
        }
    }

    fn unpack(packed: &PanelQ4K, row: usize) -> Self {
        let of_row = |of: &[[u8; ROWS]; 8]| of.map(|rows| rows[row]);
        Self {
            d: packed.d[row],
            dmin: packed.dmin[row],
            scales: quant::pack_scales_mins(&of_row(&packed.scales), &of_row(&packed.mins)),
            qs: bytes(bytemuck::cast_ref::<_, [Line; 32]>(&packed.qs), row),
        }
    }
}

/// Sixteen weights of each of four groups of a [`PanelQ6K`].
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PartQ6K {
    /// Line `i` of the first four: the lower bits of weights `4i..` of group 0 and, in the high nibbles, 2; of the others:
    /// of 1 and 3.
    pub ql: [[Line; 4]; 2],
    /// Line `i`: the upper bits of weights `4i..` of groups 0 to 3, two each.
    pub qh: [Line; 4],
}

/// Sixteen blocks of Q6_K.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct PanelQ6K {
    /// Of each four groups of 32 weights the first and the last sixteen.
    pub q: [[PartQ6K; 2]; 2],
    /// Of each 16 weights.
    pub scales: [[i8; ROWS]; 16],
    /// Scales of the scales.
    pub d: [u16; ROWS],
}

impl Panel for BlockQ6K {
    type Packed = PanelQ6K;

    fn pack(rows: &[&Self; ROWS]) -> PanelQ6K {
        let ql: [[[[Line; 4]; 2]; 2]; 2] = bytemuck::cast(lines::<_, 128, 32>(rows, |b| &b.ql));
        let qh: [[[Line; 4]; 2]; 2] = bytemuck::cast(lines::<_, 64, 16>(rows, |b| &b.qh));
        let part = |half: usize, part: usize| PartQ6K {
            ql: ql[half].map(|groups| groups[part]),
            qh: qh[half][part],
        };
        PanelQ6K {
            q: [0, 1].map(|half| [part(half, 0), part(half, 1)]),
            scales: std::array::from_fn(|i| rows.map(|block| block.scales[i])),
            d: rows.map(|block| block.d),
        }
    }

    fn unpack(packed: &PanelQ6K, row: usize) -> Self {
        let ql = packed
            .q
            .map(|parts| [0, 1].map(|set| parts.map(|part| part.ql[set])));
        let qh = packed.q.map(|parts| parts.map(|part| part.qh));
        Self {
            ql: bytes(&bytemuck::cast::<_, [Line; 32]>(ql), row),
            qh: bytes(&bytemuck::cast::<_, [Line; 16]>(qh), row),
            scales: packed.scales.map(|rows| rows[row]),
            d: packed.d[row],
        }
    }
}

macro_rules! formats {
    ($($format:ident: $block:ident;)*) => {
        /// Bytes of a panel with rows of `n_in` weights in `dtype`; `None` if such rows are not packed.
        pub fn panel_bytes(dtype: DType, n_in: usize) -> Option<usize> {
            let packed = match dtype {
                $(DType::$format => size_of::<<$block as Panel>::Packed>(),)*
                _ => return None,
            };
            let n_blocks = n_in / dtype.block_len();
            n_in.is_multiple_of(dtype.block_len()).then_some(n_blocks * packed)
        }

        /// Packs sixteen rows of `dtype`, adjacent, into a panel.
        ///
        /// # Panics
        /// If these are not sixteen rows, or not of the panel's size, or are not packed.
        pub fn pack(dtype: DType, rows: &[u8], panel: &mut [u8]) {
            match dtype {
                $(DType::$format => pack_blocks::<$block>(rows, panel),)*
                _ => panic!("{dtype}: rows are not packed"),
            }
        }
    };
}

formats! {
    Q4_0: BlockQ4_0;
    Q4_1: BlockQ4_1;
    Q5_0: BlockQ5_0;
    Q8_0: BlockQ8_0;
    Q4_K: BlockQ4K;
    Q6_K: BlockQ6K;
}

fn pack_blocks<B: Panel>(rows: &[u8], panel: &mut [u8]) {
    let rows = quant::blocks::<B>(rows);
    let n_blocks = rows.len() / ROWS;
    let panel = bytemuck::cast_slice_mut::<_, B::Packed>(panel);
    assert!(
        rows.len() == ROWS * n_blocks && panel.len() == n_blocks,
        "{} blocks of {} into a panel of {}",
        rows.len(),
        B::DTYPE,
        panel.len()
    );
    for (i, packed) in panel.iter_mut().enumerate() {
        *packed = B::pack(&std::array::from_fn(|row| &rows[row * n_blocks + i]));
    }
}

/// The copies of a model's matrices: one mapping, for which the system may use large pages.
#[derive(Default)]
pub struct Copies {
    asked: Mutex<Asked>,
    map: OnceLock<MmapMut>,
}

#[derive(Default)]
struct Asked {
    tensors: Vec<Tensor>,
    bytes: usize,
}

impl Copies {
    /// Makes those that were asked for, on all cores.
    ///
    /// # Errors
    /// If there is no memory for them, or `cancel` says so.
    ///
    /// # Panics
    /// If that was done already.
    pub fn make(&self, cancel: &Cancel) -> Result<()> {
        let asked = std::mem::take(&mut *lock(&self.asked));
        if asked.bytes == 0 {
            return Ok(());
        }
        let mut map = MmapMut::map_anon(asked.bytes).map_err(|_| Error::OutOfMemory {
            what: "copies of matrices".into(),
            bytes: asked.bytes,
        })?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // where there are none, small pages do
        let mut rest = &mut map[..];
        let mut jobs = Vec::new();
        for tensor in &asked.tensors {
            let bytes = copied_bytes(tensor.dtype, &tensor.shape).expect("as it was asked for");
            let (copy, more) = rest.split_at_mut(bytes);
            rest = more.split_at_mut(aligned(bytes) - bytes).1;
            let n_panels = tensor.n_out() / ROWS;
            let panels = copy.chunks_exact_mut(bytes / n_panels);
            let rows = tensor.data.chunks_exact(tensor.data.len() / n_panels);
            jobs.extend(
                panels
                    .zip(rows)
                    .map(|(panel, rows)| (tensor.dtype, rows, panel)),
            );
        }
        jobs.into_par_iter().try_for_each(|(dtype, rows, panel)| {
            cancel.check()?;
            pack(dtype, rows, panel);
            Ok(())
        })?;
        assert!(self.map.set(map).is_ok(), "copies are made once");
        Ok(())
    }
}

/// Bytes of a copy and of what keeps the next one in place.
fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(64)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A matrix in panels: a copy.
pub(super) struct Panels {
    copies: Arc<Copies>,
    /// Where it begins.
    at: usize,
    /// Of one panel.
    bytes: usize,
    gemv: Ready<MatMul>,
}

impl Panels {
    /// Asks for a copy of `tensor` where its rows are packed.
    pub fn of(tensor: &Tensor, copies: &Arc<Copies>) -> Option<Self> {
        let bytes = copied_bytes(tensor.dtype, &tensor.shape)?;
        let gemv = table::gemv_panels(tensor.dtype).expect("a scalar row for what is packed");
        let mut asked = lock(&copies.asked);
        let at = asked.bytes;
        asked.bytes += aligned(bytes);
        asked.tensors.push(tensor.clone());
        Some(Self {
            copies: Arc::clone(copies),
            at,
            bytes: bytes / (tensor.n_out() / ROWS),
            gemv,
        })
    }

    /// The kernel for few tokens.
    pub fn gemv(&self) -> Ready<MatMul> {
        self.gemv
    }

    /// Products of activations with some rows, those of whole panels.
    #[inline]
    pub fn multiply(&self, x: &Acts, rows: Range<usize>, y: &mut OutCols) {
        let map = self
            .copies
            .map
            .get()
            .expect("made when the model was loaded");
        let bytes = rows.start / ROWS * self.bytes..rows.end / ROWS * self.bytes;
        self.gemv.run(&map[self.at..][bytes], x, y);
    }
}

/// Bytes of the copy that is made of a matrix, if one is: where this CPU has a kernel for panels that makes use of its
/// vectors as much as the one for rows does.
pub(crate) fn copied_bytes(dtype: DType, shape: &[usize; 4]) -> Option<usize> {
    let [n_in, n_out, 1, 1] = *shape else {
        return None;
    };
    let (panels, rows) = (table::gemv_panels(dtype)?, table::gemv(dtype)?);
    let slower = panels.isa() == Isa::Scalar && rows.isa() > Isa::Scalar;
    let bytes = panel_bytes(dtype, n_in)? * (n_out / ROWS);
    (n_out.is_multiple_of(ROWS) && bytes > 0 && !slower).then_some(bytes)
}
