//! Kinglet: an on-device LLM runtime.

pub mod backend;
pub mod error;
pub mod quant;
pub mod sampler;

pub use error::{Error, Result};
