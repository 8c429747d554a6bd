//! Random numbers, and which rows can run.

use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::table::{Kernel, Ready};

/// xorshift64*: the same numbers on every machine.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// In -1..1.
    pub fn float(&mut self) -> f32 {
        (self.bits() & 0xff_ffff) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.float() * scale).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
}

/// The rows that this CPU can run and that are not scalar; prints those that it cannot.
pub fn vector_rows<K: Kernel>(rows: &'static [K]) -> impl Iterator<Item = (&'static K, Ready<K>)> {
    rows.iter()
        .filter(|k| k.isa() != Isa::Scalar)
        .filter_map(|k| {
            let ready = Ready::new(k);
            if ready.is_none() {
                println!("skipped, this CPU lacks {}: {}", k.isa().name(), k.name());
            }
            ready.map(|ready| (k, ready))
        })
}

/// The rows that this CPU can run.
pub fn all_rows<K: Kernel>(rows: &'static [K]) -> impl Iterator<Item = Ready<K>> {
    let vectors = vector_rows(rows).map(|(_, kernel)| kernel);
    std::iter::once(scalar_row(rows)).chain(vectors)
}

/// The scalar row of a table.
pub fn scalar_row<K: Kernel>(rows: &'static [K]) -> Ready<K> {
    let row = rows.iter().find(|k| k.isa() == Isa::Scalar);
    Ready::new(row.expect("a scalar row")).expect("scalar runs everywhere")
}

/// Whether `a` is `b` within `tolerance`.
#[track_caller]
pub fn assert_near(a: f32, b: f64, tolerance: f64, what: &dyn std::fmt::Display) {
    let error = (f64::from(a) - b).abs();
    assert!(
        error <= tolerance,
        "{what}: {a} for {b}, {error:e} > {tolerance:e}"
    );
}

/// `x` rounded to bf16.
pub fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let odd = bits >> 16 & 1;
    f32::from_bits((bits + 0x7fff + odd) & 0xffff_0000)
}
