//! Every row of the kernel table that this CPU can run, against the scalar row; the scalar rows against `f64`.

#[path = "kernels/attend.rs"]
mod attend;
#[path = "kernels/common.rs"]
mod common;
#[path = "kernels/elementwise.rs"]
mod elementwise;
#[path = "kernels/matmul.rs"]
mod matmul;

use std::collections::HashSet;

use kinglet::backend::cpu::table::{self, Kernel};

/// `(name, level)` of every row of every table.
fn all_rows() -> Vec<(&'static str, &'static str)> {
    fn names<K: Kernel>(rows: &'static [K]) -> impl Iterator<Item = (&'static str, &'static str)> {
        rows.iter().map(|k| (k.name(), k.isa().name()))
    }
    names(table::GEMV)
        .chain(names(table::GEMM))
        .chain(names(table::QUANTIZE))
        .chain(names(table::RMS_NORM))
        .chain(names(table::ROPE_HALVES))
        .chain(names(table::ROPE_NEIGHBOURS))
        .chain(names(table::GLU))
        .chain(names(table::ADD))
        .chain(names(table::TO_F16))
        .chain(names(table::SHORT_CONV))
        .chain(names(table::ATTEND_F16))
        .chain(names(table::ATTEND_F32))
        .collect()
}

#[test]
fn names_are_unique_and_end_with_their_level() {
    let rows = all_rows();
    let unique: HashSet<_> = rows.iter().map(|(name, _)| name).collect();
    assert_eq!(unique.len(), rows.len());
    for (name, isa) in rows {
        assert!(name.ends_with(&format!("_{isa}")), "{name} of {isa}");
    }
}
