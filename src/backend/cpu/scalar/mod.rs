//! Plain Rust: the definition of every operation, and the bodies that faster levels compile again for themselves.

pub(crate) mod attend;
pub(crate) mod attend_lanes;
pub(crate) mod elementwise;
pub(crate) mod gemv;
pub(crate) mod multiply_panels;
pub(crate) mod panels;
pub(crate) mod roofline;
pub(crate) mod short_conv;
