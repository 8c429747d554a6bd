//! Kinglet: an on-device LLM runtime. A quantized GGUF file is mapped and run on the CPU.
//!
//! The modules in the order in which data flows:
//!
//! - [`gguf`]: bytes to header, metadata and tensor table, all checked;
//! - [`quant`]: the weight formats, their layout, dequantize, quantize;
//! - [`tokenizer`]: text to tokens and back, chat templates;
//! - [`model`]: an architecture per file, written over [`backend::Backend`];
//! - [`backend`]: the operations of a forward pass, and the CPU or GPU that runs them;
//! - [`experts`]: which experts are in memory, and the reads that bring them;
//! - [`sparsity`]: which keys attention may leave out;
//! - [`grammar`]: what a reply may be;
//! - [`tools`]: calls of tools in replies;
//! - [`session`]: one timeline of tokens on a model;
//! - [`sampler`]: logits to a token;
//! - [`profile`]: what the machine can do at most, what was done, and where the time went;
//! - [`cancel`]: a flag by which another thread stops work;
//! - `capi`: the C interface, with the feature of that name; `kinglet.h` is its manual;
//! - [`error`]: the one error type.

pub mod backend;
pub mod cancel;
#[cfg(feature = "capi")]
pub mod capi;
pub mod error;
pub mod experts;
pub mod gguf;
pub mod grammar;
pub mod model;
pub mod profile;
pub mod quant;
pub mod sampler;
pub mod session;
pub mod sparsity;
pub mod tokenizer;
pub mod tools;

pub use backend::{BackendKind, KvType, KvTypes};
pub use cancel::Cancel;
pub use error::{DeviceFault, Error, Result};
pub use session::{
    LoadOptions, MemoryReport, Model, ModelInfo, OnExceed, Repack, Session, SessionOptions,
};
pub use sparsity::Sparsity;

/// The README's example, compiled with the documentation tests.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
pub struct Readme;
