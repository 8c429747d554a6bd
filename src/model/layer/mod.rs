//! Parts that architectures share.

pub(crate) mod attention;
pub(crate) mod decoder;
pub(crate) mod embedding;
pub(crate) mod ffn;
pub(crate) mod moe;
pub(crate) mod short_conv;
