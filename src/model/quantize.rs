//! A model file from another, its matrices in a smaller format.
//!
//! Weights are read from the map, made floats, quantized and written piece by piece, so that memory stays below some
//! tens of megabytes whatever the size of the model. The new file appears under its name when it is complete.

use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;

use crate::gguf::{Advice, Gguf, TensorInfo, TensorSpec, TensorType, Writer};
use crate::quant::{self, DType};
use crate::{Error, Result};

mod mix;

pub use self::mix::{Candidate, Choice, Mix, Traits, choose};

/// The version of the formats that llama.cpp writes to `general.quantization_version`: 2 since half floats became scales.
const QUANTIZATION_VERSION: u32 = 2;
/// Weights that a thread converts at a time: whole blocks of any format.
const TASK_LEN: usize = 256 * quant::QK_K;
/// Weights that are converted before they are written.
const PIECE_LEN: usize = 64 * TASK_LEN;

/// How to quantize a file.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The formats of the new file.
    pub to: Mix,
    /// Threads; 0 for as many as the machine has.
    pub threads: usize,
    /// Whether matrices that are quantized already may be quantized again, at a further loss.
    pub allow_requantize: bool,
}

/// How far [`quantize_file`] has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The tensor at work.
    pub tensor: &'a str,
    /// Bytes of the input's tensors that are done.
    pub done_bytes: u64,
    /// Bytes of all of them.
    pub total_bytes: u64,
}

/// What [`quantize_file`] has made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Summary {
    /// Tensors in the file.
    pub tensors: usize,
    /// Those whose rows did not fit the format meant for them, so that they got a larger one.
    pub fallbacks: usize,
    /// Bytes of the input's tensors.
    pub bytes_in: u64,
    /// Bytes of the output's tensors.
    pub bytes_out: u64,
}

/// Writes the model `input` to `output`, quantized as llama.cpp's tool would do it, bit for bit (see [`choose`] for what
/// becomes of which tensor), tensors by layer and name. `progress` is told after each piece and ends the work by breaking.
///
/// # Errors
/// [`Error::Invalid`] if `output` is one of the files of `input` or a matrix is quantized already; [`Error::BadModel`]
/// if a weight is no finite number, or too large for its new format; [`Error::Unsupported`] if a matrix has a format that
/// cannot be read; [`Error::Cancelled`] if `progress` breaks; what [`Gguf::open`] and [`Writer`] say. There is no new file
/// then, and an old one of that name is left as it was.
pub fn quantize_file(
    input: &Path,
    output: &Path,
    options: &Options,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Summary> {
    let gguf = Gguf::open(input)?;
    refuse_own_input(&gguf, output)?;
    let mut tensors: Vec<&TensorInfo> = gguf.tensors().collect();
    tensors.sort_by_key(|info| mix::layer_order(&info.name));
    let candidates: Vec<Candidate> = tensors.iter().copied().map(Candidate::from).collect();
    let choices = choose(options.to, Traits::read(gguf.metadata())?, &candidates)?;
    let conversions = tensors
        .iter()
        .zip(&choices)
        .map(|(info, choice)| Conversion::of(info, *choice, options))
        .collect::<Result<Vec<_>>>()?;

    let mut metadata = gguf.metadata().clone();
    for (key, value) in [
        ("general.quantization_version", QUANTIZATION_VERSION),
        ("general.file_type", options.to.file_type()),
    ] {
        metadata.remove(key); // it moves to the end, where llama.cpp writes it
        metadata.set(key, value);
    }
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .zip(&conversions)
        .map(|(info, conversion)| TensorSpec::new(&info.name, conversion.output(), info.dims()))
        .collect();
    let mut summary = Summary {
        tensors: tensors.len(),
        fallbacks: choices.iter().filter(|c| c.is_fallback).count(),
        bytes_in: tensors.iter().map(|t| t.bytes as u64).sum(),
        bytes_out: 0,
    };
    for spec in &specs {
        summary.bytes_out += spec.bytes()? as u64;
    }

    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build()
        .map_err(|e| Error::Invalid(format!("{} threads: {e}", options.threads)))?;
    let mut writer = Writer::create(output, &metadata, &specs)?;
    let mut buffer = Vec::new();
    let mut done_bytes = 0;
    // Advice may be refused, and nothing is lost.
    let _ = gguf.advise_all(Advice::Sequential);
    for (info, conversion) in tensors.iter().zip(conversions) {
        let data = gguf.raw(&info.name)?;
        let piece_bytes = conversion.input_bytes(PIECE_LEN);
        for (i, piece) in data.chunks(piece_bytes).enumerate() {
            let done = Progress {
                tensor: &info.name,
                done_bytes,
                total_bytes: summary.bytes_in,
            };
            if progress(done).is_break() {
                return Err(Error::Cancelled);
            }
            let written = pool
                .install(|| conversion.run(piece, &mut buffer))
                .map_err(|e| e.of(info, i * PIECE_LEN))?;
            writer.append(written)?;
            done_bytes += piece.len() as u64;
        }
        let _ = gguf.advise(&info.name, Advice::DontNeed);
    }
    writer.finish()?;
    Ok(summary)
}

/// Refuses to put the new file in the place of one that it is made from.
fn refuse_own_input(gguf: &Gguf, output: &Path) -> Result<()> {
    let Ok(target) = output.canonicalize() else {
        return Ok(()); // nothing there yet
    };
    for part in gguf.parts() {
        let path = part.path();
        if path.canonicalize().is_ok_and(|path| path == target) {
            let output = output.display();
            return Err(Error::Invalid(format!(
                "{output}: expected another file than the input"
            )));
        }
    }
    Ok(())
}

impl<'a> From<&'a TensorInfo> for Candidate<'a> {
    fn from(info: &'a TensorInfo) -> Self {
        Self {
            name: &info.name,
            shape: info.shape,
        }
    }
}

/// What becomes of a tensor.
#[derive(Clone, Copy)]
enum Conversion {
    /// It stays as it is.
    Keep(TensorType),
    /// It gets another format.
    To { from: DType, to: DType },
}

/// A weight that a conversion cannot accept: its index in the piece, its value, what was expected.
struct BadWeight {
    index: usize,
    value: f32,
    expected: Option<DType>,
}

impl BadWeight {
    /// As an error of a tensor of which `before` weights come before the piece.
    fn of(self, info: &TensorInfo, before: usize) -> Error {
        let expected = match self.expected {
            None => "a finite number".to_owned(),
            Some(dtype) => format!("a number within the range of {dtype}"),
        };
        Error::BadModel(format!(
            "tensor {}: weight {}: expected {expected}, found {}",
            info.name,
            before + self.index,
            self.value
        ))
    }
}

impl Conversion {
    fn of(info: &TensorInfo, choice: Choice, options: &Options) -> Result<Self> {
        let to = match choice.dtype {
            Some(to) if info.dtype != TensorType::Known(to) => to,
            _ => return Ok(Self::Keep(info.dtype)),
        };
        match info.dtype {
            TensorType::Known(from @ (DType::F32 | DType::F16 | DType::BF16)) => {
                Ok(Self::To { from, to })
            }
            TensorType::Known(from) if options.allow_requantize => Ok(Self::To { from, to }),
            TensorType::Known(from) => Err(Error::Invalid(format!(
                "tensor {}: expected F32, F16 or BF16 to quantize from, found {from}; quantizing again must be allowed",
                info.name
            ))),
            TensorType::Foreign(_) => Err(Error::Unsupported {
                kind: "tensor type",
                found: format!("{} of tensor {}", info.dtype, info.name),
                supported: "F32, F16, BF16".into(),
            }),
        }
    }

    fn output(self) -> TensorType {
        match self {
            Self::Keep(dtype) => dtype,
            Self::To { to, .. } => to.into(),
        }
    }

    /// Bytes of `n` weights of the input, of which `n` are whole blocks.
    fn input_bytes(self, n: usize) -> usize {
        match self {
            Self::Keep(TensorType::Known(from)) | Self::To { from, .. } => bytes(from, n),
            Self::Keep(TensorType::Foreign(_)) => n,
        }
    }

    /// Converts whole blocks. What it returns lies in `buffer` or is the piece itself.
    fn run<'a>(self, piece: &'a [u8], buffer: &'a mut Vec<u32>) -> Result<&'a [u8], BadWeight> {
        match self {
            Self::Keep(TensorType::Foreign(_)) => Ok(piece),
            Self::Keep(TensorType::Known(dtype)) => {
                check(dtype, piece)?;
                Ok(piece)
            }
            Self::To { from, to } => {
                let len = piece.len() / from.block_bytes() * from.block_len();
                let len = bytes(to, len);
                // Words, since blocks have an alignment of up to 4.
                buffer.resize(len.div_ceil(4), 0);
                let out = &mut bytemuck::cast_slice_mut(buffer)[..len];
                convert(from, piece, to, out)?;
                Ok(out)
            }
        }
    }
}

/// Bytes of `n` weights, whole blocks whose size does not overflow: a piece, a task or what is left of a checked tensor.
fn bytes(dtype: DType, n: usize) -> usize {
    n / dtype.block_len() * dtype.block_bytes()
}

/// The first weight that is not finite.
fn find_bad(x: &[f32]) -> Option<(usize, f32)> {
    let index = x.iter().position(|x| !x.is_finite())?;
    Some((index, x[index]))
}

/// Whether all weights of whole blocks are finite.
fn check(dtype: DType, blocks: &[u8]) -> Result<(), BadWeight> {
    let tasks = blocks.par_chunks(bytes(dtype, TASK_LEN)).enumerate();
    tasks.try_for_each_init(Vec::new, |x, (i, blocks)| {
        x.resize(blocks.len() / dtype.block_bytes() * dtype.block_len(), 0.0);
        quant::dequantize(dtype, blocks, x);
        match find_bad(x) {
            None => Ok(()),
            Some((index, value)) => Err(BadWeight {
                index: i * TASK_LEN + index,
                value,
                expected: None,
            }),
        }
    })
}

/// Converts whole blocks to whole blocks.
fn convert(from: DType, blocks: &[u8], to: DType, out: &mut [u8]) -> Result<(), BadWeight> {
    let tasks = blocks
        .par_chunks(bytes(from, TASK_LEN))
        .zip(out.par_chunks_mut(bytes(to, TASK_LEN)))
        .enumerate();
    tasks.try_for_each_init(
        || (Vec::new(), Vec::new()),
        |(x, back), (i, (blocks, out))| {
            let len = blocks.len() / from.block_bytes() * from.block_len();
            let bad = |index, value, expected| BadWeight {
                index: i * TASK_LEN + index,
                value,
                expected,
            };
            x.resize(len, 0.0);
            quant::dequantize(from, blocks, x);
            if let Some((index, value)) = find_bad(x) {
                return Err(bad(index, value, None));
            }
            quant::quantize(to, x, out);
            // A scale may be too large for a half float.
            back.resize(len, 0.0);
            quant::dequantize(to, out, back);
            match find_bad(back) {
                None => Ok(()),
                Some((index, _)) => Err(bad(index, x[index], Some(to))),
            }
        },
    )
}
