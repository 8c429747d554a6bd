//! aarch64 with NEON and the dot product instructions (Armv8.2, every phone core since 2018).
//!
//! The intrinsics are not stable: `sdot` is written as assembly.
#![allow(unsafe_code, reason = "single instructions on registers")]

use std::arch::aarch64::*;
use std::arch::asm;

pub(crate) mod gemm;
pub(crate) mod gemv;
pub(crate) mod roofline;

/// Adds to each of the four sums the products of its four pairs of bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: one instruction on registers, of an extension that the function asks for.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.16b",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds to each of the four sums the products of its four bytes of `w` and bytes `4 * LANE..` of `x`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_lane<const LANE: usize>(mut sums: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    const { assert!(LANE < 4) };
    // SAFETY: one instruction on registers, of an extension that the function asks for.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {w:v}.16b, {x:v}.4b[{lane}]",
            sums = inout(vreg) sums,
            w = in(vreg) w,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
