//! GEMV over panels, two vectors for sixteen rows.

use crate::backend::cpu::acts::Q8Row;

crate::backend::cpu::x86::panels::panels!("avx2,fma,f16c");
