//! Weights as shaders read them. Blocks of a file are 17 to 210 bytes long; a lane wants words and whole vectors, and all
//! formats the same places for the same bits. So blocks are laid out anew on their way to the device: units of 32 weights,
//! codes of four bits in one plane (`main`), scales and further bits in another (`aux`). `shaders/quant/*.wgsl` say what
//! lies where; sizes stay those of the file within a few per cent. Nothing of it stays on the host.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Weak};

use rayon::prelude::*;
use wgpu::BufferUsages;

use super::device::{Buffer, Device, Span};
use crate::error::{Error, Result};
use crate::quant::{self, Bytes, DType, Tensor};

/// Weights that a lane reads at once.
pub(super) const UNIT: usize = 32;

/// Units whose planes begin on whole words in every format.
const GROUP: usize = 8;

/// Bytes of a file that are laid out and sent at once.
const CHUNK: usize = 8 << 20;

/// Bytes that wait to be sent before the host waits too.
const IN_FLIGHT: usize = 64 << 20;

/// A matrix on the device, `(n_out, n_in)`.
pub(super) struct Weights {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) n_in: usize,
    pub(super) n_out: usize,
    /// One part unless it is larger than a binding may be.
    pub(super) parts: Vec<Part>,
    /// Experts of which each of several parts has the same rows; else 1.
    pub(super) split_experts: usize,
    /// The matrix itself, where it stays on the host; it has no parts then.
    host: Option<Tensor>,
    /// Bytes in the file.
    pub(super) file_bytes: usize,
    /// Where it came from: as long as this is held, no other matrix can be there.
    _source: Bytes,
}

/// Adjacent rows of a matrix or, of experts, of each of them. A token's experts are in all parts so, each of which makes some
/// of its outputs as the whole would: sums over experts need not be put together.
pub(super) struct Part {
    /// In an expert.
    pub(super) first: usize,
    /// Of all experts.
    pub(super) n_rows: usize,
    main: Buffer,
    aux: Buffer,
}

impl Part {
    /// The codes.
    pub(super) fn main(&self) -> Span<'_> {
        self.main.all()
    }

    /// The scales.
    pub(super) fn aux(&self) -> Span<'_> {
        self.aux.all()
    }
}

/// Bytes of a matrix on a device, about: buffers are rounded up.
pub fn device_bytes(dtype: DType, n_in: usize, n_out: usize) -> u64 {
    let (main_bytes, aux_words) = sizes(dtype);
    let groups = (n_out * n_in.div_ceil(UNIT)).div_ceil(GROUP);
    (groups * (GROUP * main_bytes + 4 * aux_words)) as u64
}

/// Bytes of `main` of a unit, and words of `aux` of [`GROUP`] of them.
fn sizes(dtype: DType) -> (usize, usize) {
    match dtype {
        DType::F32 => (128, 0),
        DType::F16 | DType::BF16 => (64, 0),
        DType::Q8_0 => (32, 4),
        DType::Q4_0 | DType::IQ4_NL => (16, 4),
        DType::Q4_1 => (16, 8),
        DType::Q5_0 => (16, 12),
        DType::Q5_1 => (16, 16),
        DType::MXFP4 => (16, 2),
        DType::Q4_K => (16, 5),
        DType::Q5_K => (16, 13),
        DType::Q6_K => (16, 21),
        DType::IQ4_XS => (16, 3),
        DType::Q2_K => (0, 21),
        DType::Q3_K => (0, 29),
        DType::TQ1_0 | DType::TQ2_0 => (0, 17),
    }
}

impl Weights {
    /// Sends a tensor to the device, unless it is there.
    pub(super) fn upload(device: &Device, tensor: &Tensor) -> Result<Arc<Self>> {
        let (dtype, n_in, n_out) = (tensor.dtype, tensor.n_in(), tensor.n_out());
        let row_bytes = dtype.row_bytes(n_in).filter(|bytes| *bytes > 0);
        let row_bytes =
            row_bytes.filter(|bytes| bytes.checked_mul(n_out) == Some(tensor.data.len()));
        let row_bytes = row_bytes.ok_or_else(|| {
            Error::BadModel(format!(
                "tensor {}: expected {n_out} rows of {n_in} weights, found {} bytes",
                tensor.name,
                tensor.data.len()
            ))
        })?;
        if !n_in.is_multiple_of(4) {
            return Err(Error::Unsupported {
                kind: "row length on the GPU",
                found: format!("{n_in} of {}", tensor.name),
                supported: "multiples of 4".to_owned(),
            });
        }
        let place = (tensor.data.as_ptr().addr(), tensor.data.len());
        // Not held while weights are laid out: a thread that waits for that may load another model meanwhile.
        let known = || device.weights.lock().expect("nothing panics under it");
        let is_same = |there: &Arc<Self>| (there.dtype, there.n_in) == (dtype, n_in);
        let there = known().get(&place).and_then(Weak::upgrade);
        if let Some(there) = there.filter(is_same) {
            return Ok(there);
        }
        let n_units = n_in.div_ceil(UNIT);
        let (main_bytes, aux_words) = sizes(dtype);
        let row_most = n_units * main_bytes.max(aux_words.div_ceil(GROUP) * 4);
        let part_bytes = device.part_bytes() as usize;
        // Eight rows are whole groups of units.
        let most = |n_experts: usize| {
            let rows = (part_bytes / row_most.max(1)).min(u32::MAX as usize / n_units);
            rows / n_experts / GROUP * GROUP
        };
        let split_experts = match n_out <= most(1) {
            true => 1,
            false => tensor.shape[2..].iter().product(),
        };
        let part_rows = most(split_experts);
        if part_rows == 0 {
            return Err(Error::Unsupported {
                kind: "row length on the GPU",
                found: format!("{n_in} of {}", tensor.name),
                supported: match split_experts {
                    1 => format!("rows of which {GROUP} fit a binding of {part_bytes} bytes"),
                    n => {
                        format!("rows of which {GROUP} of {n} experts each fit {part_bytes} bytes")
                    }
                },
            });
        }
        let of_expert = n_out / split_experts;
        let mut parts = Vec::new();
        for first in (0..of_expert).step_by(part_rows) {
            let n = part_rows.min(of_expert - first);
            let read = |rows| {
                let bytes = rows_of(&tensor.data, row_bytes, of_expert, first..first + n, rows);
                // Rows of floats may end inside a unit.
                match n_in.is_multiple_of(UNIT) {
                    true => bytes,
                    false => Cow::Owned(pad(&bytes, row_bytes, n_units, dtype)),
                }
            };
            let n_rows = n * split_experts;
            let part = send(device, dtype, n_units, n_rows, read, &tensor.name)?;
            parts.push(Part { first, ..part });
        }
        let weights = Arc::new(Self {
            name: tensor.name.clone(),
            dtype,
            n_in,
            n_out,
            parts,
            split_experts,
            host: None,
            file_bytes: tensor.data.len(),
            _source: tensor.data.clone(),
        });
        let mut known = known();
        // Somebody else may have sent the same in the meantime.
        let there = known.get(&place).and_then(Weak::upgrade);
        if let Some(there) = there.filter(is_same) {
            return Ok(there);
        }
        known.retain(|_, weights| weights.strong_count() > 0);
        known.insert(place, Arc::downgrade(&weights));
        Ok(weights)
    }

    /// One that stays on the host.
    pub(super) fn on_host(tensor: &Tensor) -> Arc<Self> {
        Arc::new(Self {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            n_in: tensor.n_in(),
            n_out: tensor.n_out(),
            parts: Vec::new(),
            split_experts: 1,
            host: Some(tensor.clone()),
            file_bytes: tensor.data.len(),
            _source: tensor.data.clone(),
        })
    }

    /// The matrix, if it stays on the host.
    pub(super) fn host(&self) -> Option<&Tensor> {
        self.host.as_ref()
    }

    /// The only part.
    pub(super) fn whole(&self) -> Option<&Part> {
        match &self.parts[..] {
            [part] => Some(part),
            _ => None,
        }
    }

    /// Whether parts of both have the same rows.
    pub(super) fn splits_as(&self, other: &Self) -> bool {
        let rows = |part: &Part| (part.first, part.n_rows);
        self.parts.iter().map(rows).eq(other.parts.iter().map(rows))
    }
}

/// Some rows of a part, which has the rows `part` of each expert: those of the first one, then of the next.
fn rows_of(
    data: &[u8],
    row_bytes: usize,
    of_expert: usize,
    part: Range<usize>,
    rows: Range<usize>,
) -> Cow<'_, [u8]> {
    let piece = |at: usize| {
        let (expert, row) = (at / part.len(), at % part.len());
        let start = expert * of_expert + part.start + row;
        let n = (part.len() - row).min(rows.end - at);
        (&data[start * row_bytes..(start + n) * row_bytes], at + n)
    };
    let (first, mut at) = piece(rows.start);
    let mut bytes = Cow::Borrowed(first);
    while at < rows.end {
        let (more, next) = piece(at);
        bytes.to_mut().extend_from_slice(more);
        at = next;
    }
    bytes
}

/// Rows of floats, with zeros up to whole units.
fn pad(bytes: &[u8], row_bytes: usize, n_units: usize, dtype: DType) -> Vec<u8> {
    let (unit_bytes, _) = sizes(dtype);
    let mut padded = Vec::with_capacity(bytes.len() / row_bytes * n_units * unit_bytes);
    for row in bytes.chunks_exact(row_bytes) {
        padded.extend_from_slice(row);
        padded.resize(padded.len().next_multiple_of(n_units * unit_bytes), 0);
    }
    padded
}

/// A part of so many rows, which `read` gives.
fn send<'a>(
    device: &Device,
    dtype: DType,
    n_units: usize,
    n_rows: usize,
    read: impl Fn(Range<usize>) -> Cow<'a, [u8]>,
    name: &str,
) -> Result<Part> {
    let (main_bytes, aux_words) = sizes(dtype);
    let groups = (n_rows * n_units).div_ceil(GROUP);
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
    let main = device.buffer((groups * GROUP * main_bytes) as u64, usage, name)?;
    let aux = device.buffer((groups * aux_words * 4) as u64, usage, name)?;
    let row_bytes = n_units * UNIT / dtype.block_len() * dtype.block_bytes();
    let chunk_rows = (CHUNK / row_bytes).max(1).next_multiple_of(GROUP);
    let mut in_flight = 0;
    for row in (0..n_rows).step_by(chunk_rows) {
        let first = row * n_units; // a multiple of GROUP
        let (new_main, new_aux) = lay_out(dtype, &read(row..n_rows.min(row + chunk_rows)));
        if !new_main.is_empty() {
            let at = (first * main_bytes) as u64;
            device.queue.write_buffer(&main.raw, at, &new_main);
        }
        if !new_aux.is_empty() {
            let at = (first / GROUP * aux_words * 4) as u64;
            let bytes = bytemuck::cast_slice(&new_aux);
            device.queue.write_buffer(&aux.raw, at, bytes);
        }
        in_flight += new_main.len() + 4 * new_aux.len();
        if in_flight > IN_FLIGHT {
            device.queue.submit([]);
            device.wait(None)?;
            in_flight = 0;
        }
    }
    device.check(name)?;
    Ok(Part {
        first: 0,
        n_rows,
        main,
        aux,
    })
}

/// Blocks of a file to both planes, group by group; the last group may be short and is filled up.
fn lay_out(dtype: DType, bytes: &[u8]) -> (Vec<u8>, Vec<u32>) {
    let (main_bytes, aux_words) = sizes(dtype);
    let group_bytes = GROUP * UNIT / dtype.block_len() * dtype.block_bytes();
    let n_groups = bytes.len().div_ceil(group_bytes);
    let mut main = vec![0; n_groups * GROUP * main_bytes];
    let mut aux = vec![0; n_groups * aux_words];
    let group = |i: usize, main: &mut [u8], aux: &mut [u32]| {
        let blocks = &bytes[i * group_bytes..bytes.len().min((i + 1) * group_bytes)];
        lay_out_group(dtype, blocks, main, aux);
    };
    // rayon wants chunks of at least one.
    match (main_bytes, aux_words) {
        (_, 0) => main
            .par_chunks_mut(GROUP * main_bytes)
            .enumerate()
            .for_each(|(i, main)| group(i, main, &mut [])),
        (0, _) => aux
            .par_chunks_mut(aux_words)
            .enumerate()
            .for_each(|(i, aux)| group(i, &mut [], aux)),
        _ => main
            .par_chunks_mut(GROUP * main_bytes)
            .zip(aux.par_chunks_mut(aux_words))
            .enumerate()
            .for_each(|(i, (main, aux))| group(i, main, aux)),
    }
    (main, aux)
}

/// The blocks of a group of units. Formats of 256 have one, others up to eight.
fn lay_out_group(dtype: DType, bytes: &[u8], main: &mut [u8], aux: &mut [u32]) {
    let units = main.chunks_exact_mut(16);
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => main[..bytes.len()].copy_from_slice(bytes),
        DType::Q8_0 => {
            let blocks = quant::blocks::<quant::BlockQ8_0>(bytes);
            for (i, (block, main)) in blocks.iter().zip(main.chunks_exact_mut(32)).enumerate() {
                main.copy_from_slice(bytemuck::cast_slice(&block.qs));
                aux[i / 2] |= u32::from(block.d) << (i % 2 * 16);
            }
        }
        DType::Q4_0 => {
            let blocks = quant::blocks::<quant::BlockQ4_0>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[i / 2] |= u32::from(block.d) << (i % 2 * 16);
            }
        }
        DType::IQ4_NL => {
            let blocks = quant::blocks::<quant::BlockIQ4NL>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[i / 2] |= u32::from(block.d) << (i % 2 * 16);
            }
        }
        DType::Q4_1 => {
            let blocks = quant::blocks::<quant::BlockQ4_1>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[i] = halves(block.d, block.m);
            }
        }
        DType::Q5_0 => {
            let blocks = quant::blocks::<quant::BlockQ5_0>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[i / 2 * 3 + i % 2] = fifth_bits(block.qh);
                aux[i / 2 * 3 + 2] |= u32::from(block.d) << (i % 2 * 16);
            }
        }
        DType::Q5_1 => {
            let blocks = quant::blocks::<quant::BlockQ5_1>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[2 * i] = halves(block.d, block.m);
                aux[2 * i + 1] = fifth_bits(block.qh);
            }
        }
        DType::MXFP4 => {
            let blocks = quant::blocks::<quant::BlockMXFP4>(bytes);
            for (i, (block, main)) in blocks.iter().zip(units).enumerate() {
                main.copy_from_slice(&block.qs);
                aux[i / 4] |= u32::from(block.e) << (i % 4 * 8);
            }
        }
        DType::Q4_K => {
            for block in quant::blocks::<quant::BlockQ4K>(bytes) {
                let code = |i: usize| nibble(&block.qs, i);
                put_nibbles(main, code);
                put_scales_mins(aux, block.d, block.dmin, block.scales_mins());
            }
        }
        DType::Q5_K => {
            for block in quant::blocks::<quant::BlockQ5K>(bytes) {
                put_nibbles(main, |i| nibble(&block.qs, i));
                put_scales_mins(aux, block.d, block.dmin, block.scales_mins());
                put_bits(&mut aux[5..], |i| block.qh[i % 32] >> (i / 32) & 1);
            }
        }
        DType::Q6_K => {
            for block in quant::blocks::<quant::BlockQ6K>(bytes) {
                put_nibbles(main, |i| {
                    let (half, i) = (i / 128, i % 128);
                    block.ql[half * 64 + i % 64] >> (i / 64 * 4) & 15
                });
                aux[0] = block.d.into();
                put_bytes(&mut aux[1..5], bytemuck::cast_slice(&block.scales));
                put_pairs(&mut aux[5..], |i| {
                    let (half, i) = (i / 128, i % 128);
                    block.qh[half * 32 + i % 32] >> (i / 32 * 2) & 3
                });
            }
        }
        DType::IQ4_XS => {
            for block in quant::blocks::<quant::BlockIQ4XS>(bytes) {
                main.copy_from_slice(&block.qs);
                aux[0] = block.d.into();
                put_bytes(&mut aux[1..], bytemuck::cast_slice(&block.scales()));
            }
        }
        DType::Q2_K => {
            for block in quant::blocks::<quant::BlockQ2K>(bytes) {
                aux[0] = halves(block.d, block.dmin);
                put_bytes(&mut aux[1..5], &block.scales);
                put_pairs(&mut aux[5..], |i| pair(&block.qs, i));
            }
        }
        DType::Q3_K => {
            for block in quant::blocks::<quant::BlockQ3K>(bytes) {
                aux[0] = block.d.into();
                let scales: [i8; 16] = std::array::from_fn(|i| block.scale(i));
                put_bytes(&mut aux[1..5], bytemuck::cast_slice(&scales));
                put_pairs(&mut aux[5..21], |i| pair(&block.qs, i));
                put_bits(&mut aux[21..], |i| block.hmask[i % 32] >> (i / 32) & 1);
            }
        }
        DType::TQ1_0 => {
            for block in quant::blocks::<quant::BlockTQ1_0>(bytes) {
                // Its weights divided by its scale are -1, 0, 1; a scale of one shows them.
                let unscaled = quant::BlockTQ1_0 {
                    d: quant::f32_to_f16(1.0),
                    ..*block
                };
                let mut codes = [0.0; quant::QK_K];
                quant::Block::dequantize(&unscaled, &mut codes);
                aux[0] = block.d.into();
                put_pairs(&mut aux[1..], |i| (codes[i] + 1.0) as u8);
            }
        }
        DType::TQ2_0 => {
            for block in quant::blocks::<quant::BlockTQ2_0>(bytes) {
                aux[0] = block.d.into();
                put_pairs(&mut aux[1..], |i| pair(&block.qs, i));
            }
        }
    }
}

fn halves(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

/// Code `i` of the nibbles of Q4_K and Q5_K: 32 bytes serve 64 weights, the low halves first.
fn nibble(qs: &[u8; 128], i: usize) -> u8 {
    qs[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15
}

/// Code `i` of two bits of Q2_K, Q3_K and TQ2_0: 32 bytes serve 128 weights.
fn pair(qs: &[u8; 64], i: usize) -> u8 {
    qs[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3
}

/// See `shaders/quant/nibbles.wgsl`.
fn put_nibbles(main: &mut [u8], code: impl Fn(usize) -> u8) {
    for (i, byte) in main.iter_mut().enumerate() {
        let first = i / 16 * UNIT + i % 16;
        *byte = code(first) | code(first + 16) << 4;
    }
}

/// See `shaders/quant/pairs.wgsl`.
fn put_pairs(words: &mut [u32], code: impl Fn(usize) -> u8) {
    for (i, word) in words.iter_mut().enumerate() {
        *word = (0..16).fold(0, |word, j| {
            let shift = j % 4 * 8 + j / 4 * 2;
            word | u32::from(code(16 * i + j)) << shift
        });
    }
}

/// See `shaders/quant/bits.wgsl`.
fn put_bits(words: &mut [u32], code: impl Fn(usize) -> u8) {
    for (i, word) in words.iter_mut().enumerate() {
        *word = (0..UNIT).fold(0, |word, j| {
            word | u32::from(code(UNIT * i + j)) << (j % 4 * 8 + j / 4)
        });
    }
}

fn fifth_bits(qh: [u8; 4]) -> u32 {
    let mut word = [0];
    put_bits(&mut word, |i| qh[i / 8] >> (i % 8) & 1);
    word[0]
}

fn put_bytes(words: &mut [u32], bytes: &[u8]) {
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *word = u32::from_le_bytes(*bytes);
    }
}

fn put_scales_mins(aux: &mut [u32], d: u16, dmin: u16, (scales, mins): ([u8; 8], [u8; 8])) {
    aux[0] = halves(d, dmin);
    for i in 0..4 {
        let of = |j: usize| u16::from_le_bytes([scales[j], mins[j]]);
        aux[1 + i] = halves(of(2 * i), of(2 * i + 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks that are sent begin and end anywhere in the rows of a part.
    #[test]
    fn rows_of_a_part_are_those_of_each_expert_in_turn() {
        let (row_bytes, of_expert, n_experts) = (3, 20, 4);
        let data: Vec<u8> = (0..row_bytes * of_expert * n_experts)
            .map(|i| i as u8)
            .collect();
        for part in [0..8, 8..16, 16..20, 0..20] {
            let rows: Vec<&[u8]> = data
                .chunks(row_bytes)
                .enumerate()
                .filter(|(i, _)| part.contains(&(i % of_expert)))
                .map(|(_, row)| row)
                .collect();
            for start in 0..rows.len() {
                for end in start + 1..=rows.len() {
                    let found = rows_of(&data, row_bytes, of_expert, part.clone(), start..end);
                    assert_eq!(
                        *found,
                        rows[start..end].concat(),
                        "{part:?}, {start}..{end}"
                    );
                }
            }
        }
    }
}
