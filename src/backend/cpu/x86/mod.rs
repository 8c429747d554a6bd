//! Kernels of the x86-64 levels that have one text for all: macros, since a function takes the features of its level
//! from an attribute and intrinsics need them.
//!
//! A level's `floats.rs` names a vector type `V`, the number of its `LANES` and some twenty operations.

pub(super) mod attend;
pub(super) mod attend_chosen;
pub(super) mod attend_few;
pub(super) mod attend_lanes;
pub(super) mod elementwise;
pub(super) mod floats;
pub(super) mod gemm_float;
pub(super) mod gemv;
pub(super) mod multiply_panels;
pub(super) mod panels;
pub(super) mod roofline;

/// Asks for the cache line `bytes` after the start of `x`; it need not exist.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch<T>(x: &T, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    _mm_prefetch::<_MM_HINT_T0>((x as *const T).cast::<i8>().wrapping_add(bytes));
}
