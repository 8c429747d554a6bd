//! x86-64 with AVX2, FMA and F16C.
#![allow(unsafe_code, reason = "loads and stores through array references")]

use std::arch::x86_64::*;

use bytemuck::Pod;

pub(crate) mod attend;
pub(crate) mod elementwise;
mod floats;

/// The 16 bytes of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load128<T: Pod>(x: &T) -> __m128i {
    const { assert!(size_of::<T>() == 16) };
    // SAFETY: reads the 16 bytes of a borrowed plain value; no alignment is asked.
    unsafe { _mm_loadu_si128((x as *const T).cast()) }
}
