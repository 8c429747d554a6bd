//! Products of queries with turned rows.

use super::floats as v;
use crate::backend::cpu::table::{PANEL_ROWS, PanelProducts};

crate::backend::cpu::x86::multiply_panels::multiply_panels!(
    "avx512bw,avx512dq,avx512vl,avx512vnni"
);
