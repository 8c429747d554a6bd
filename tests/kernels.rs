//! Every row of the kernel table that this CPU can run, against the scalar row; the scalar rows against `f64`.

#[path = "kernels/attend.rs"]
mod attend;
#[path = "kernels/blocks.rs"]
mod blocks;
#[path = "kernels/common.rs"]
mod common;
#[path = "kernels/elementwise.rs"]
mod elementwise;
#[path = "kernels/lanes.rs"]
mod lanes;
#[path = "kernels/matmul.rs"]
mod matmul;
#[path = "common/models.rs"]
mod models;
#[path = "kernels/recorded.rs"]
mod recorded;
#[path = "kernels/roofline.rs"]
mod roofline;

use std::collections::HashSet;
use std::process::Command;

use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::table::{self, Kernel, Operations};
use kinglet::quant::DType;

/// `(name, level)` of every row of every table.
fn all_rows() -> Vec<(&'static str, &'static str)> {
    fn names<K: Kernel>(rows: &'static [K]) -> impl Iterator<Item = (&'static str, &'static str)> {
        rows.iter().map(|k| (k.name(), k.isa().name()))
    }
    names(table::GEMV)
        .chain(names(table::GEMV_PANELS))
        .chain(names(table::GEMM))
        .chain(names(table::TILES))
        .chain(names(table::GATED))
        .chain(names(table::PACK_BF16))
        .chain(names(table::ATTEND_TILES))
        .chain(names(table::ATTEND_LANES))
        .chain(names(table::MULTIPLY_PANELS))
        .chain(names(table::QUANTIZE))
        .chain(names(table::RMS_NORM))
        .chain(names(table::ROPE_HALVES))
        .chain(names(table::ROPE_NEIGHBOURS))
        .chain(names(table::GLU))
        .chain(names(table::ADD))
        .chain(names(table::TO_F16))
        .chain(names(table::WEIGH))
        .chain(names(table::LARGEST))
        .chain(names(table::SHORT_CONV))
        .chain(names(table::ATTEND))
        .chain(names(table::READ))
        .chain(names(table::PRODUCTS_I8))
        .chain(names(table::PRODUCTS_BF16))
        .chain(names(table::PRODUCTS_F32))
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

/// The rows chosen for each format and operation.
fn chosen() -> Vec<&'static str> {
    let matmuls = DType::ALL.iter().flat_map(|t| {
        let (gemv, gemm) = (table::gemv(*t), table::gemm(*t));
        let rows = [gemv, gemm].map(|k| k.expect("every format has a row"));
        rows.into_iter().chain(table::tiles(*t)).map(|k| k.name())
    });
    let best = Operations::best();
    let operations = [
        best.quantize.name(),
        best.pack_bf16.name(),
        best.rms_norm.name(),
        best.rope_halves.name(),
        best.rope_neighbours.name(),
        best.glu.name(),
        best.add.name(),
        best.to_f16.name(),
        best.short_conv.name(),
        best.attend.name(),
    ];
    matmuls.chain(operations).collect()
}

/// Runs as a process of its own below: the variables are read once.
#[test]
#[ignore = "a part of the_environment_chooses"]
fn print_the_chosen_rows() {
    println!("chosen: {}", chosen().join(" "));
}

#[test]
fn the_environment_chooses() {
    let choose = |name: &str, value: &str| -> Vec<String> {
        let run = Command::new(std::env::current_exe().expect("the path of this test"))
            .args([
                "--exact",
                "print_the_chosen_rows",
                "--ignored",
                "--nocapture",
            ])
            .env_remove("KINGLET_ISA")
            .env_remove("KINGLET_KERNEL")
            .env(name, value)
            .output()
            .expect("this test starts itself");
        let output = String::from_utf8(run.stdout).expect("UTF-8");
        let (_, rows) = output
            .split_once("chosen: ")
            .expect("the line printed above");
        let line = rows.lines().next().expect("a line");
        line.split(' ').map(str::to_owned).collect()
    };
    for &isa in Isa::ALL.iter().filter(|isa| isa.detected()) {
        let rows = choose("KINGLET_ISA", isa.name());
        let level = |row: &String| all_rows().into_iter().find(|(name, _)| name == row);
        for row in &rows {
            let level = level(row).expect("a row of the table").1;
            let level = Isa::from_name(level).expect("a level");
            assert!(level <= isa, "{row} with {}", isa.name());
        }
        let of_level = rows
            .iter()
            .filter(|row| row.ends_with(&format!("_{}", isa.name())));
        assert!(of_level.count() > 0, "no row of {}", isa.name());
    }
    let rows = choose("KINGLET_KERNEL", "gemv_q4_0_q8_scalar,add_scalar");
    for named in ["gemv_q4_0_q8_scalar", "add_scalar"] {
        assert!(rows.iter().any(|row| row == named), "{named}");
    }
}
