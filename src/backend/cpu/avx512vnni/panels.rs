//! GEMV over panels, a vector for sixteen rows.

use crate::backend::cpu::acts::Q8Row;

crate::backend::cpu::x86::panels::panels!("avx512bw,avx512dq,avx512vl,avx512vnni");
