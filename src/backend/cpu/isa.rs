//! Instruction-set levels: what this CPU has, and what the user allows (`KINGLET_ISA`).

use std::sync::OnceLock;

/// A level of the kernel table. Within an architecture, later levels include the earlier ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Isa {
    /// Plain Rust.
    Scalar,
    /// x86-64: AVX2, FMA, F16C.
    Avx2,
    /// x86-64: AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// x86-64: the same with VBMI and GFNI.
    Avx512Vbmi,
    /// x86-64: AMX tiles of bf16, and AVX-512 with conversions to it.
    Amx,
    /// aarch64: NEON.
    Neon,
    /// aarch64: NEON with the dot product instructions.
    NeonDotprod,
}

impl Isa {
    /// Every level.
    pub const ALL: &[Isa] = &[
        Isa::Scalar,
        Isa::Avx2,
        Isa::Avx512Vnni,
        Isa::Avx512Vbmi,
        Isa::Amx,
        Isa::Neon,
        Isa::NeonDotprod,
    ];

    /// The name, as `KINGLET_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Vbmi => "avx512vbmi",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::NeonDotprod => "neon_dotprod",
        }
    }

    /// Whether this CPU, and the operating system, can run the level.
    pub fn detected(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                Isa::Avx2.detected()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vbmi => {
                Isa::Avx512Vnni.detected()
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("gfni")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => {
                Isa::Avx512Vbmi.detected()
                    && is_x86_feature_detected!("avx512bf16")
                    && super::amx::permitted()
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDotprod => {
                Isa::Neon.detected() && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            _ => false,
        }
    }

    /// The highest level that is allowed: what `KINGLET_ISA` names, else the best. Read once.
    pub fn allowed() -> Isa {
        static ALLOWED: OnceLock<Isa> = OnceLock::new();
        *ALLOWED.get_or_init(|| {
            let named = std::env::var("KINGLET_ISA")
                .ok()
                .and_then(|name| Isa::from_name(&name));
            named.unwrap_or(Isa::NeonDotprod)
        })
    }

    /// The level called `name`.
    pub fn from_name(name: &str) -> Option<Isa> {
        Self::ALL.iter().copied().find(|isa| isa.name() == name)
    }

    /// Whether the level is detected and allowed.
    pub fn usable(self) -> bool {
        self <= Isa::allowed() && self.detected()
    }
}
