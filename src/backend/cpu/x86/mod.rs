//! Kernels of the x86-64 levels that have one text for all: macros, since a function takes the features of its level
//! from an attribute and intrinsics need them.
//!
//! A level's `floats.rs` names a vector type `V`, the number of its `LANES` and some twenty operations.

use std::sync::LazyLock;

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

/// How weights are asked for before their use.
pub(super) struct Reads {
    /// Whether panels are read two at a time, as two long streams, and not one after the other.
    pub pairs: bool,
    /// Bytes from a weight of a panel to the one that is asked for meanwhile.
    pub panel_ahead: usize,
    /// The same of each of four rows.
    pub row_ahead: usize,
}

/// What is fastest here, as measured. One thread of a Zen 5 decodes 6 to 29 % faster with one stream of panels asked for
/// 8 KiB ahead than with two of 3 KiB; a Xeon with AMX is 5 to 10 % slower so.
static READS: LazyLock<Reads> = LazyLock::new(|| {
    let vendor = std::arch::x86_64::__cpuid(0);
    match [vendor.ebx, vendor.edx, vendor.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
    {
        b"AuthenticAMD" => Reads {
            pairs: false,
            panel_ahead: 8192,
            row_ahead: 2048,
        },
        _ => Reads {
            pairs: true,
            panel_ahead: 3072,
            row_ahead: 3072,
        },
    }
});

/// See [`Reads`].
#[inline]
pub(super) fn reads() -> &'static Reads {
    &READS
}

/// Asks for the cache line `bytes` after the start of `x`; it need not exist.
#[inline]
#[target_feature(enable = "sse")]
pub(super) fn prefetch<T>(x: &T, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    _mm_prefetch::<_MM_HINT_T0>((x as *const T).cast::<i8>().wrapping_add(bytes));
}
