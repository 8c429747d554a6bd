//! x86-64 with AMX tiles of bf16, and AVX-512 with bf16 conversions beside them.
//!
//! A tile is 16 rows of 64 bytes. `tdpbf16ps` adds the product of a tile of 16 weight rows by 32 weights and a tile of
//! 32 by 16 activations, stored as pairs, to a tile of 16 by 16 floats: 8192 products in 16 cycles, and the sums never
//! leave the tiles while a span of weights lasts. The registers are named in the assembly alone: the compiler does not
//! know them.
#![allow(unsafe_code, reason = "tile instructions; vectors as bits")]
#![allow(
    clippy::needless_range_loop,
    reason = "loops that count keep vectors in registers; adaptors that are not inlined do not"
)]

pub(crate) mod attend;
pub(crate) mod gemm;
pub(crate) mod pack;
pub(crate) mod roofline;

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::acts::Tile;
use super::avx512vnni::{load, load128, load256, store};

/// Asks the operating system for the tile registers, once a process.
pub(super) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        let features = __cpuid_count(7, 0).edx;
        let [tile, bf16, int8] = [24, 22, 25].map(|bit| features >> bit & 1);
        tile == 1 && bf16 == 1 && int8 == 1 && requested()
    })
}

/// Linux gives the 8 KiB of state to a process that asks before its first tile instruction.
#[cfg(target_os = "linux")]
fn requested() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call reads its two numbers and changes what this process may use; 0 is success.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn requested() -> bool {
    false
}

/// The tile registers of this thread, configured as eight whole tiles; given back when dropped, so that a switch of
/// threads need not save them.
struct Tiles(());

impl Tiles {
    /// To be called from rows of this level alone: they run where [`permitted`] said yes.
    fn configure() -> Self {
        #[repr(C, align(64))]
        struct Config([u8; 64]);
        let mut config = Config([0; 64]);
        config.0[0] = 1; // palette
        for i in 0..8 {
            config.0[16 + 2 * i] = 64; // bytes of a row, 16 bits
            config.0[48 + i] = 16; // rows
        }
        // SAFETY: the CPU has tiles and the system gave them, or no row of this level would run; the 64 bytes are
        // valid. Memory is not declared untouched, so the stores above come first.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, preserves_flags)) };
        Self(())
    }

    /// The first four registers: `sums`, or zeros where they start fresh.
    #[inline]
    fn load_sums(&self, sums: &[Tile; 4], fresh: bool) {
        // SAFETY: as in `multiply`.
        unsafe {
            if fresh {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, preserves_flags)
                );
            } else {
                asm!(
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm1, [{sums} + {row} + 1024]",
                    "tileloadd tmm2, [{sums} + {row} + 2048]",
                    "tileloadd tmm3, [{sums} + {row} + 3072]",
                    sums = in(reg) sums.as_ptr(),
                    row = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
        }
    }

    /// Writes the first four registers.
    #[inline]
    fn store_sums(&self, sums: &mut [Tile; 4]) {
        // SAFETY: as in `multiply`.
        unsafe {
            asm!(
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 1024], tmm1",
                "tilestored [{sums} + {row} + 2048], tmm2",
                "tilestored [{sums} + {row} + 3072], tmm3",
                sums = in(reg) sums.as_mut_ptr(),
                row = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
        }
    }

    /// `sums[2i + j] += w[k][i] x[k][j]` over all `k`, by two tiles of 16 weight rows and two of 16 tokens. `fresh`
    /// sums start from zero.
    #[inline]
    fn multiply(&self, w: &[[Tile; 2]], x: &[[Tile; 2]], sums: &mut [Tile; 4], fresh: bool) {
        assert_eq!(w.len(), x.len());
        self.load_sums(sums, fresh);
        // SAFETY: `self` exists, so the registers are configured as whole tiles; each load and store is of 16 rows of
        // 64 adjacent bytes, the tiles borrowed here.
        unsafe {
            for (w, x) in w.iter().zip(x) {
                asm!(
                    "tileloadd tmm4, [{w} + {row}]",
                    "tileloadd tmm6, [{x} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{x} + {row} + 1024]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{w} + {row} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    w = in(reg) w.as_ptr(),
                    x = in(reg) x.as_ptr(),
                    row = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
        }
        self.store_sums(sums);
    }

    /// `sums[i] += a[k][i] b[k]` over all `k`, by four tiles of 16 rows and one of 16 columns.
    #[inline]
    fn multiply_column(&self, a: &[[Tile; 4]], b: &[Tile], sums: &mut [Tile; 4], fresh: bool) {
        assert_eq!(a.len(), b.len());
        self.load_sums(sums, fresh);
        // SAFETY: as in `multiply`.
        unsafe {
            for (a, b) in a.iter().zip(b) {
                asm!(
                    "tileloadd tmm4, [{b} + {row}]",
                    "tileloadd tmm5, [{a} + {row}]",
                    "tdpbf16ps tmm0, tmm5, tmm4",
                    "tileloadd tmm6, [{a} + {row} + 1024]",
                    "tdpbf16ps tmm1, tmm6, tmm4",
                    "tileloadd tmm7, [{a} + {row} + 2048]",
                    "tdpbf16ps tmm2, tmm7, tmm4",
                    "tileloadd tmm5, [{a} + {row} + 3072]",
                    "tdpbf16ps tmm3, tmm5, tmm4",
                    a = in(reg) a.as_ptr(),
                    b = in(reg) b as *const Tile,
                    row = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
        }
        self.store_sums(sums);
    }

    /// As [`Tiles::multiply`], by the first 16 tokens alone: sums 0 and 2.
    #[inline]
    fn multiply_first(&self, w: &[[Tile; 2]], x: &[[Tile; 2]], sums: &mut [Tile; 4], fresh: bool) {
        assert_eq!(w.len(), x.len());
        // SAFETY: as in `multiply`.
        unsafe {
            if fresh {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm2",
                    options(nostack, preserves_flags)
                );
            } else {
                asm!(
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm2, [{sums} + {row} + 2048]",
                    sums = in(reg) sums.as_ptr(),
                    row = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
            for (w, x) in w.iter().zip(x) {
                asm!(
                    "tileloadd tmm4, [{w} + {row}]",
                    "tileloadd tmm6, [{x} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{w} + {row} + 1024]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    w = in(reg) w.as_ptr(),
                    x = in(reg) x.as_ptr(),
                    row = in(reg) 64usize,
                    options(nostack, preserves_flags)
                );
            }
            asm!(
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 2048], tmm2",
                sums = in(reg) sums.as_mut_ptr(),
                row = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Four times `n` times the product of a tile of unsigned bytes and one of signed, from registers alone: to see how
    /// fast they are.
    fn repeat_i8(&self, w: &Tile, x: &Tile, n: usize) -> [Tile; 4] {
        let mut sums = [Tile([[0; 64]; 16]); 4];
        // SAFETY: as in `multiply`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{w} + {row}]",
                "tileloadd tmm5, [{w} + {row}]",
                "tileloadd tmm6, [{x} + {row}]",
                "tileloadd tmm7, [{x} + {row}]",
                w = in(reg) w as *const Tile,
                x = in(reg) x as *const Tile,
                row = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
            for _ in 0..n {
                asm!(
                    "tdpbusd tmm0, tmm4, tmm6",
                    "tdpbusd tmm1, tmm4, tmm7",
                    "tdpbusd tmm2, tmm5, tmm6",
                    "tdpbusd tmm3, tmm5, tmm7",
                    options(nomem, nostack, preserves_flags)
                );
            }
        }
        self.store_sums(&mut sums);
        sums
    }

    /// As [`Tiles::repeat_i8`], of bf16.
    fn repeat_bf16(&self, w: &Tile, x: &Tile, n: usize) -> [Tile; 4] {
        let mut sums = [Tile([[0; 64]; 16]); 4];
        // SAFETY: as in `multiply`.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{w} + {row}]",
                "tileloadd tmm5, [{w} + {row}]",
                "tileloadd tmm6, [{x} + {row}]",
                "tileloadd tmm7, [{x} + {row}]",
                w = in(reg) w as *const Tile,
                x = in(reg) x as *const Tile,
                row = in(reg) 64usize,
                options(nostack, preserves_flags)
            );
            for _ in 0..n {
                asm!(
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    options(nomem, nostack, preserves_flags)
                );
            }
        }
        self.store_sums(&mut sums);
        sums
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the registers were configured by this thread; nobody else's values are in them.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Two vectors of floats, rounded to nearest, ties to even.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn to_bf16(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes without padding.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Lane `j` of row `i` goes to lane `i` of row `j`; lanes are 32 bits.
#[inline]
#[target_feature(enable = "avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut quads = rows;
    // Of rows 4i to 4i + 3, lanes j, j + 4, j + 8, j + 12 in row 4i + j.
    for i in 0..4 {
        let [a, b, c, d] = [
            rows[4 * i],
            rows[4 * i + 1],
            rows[4 * i + 2],
            rows[4 * i + 3],
        ];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        quads[4 * i] = _mm512_unpacklo_epi64(ab_low, cd_low);
        quads[4 * i + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        quads[4 * i + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        quads[4 * i + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    let mut out = rows;
    for j in 0..4 {
        let [a, b, c, d] = [quads[j], quads[4 + j], quads[8 + j], quads[12 + j]];
        let ab_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
        let ab_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
        let cd_even = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
        let cd_odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
        out[j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_even, cd_even);
        out[4 + j] = _mm512_shuffle_i32x4::<0b10_00_10_00>(ab_odd, cd_odd);
        out[8 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_even, cd_even);
        out[12 + j] = _mm512_shuffle_i32x4::<0b11_01_11_01>(ab_odd, cd_odd);
    }
    out
}
