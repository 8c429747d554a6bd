//! Rows of the kernel table alone, on random legal values.
//!
//! A matrix kernel runs as a model runs it, on all threads of one pool; its weights are copied until they are more than
//! the largest cache holds, and each call takes the next copy, as each layer of a model has weights of its own. The
//! other kernels run on each thread for itself, with memory that stays in a cache.

use std::fmt::Write;
use std::hint::black_box;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use kinglet::backend::cpu::acts::{Acts, BF16_LEN, BF16_TOKENS, Q8Row, Q8RowMut, Tile};
use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::panels;
use kinglet::backend::cpu::pool::{OutCols, Output, Pool};
use kinglet::backend::cpu::table::{self, *};
use kinglet::backend::delta::Exact;
use kinglet::backend::{Activation, KvType, KvTypes};
use kinglet::profile::DeltaWork;
use kinglet::profile::machine;
use kinglet::profile::roofline::{Rate, Resource};
use kinglet::quant::{self, DType};
use serde_json::json;

use crate::args::{BenchArgs, Shape};
use crate::bench::output::{Column, Printer, Record};
use crate::bench::stats::{deviation, mean, median};
use crate::failure::{Failure, Outcome};
use crate::interrupt;
use crate::limits::{self, Measure};

use super::busy::Busy;

/// A repetition is at least this long: the clock and the first call weigh little.
const REPETITION: Duration = Duration::from_millis(20);

/// Keys in a page of the cache, as the backend has them.
const PAGE: usize = 256;

/// One row of the table.
#[derive(Clone, Copy)]
struct Entry {
    name: &'static str,
    isa: Isa,
    /// Format of weights and of activations, of matrix kernels.
    formats: Option<(DType, ActFormat)>,
    prepare: fn(&'static str, &Case) -> Prepared,
}

/// The size of a call.
#[derive(Clone, Copy)]
struct Case {
    /// Rows of a matrix, or keys.
    n: usize,
    /// Length of a row, or of a head.
    k: usize,
    n_tokens: usize,
    /// Of cached keys and values.
    kv: KvTypes,
}

/// What a call does, and the memory for it.
struct Prepared {
    /// On one thread; `None`: a matrix kernel, which runs on the pool.
    own: Option<Box<dyn FnMut() + Send>>,
    /// Read by a call.
    bytes: usize,
    /// Multiplications and additions of a call, where they are the work.
    ops: usize,
}

/// Every row, in the order of the table.
fn entries() -> Vec<Entry> {
    fn of<K: Kernel>(
        rows: &'static [K],
        prepare: fn(&'static str, &Case) -> Prepared,
    ) -> Vec<Entry> {
        let entry = |row: &'static K| Entry {
            name: row.name(),
            isa: row.isa(),
            formats: None,
            prepare,
        };
        rows.iter().map(entry).collect()
    }
    let matmuls = matmuls().map(|row| Entry {
        name: row.name(),
        isa: row.isa(),
        formats: Some((row.weights, row.acts)),
        prepare: matmul,
    });
    let mut entries: Vec<Entry> = matmuls.collect();
    entries.extend(of(table::GATED, gated));
    entries.extend(of(table::PACK_BF16, pack_bf16));
    entries.extend(of(table::QUANTIZE, quantize));
    entries.extend(of(table::RMS_NORM, rms_norm));
    entries.extend(of(table::ROPE_HALVES, rope_halves));
    entries.extend(of(table::ROPE_NEIGHBOURS, rope_neighbours));
    entries.extend(of(table::GLU, glu));
    entries.extend(of(table::ADD, add));
    entries.extend(of(table::TO_F16, to_f16));
    entries.extend(of(table::SHORT_CONV, short_conv));
    entries.extend(of(table::ATTEND, attend));
    entries.extend(of(table::ATTEND_TILES, attend_tiles));
    entries.extend(of(table::ATTEND_LANES, attend_lanes));
    entries.extend(of(table::READ, read));
    entries.extend(of(table::PRODUCTS_I8, products_i8));
    entries.extend(of(table::PRODUCTS_BF16, products_bf16));
    entries.extend(of(table::PRODUCTS_F32, products_f32));
    entries
}

fn matmuls() -> impl Iterator<Item = &'static MatMul> {
    [table::GEMV, table::GEMV_PANELS, table::GEMM, table::TILES]
        .into_iter()
        .flatten()
}

/// The row called `name` of `rows`, which this CPU can run: that was checked.
fn ready<K: Kernel>(rows: &'static [K], name: &str) -> Ready<K> {
    let row = rows.iter().find(|row| row.name() == name);
    row.and_then(Ready::new)
        .expect("a row of this table that can run")
}

/// Prints the table.
pub fn list() -> Outcome {
    use std::io::Write;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for entry in entries() {
        let runs = if !entry.isa.detected() {
            "not on this CPU"
        } else if !entry.isa.usable() {
            "not allowed by KINGLET_ISA"
        } else {
            "runs"
        };
        writeln!(out, "{:<32} {:<13} {runs}", entry.name, entry.isa.name())?;
    }
    out.flush()?;
    Ok(())
}

/// Measures the rows that `--kernel` names.
pub fn run(args: &BenchArgs) -> Outcome {
    let entries = chosen(&args.kernel)?;
    let shapes = |entry| shapes(entry, &args.shape);
    let shapes = entries.iter().map(shapes).collect::<Outcome<Vec<_>>>()?;
    let _watched = interrupt::busy();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads().unwrap_or_else(|| vec![cores]);
    let tokens = args.tokens().unwrap_or_else(|| vec![1, 512]);
    for (flag, numbers, max) in [("-t", &threads, 1024), ("--tokens", &tokens, 1 << 16)] {
        if let Some(n) = numbers.iter().find(|n| !(1..=max).contains(*n)) {
            return Err(Failure::usage(format!(
                "{flag}: expected 1 to {max}, found {n}"
            )));
        }
    }
    let kinds = super::plan::kv_types(args);
    let measure = if args.no_measure {
        Measure::Never
    } else {
        Measure::Missing
    };
    let mut printer = Printer::new(args.output, columns(), Vec::new());
    let measured = threads.iter().try_for_each(|n_threads| -> Outcome {
        let pool = Pool::new(*n_threads)?;
        let roofline = limits::roofline(*n_threads, measure)?;
        let _busy = Busy::start(args.n_busy())?;
        for (entry, shapes) in entries.iter().zip(&shapes) {
            let kinds = if attends(entry) {
                &kinds[..]
            } else {
                &kinds[..1]
            };
            for (shape, kv) in shapes
                .iter()
                .flat_map(|shape| kinds.iter().map(move |kv| (shape, kv)))
            {
                for n_tokens in &tokens {
                    let case = Case {
                        n: shape.0,
                        k: shape.1,
                        n_tokens: *n_tokens,
                        kv: *kv,
                    };
                    let prepared = (entry.prepare)(entry.name, &case);
                    let times = match entry.formats {
                        Some(formats) => time_matmul(entry, formats, &case, &pool, args)?,
                        None => time_own(entry, &case, &pool, args)?,
                    };
                    // A row has its own level's limit, whatever others reach, or that of the next level below that
                    // has a loop for it.
                    let limit = |resource| {
                        let roofline = roofline.as_ref()?;
                        let mut levels = Isa::ALL.iter().rev().filter(|isa| **isa <= entry.isa);
                        levels.find_map(|isa| roofline.best(resource, |level| level == isa.name()))
                    };
                    let compute = limit(match entry.formats {
                        Some((_, ActFormat::Q8)) => Resource::Int8,
                        Some((_, ActFormat::Bf16)) => Resource::Bf16,
                        _ => Resource::F32,
                    });
                    let read = roofline.as_ref().filter(|_| entry.formats.is_some());
                    let read = read.and_then(|r| r.best(Resource::Anonymous, |_| true));
                    let per_second = |rate: Option<&Rate>| rate.map(|r| r.per_second as f64);
                    let (memory, compute) = (per_second(read), per_second(compute));
                    // On each thread for itself, they do it that many times.
                    let times_done = if entry.formats.is_some() {
                        1
                    } else {
                        *n_threads
                    };
                    let result = Measured {
                        entry,
                        case,
                        n_threads: *n_threads,
                        bytes: prepared.bytes * times_done,
                        ops: prepared.ops * times_done,
                        memory,
                        compute,
                        times,
                    };
                    printer.row(result.record())?;
                }
            }
        }
        Ok(())
    });
    printer.end()?;
    measured
}

/// The named rows; each name must be one that this CPU runs.
fn chosen(names: &[String]) -> Outcome<Vec<Entry>> {
    let entries = entries();
    let find = |name: &String| {
        let entry = entries.iter().find(|entry| entry.name == name).copied();
        let entry = entry.ok_or_else(|| {
            Failure::usage(format!(
                "--kernel: expected a row of the kernel table (see --list-kernels), found `{name}`"
            ))
        })?;
        if !entry.isa.detected() {
            return Err(Failure::usage(format!(
                "--kernel {name}: this CPU cannot run the level {}",
                entry.isa.name()
            )));
        }
        Ok(entry)
    };
    names.iter().map(find).collect()
}

/// Whether a row reads cached keys and values.
fn attends(entry: &Entry) -> bool {
    entry.name.starts_with("attend_")
}

/// The shapes that were given, or one that suits the row; each must suit it.
fn shapes(entry: &Entry, given: &[Shape]) -> Outcome<Vec<Shape>> {
    if given.is_empty() {
        return Ok(vec![match entry.formats {
            Some(_) => Shape(2048, 2048),
            None if attends(entry) => Shape(PAGE, 64),
            None => Shape(1, 2048),
        }]);
    }
    for shape in given {
        let unit = match entry.formats {
            Some((dtype, ActFormat::Bf16)) => dtype.block_len().max(BF16_LEN),
            Some((dtype, ActFormat::Q8)) => dtype.block_len().max(32),
            Some((dtype, _)) => dtype.block_len(),
            None if attends(entry) || entry.name.starts_with("products_") => 64,
            None => 32,
        };
        if shape.0 == 0 || shape.1 == 0 || !shape.1.is_multiple_of(unit) {
            return Err(Failure::usage(format!(
                "--shape: expected N x K with K a multiple of {unit} for {}, found {}x{}",
                entry.name, shape.0, shape.1
            )));
        }
        if shape.0.saturating_mul(shape.1) > 1 << 32 {
            return Err(Failure::usage(format!(
                "--shape: expected at most 2^32 values, found {}x{}",
                shape.0, shape.1
            )));
        }
    }
    Ok(given.to_vec())
}

/// xorshift64*: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// In -1..1.
    fn floats(&mut self, n: usize) -> Vec<f32> {
        let float = |_| (self.bits() & 0xff_ffff) as f32 / (1 << 23) as f32 - 1.0;
        (0..n).map(float).collect()
    }

    /// `n` weights in whole blocks of a format.
    fn weights(&mut self, dtype: DType, n: usize) -> Vec<u8> {
        let mut out = vec![0; dtype.row_bytes(n).expect("whole blocks, checked before")];
        if dtype.can_quantize() {
            quant::quantize(dtype, &self.floats(n), &mut out);
            return out;
        }
        let mut weights = vec![0.0; dtype.block_len()];
        for block in out.chunks_exact_mut(dtype.block_bytes()) {
            // Some bits are no block: a scale that is no number.
            loop {
                block.iter_mut().for_each(|byte| *byte = self.bits() as u8);
                quant::dequantize(dtype, block, &mut weights);
                if weights.iter().all(|w| w.abs() < 1e6) {
                    break;
                }
            }
        }
        out
    }
}

/// Any seed but 0.
fn random() -> Random {
    Random(0x9e37_79b9_7f4a_7c15)
}

/// Each repetition's time of a call.
fn repetitions(args: &BenchArgs, mut call: impl FnMut()) -> Outcome<Vec<Duration>> {
    let mut once = |n: u32| {
        let start = Instant::now();
        (0..n).for_each(|_| call());
        start.elapsed()
    };
    // How many calls make a repetition; the first calls are the warm-up too.
    let mut n = 1;
    let mut time = once(n);
    while time < REPETITION / 2 && n < 1 << 24 {
        n *= 2;
        time = once(n);
    }
    let n = (n as f64 * REPETITION.as_secs_f64() / time.as_secs_f64().max(1e-9)).ceil() as u32;
    let repeat = |_| {
        if interrupt::hit() {
            return Err(Failure::Interrupted);
        }
        let n = n.max(1);
        Ok(once(n) / n)
    };
    (0..args.repetitions).map(repeat).collect()
}

fn time_own(entry: &Entry, case: &Case, pool: &Pool, args: &BenchArgs) -> Outcome<Vec<Duration>> {
    let calls: Vec<_> = (0..pool.n_threads())
        .map(|_| {
            let own = (entry.prepare)(entry.name, case).own;
            Mutex::new(own.expect("no matrix kernel"))
        })
        .collect();
    // Some calls to a task: a region costs as much as a short one.
    let once = Instant::now();
    (calls[0].lock().unwrap_or_else(|e| e.into_inner()))();
    let n = (50_000 / once.elapsed().as_nanos().max(50)).max(1) as u32;
    let times = repetitions(args, || {
        pool.run(calls.len(), &|i| {
            let mut call = calls[i].lock().unwrap_or_else(|e| e.into_inner());
            (0..n).for_each(|_| call());
        });
    })?;
    Ok(times.into_iter().map(|time| time / n).collect())
}

fn time_matmul(
    entry: &Entry,
    (dtype, format): (DType, ActFormat),
    case: &Case,
    pool: &Pool,
    args: &BenchArgs,
) -> Outcome<Vec<Duration>> {
    let Case { k, n_tokens, .. } = *case;
    let row = matmuls().find(|row| row.name() == entry.name);
    let row = row.expect("a row of its tables");
    let kernel = Ready::new(row).expect("chosen among those that run");
    let (of, unit_bytes) = unit(row, k);
    let n = case.n.next_multiple_of(of);
    let mut random = random();
    // Some rows are enough: nothing depends on the values.
    let mut some = random.weights(dtype, k * n.min(16));
    if of > 1 {
        let rows = std::mem::replace(&mut some, vec![0; unit_bytes]);
        panels::pack(dtype, &rows, &mut some);
    }
    let row_bytes = unit_bytes / of;
    let matrix_bytes = n / of * unit_bytes;
    let cache = machine::last_level_cache().unwrap_or(32 << 20);
    let most = machine::memory_available().unwrap_or(1 << 30) / 4;
    let bytes = usize::try_from((2 * cache).min(most)).unwrap_or(1 << 30);
    let n_copies = (bytes / matrix_bytes).max(1);
    let no_memory = |_| kinglet::Error::OutOfMemory {
        what: "copies of a matrix".into(),
        bytes,
    };
    let mut weights: Vec<u8> = Vec::new();
    weights
        .try_reserve_exact(n_copies * matrix_bytes)
        .map_err(no_memory)?;
    weights.extend(some.iter().cycle().take(matrix_bytes));
    (1..n_copies).for_each(|_| weights.extend_from_within(..matrix_bytes));

    let x = random.floats(n_tokens * k);
    let operations = Operations::best();
    let mut q8 = vec![
        0u32;
        if format == ActFormat::Q8 {
            n_tokens * Q8Row::bytes(k) / 4
        } else {
            0
        }
    ];
    for (x, row) in x
        .chunks_exact(k)
        .zip(q8.chunks_exact_mut(Q8Row::bytes(k) / 4))
    {
        let mut row = Q8RowMut::new(bytemuck::cast_slice_mut(row), k);
        operations.quantize.run(x, &mut row);
    }
    let mut bf16 = Vec::new();
    if format == ActFormat::Bf16 {
        let group = k / BF16_LEN;
        bf16 = vec![[Tile::zeroed(); 2]; n_tokens.div_ceil(BF16_TOKENS) * group];
        for (x, group) in x.chunks(BF16_TOKENS * k).zip(bf16.chunks_exact_mut(group)) {
            operations.pack_bf16.run(x, k, group);
        }
    }
    let acts = Acts {
        n_tokens,
        n_in: k,
        f32: &x,
        q8: bytemuck::cast_slice(&q8),
        bf16: &bf16,
    };
    // The tasks of the backend: `Cpu::linear`.
    let threads = pool.n_threads();
    let grain = if n_tokens == 1 {
        let rows = ((256 << 10) / row_bytes).min(n / (4 * threads)).max(1);
        rows.next_multiple_of(of.max(8))
    } else {
        (n / (4 * threads)).clamp(32, 256).next_multiple_of(32)
    };
    let mut y = vec![0.0; n_tokens * n];
    let mut copies = weights.chunks_exact(matrix_bytes).cycle();
    repetitions(args, || {
        let w = copies.next().expect("at least one copy");
        let mut outputs = [Output::new(&mut y, n)];
        pool.run_tiles(&mut outputs, (n_tokens, grain), &|mut tile| {
            let rows = tile.first_col..tile.first_col + tile.out.n_cols();
            kernel.run(
                &w[rows.start / of * unit_bytes..rows.end / of * unit_bytes],
                &acts,
                &mut tile.out,
            );
        });
    })
}

/// Rows that lie together, and their bytes.
fn unit(row: &MatMul, k: usize) -> (usize, usize) {
    let (of, bytes) = match row.layout {
        Layout::Rows => (1, row.weights.row_bytes(k)),
        Layout::Panels => (panels::ROWS, panels::panel_bytes(row.weights, k)),
    };
    (of, bytes.expect("whole blocks, checked before"))
}

fn matmul(name: &'static str, case: &Case) -> Prepared {
    let row = matmuls()
        .find(|row| row.name() == name)
        .expect("a row of its tables");
    let (of, bytes) = unit(row, case.k);
    Prepared {
        own: None,
        bytes: case.n.div_ceil(of) * bytes,
        ops: 2 * case.n * case.k * case.n_tokens,
    }
}

/// A call that reads `floats` floats and computes `ops` operations.
fn own(floats: usize, ops: usize, call: impl FnMut() + Send + 'static) -> Prepared {
    Prepared {
        own: Some(Box::new(call)),
        bytes: size_of::<f32>() * floats,
        ops,
    }
}

fn quantize(name: &'static str, case: &Case) -> Prepared {
    let (kernel, k, x) = (
        ready(table::QUANTIZE, name),
        case.k,
        random().floats(case.k * case.n_tokens),
    );
    let mut row = vec![0u32; Q8Row::bytes(k) / 4];
    own(x.len(), 0, move || {
        for x in x.chunks_exact(k) {
            kernel.run(x, &mut Q8RowMut::new(bytemuck::cast_slice_mut(&mut row), k));
        }
    })
}

/// Both matrices have `n` rows, rounded up to a tile.
fn gated(name: &'static str, case: &Case) -> Prepared {
    let kernel = ready(table::GATED, name);
    let row = table::GATED.iter().find(|row| row.name() == name);
    let dtype = row.expect("a row of its table").weights;
    let (n, n_tokens) = (case.n.next_multiple_of(BF16_LEN), case.n_tokens);
    // Super-blocks of 256 are whole too.
    let k = case.k.next_multiple_of(dtype.block_len());
    let mut random = random();
    let (gate, up) = (random.weights(dtype, n * k), random.weights(dtype, n * k));
    let pack = Operations::best().pack_bf16;
    let (n_k, n_groups) = (k / BF16_LEN, n_tokens.div_ceil(BF16_TOKENS));
    let mut bf16 = vec![[Tile::zeroed(); 2]; n_groups * n_k];
    let x = random.floats(n_tokens * k);
    for (x, group) in x.chunks(BF16_TOKENS * k).zip(bf16.chunks_exact_mut(n_k)) {
        pack.run(x, k, group);
    }
    let mut out = vec![[Tile::zeroed(); 2]; n_groups * (n / BF16_LEN)];
    let bytes = gate.len() + up.len();
    own(bytes / 4, 4 * n * k * n_tokens, move || {
        kernel.run(&mut GatedRows {
            gate: &gate,
            up: &up,
            x: &Acts {
                n_tokens,
                n_in: k,
                f32: &[],
                q8: &[],
                bf16: &bf16,
            },
            activation: Activation::Silu,
            out: OutCols::whole(&mut out, n / BF16_LEN),
        });
    })
}

fn pack_bf16(name: &'static str, case: &Case) -> Prepared {
    let (kernel, k, x) = (
        ready(table::PACK_BF16, name),
        case.k,
        random().floats(case.k * case.n_tokens),
    );
    let mut group = vec![[Tile::zeroed(); 2]; k / BF16_LEN];
    own(x.len(), 0, move || {
        for x in x.chunks(BF16_TOKENS * k) {
            kernel.run(x, k, &mut group);
        }
    })
}

fn rms_norm(name: &'static str, case: &Case) -> Prepared {
    let (kernel, k, x) = (
        ready(table::RMS_NORM, name),
        case.k,
        random().floats(case.k * case.n_tokens),
    );
    let (gain, mut y) = (random().floats(k), vec![0.0; k]);
    own(x.len(), 0, move || {
        for x in x.chunks_exact(k) {
            kernel.run(x, &gain, 1e-5, &mut y);
        }
    })
}

/// Cosines and sines of an angle: what is turned keeps its length, however often.
fn angles(n: usize) -> (Vec<f32>, Vec<f32>) {
    (vec![0.6; n], vec![0.8; n])
}

fn rope_halves(name: &'static str, case: &Case) -> Prepared {
    let (kernel, k, mut x) = (
        ready(table::ROPE_HALVES, name),
        case.k,
        random().floats(case.k * case.n_tokens),
    );
    let (cos, sin) = angles(k / 2);
    own(x.len(), 0, move || {
        for x in x.chunks_exact_mut(k) {
            kernel.run(x, &cos, &sin);
        }
    })
}

fn rope_neighbours(name: &'static str, case: &Case) -> Prepared {
    let (kernel, k, mut x) = (
        ready(table::ROPE_NEIGHBOURS, name),
        case.k,
        random().floats(case.k * case.n_tokens),
    );
    let (cos, sin) = angles(k / 2);
    own(x.len(), 0, move || {
        for x in x.chunks_exact_mut(k) {
            kernel.run(x, &cos, &sin);
        }
    })
}

fn glu(name: &'static str, case: &Case) -> Prepared {
    let (kernel, n) = (ready(table::GLU, name), case.k * case.n_tokens);
    let (gate, up) = (random().floats(n), random().floats(n));
    let mut out = gate.clone();
    own(2 * n, 0, move || {
        // Its own output again and again would fade to nothing.
        out.copy_from_slice(&gate);
        kernel.run(Activation::Silu, &mut out, &up);
    })
}

fn add(name: &'static str, case: &Case) -> Prepared {
    let (kernel, n) = (ready(table::ADD, name), case.k * case.n_tokens);
    let (mut x, y) = (random().floats(n), random().floats(n));
    own(2 * n, 0, move || kernel.run(&mut x, &y))
}

fn to_f16(name: &'static str, case: &Case) -> Prepared {
    let (kernel, n) = (ready(table::TO_F16, name), case.k * case.n_tokens);
    let (x, mut y) = (random().floats(n), vec![0; n]);
    own(n, 0, move || kernel.run(&x, &mut y))
}

fn short_conv(name: &'static str, case: &Case) -> Prepared {
    let (kernel, n_channels, n_tokens) = (ready(table::SHORT_CONV, name), case.k, case.n_tokens);
    let bcx = random().floats(3 * n_channels * n_tokens);
    let (taps, state) = (
        random().floats(3 * n_channels),
        random().floats(2 * n_channels),
    );
    let mut out = vec![0.0; n_channels * n_tokens];
    own(bcx.len(), 0, move || {
        kernel.run(&mut ShortConvRows {
            bcx: &bcx,
            n_channels,
            taps: &taps,
            state: &state,
            first: 0,
            out: &mut out,
        });
    })
}

fn attend(name: &'static str, case: &Case) -> Prepared {
    let kernel = ready(table::ATTEND, name);
    let Case { n, k, n_tokens, kv } = *case;
    let [keys, values] = [kv.keys, kv.values].map(|kind| random().weights(kind.dtype(), n * k));
    let q = random().floats(n_tokens * k);
    let visible = vec![(0, n); n_tokens];
    let (mut max, mut sum) = (vec![0.0; n_tokens], vec![0.0; n_tokens]);
    let mut out = vec![0.0; n_tokens * k];
    let bytes = keys.len() + values.len();
    let mut prepared = own(0, 4 * n * k * n_tokens, move || {
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        out.fill(0.0);
        kernel.run(&mut AttendSpan {
            q: &q,
            k: Rows::new(kv.keys, &keys),
            v: Rows::new(kv.values, &values),
            next: &[],
            head_dim: k,
            decode: true,
            visible: &visible,
            max: &mut max,
            sum: &mut sum,
            out: &mut out,
        });
    });
    prepared.bytes = bytes;
    prepared
}

/// All tokens come after all keys but their own, as in the last batch of a long prompt.
fn attend_batch(case: &Case, mut run: impl FnMut(AttendBatch) + Send + 'static) -> Prepared {
    let (head_dim, n_tokens) = (case.k, case.n_tokens);
    let n_keys = case.n.max(n_tokens);
    let start = n_keys - n_tokens;
    let n_pages = n_keys.div_ceil(PAGE);
    let mut random = random();
    let mut pages = |kind: KvType| -> Vec<Vec<u8>> {
        let page = |_| random.weights(kind.dtype(), PAGE * head_dim);
        (0..n_pages).map(page).collect()
    };
    let kv = case.kv;
    let (keys, values) = (pages(kv.keys), pages(kv.values));
    let q = random.floats(n_tokens * head_dim);
    let mut out = vec![0.0; n_tokens * head_dim];
    let seen: usize = (start..n_keys).map(|position| position + 1).sum();
    let mut prepared = own(0, 4 * seen * head_dim, move || {
        let rows = |kind| move |page| Rows::new(kind, page);
        let keys: Vec<_> = keys.iter().map(Vec::as_slice).map(rows(kv.keys)).collect();
        let values: Vec<_> = values
            .iter()
            .map(Vec::as_slice)
            .map(rows(kv.values))
            .collect();
        run(AttendBatch {
            q: &q,
            q_stride: head_dim,
            group: 1,
            head_dim,
            scale: 0.125,
            start,
            window: None,
            first: 0,
            page: PAGE,
            keys: &keys,
            values: &values,
            out: OutCols::whole(&mut out, head_dim),
        });
    });
    prepared.bytes = kv.row_bytes(n_keys * head_dim);
    prepared
}

fn attend_tiles(name: &'static str, case: &Case) -> Prepared {
    let kernel = ready(table::ATTEND_TILES, name);
    attend_batch(case, move |mut batch| kernel.run(&mut batch))
}

fn attend_lanes(name: &'static str, case: &Case) -> Prepared {
    let (kernel, frame) = (ready(table::ATTEND_LANES, name), 64);
    let mut room = vec![0.0; LanesBatch::room(case.n_tokens, case.k, frame)];
    attend_batch(case, move |attend| {
        kernel.run(&mut LanesBatch {
            attend,
            frame,
            sink: 0,
            exact: Exact::Last(1),
            thresholds: &[],
            most: 0,
            chosen: None,
            room: &mut room,
            done: DeltaWork::default(),
        });
    })
}

fn read(name: &'static str, case: &Case) -> Prepared {
    let kernel = ready(table::READ, name);
    let x = vec![[1; 64]; case.n * case.k * case.n_tokens / size_of::<Line>()];
    let mut prepared = own(0, 0, {
        let x = x.clone();
        move || {
            let mut sum = 0;
            kernel.run(&x, &mut sum);
            black_box(sum);
        }
    });
    prepared.bytes = size_of_val(&*x);
    prepared
}

/// `n * n_tokens` rounds, at most as many as are exact.
macro_rules! products {
    ($($name:ident, $table:ident, $w:ty, $x:ty, $n:literal, $values:expr;)*) => {
        $(fn $name(name: &'static str, case: &Case) -> Prepared {
            let kernel = ready(table::$table, name);
            let rounds = (1024 * case.n_tokens).min(Products::<$w, $x, $n>::MAX_ROUNDS);
            let (w, x): ($w, $x) = $values;
            let (w, x) = ([[w; $n]; 4], [[x; $n]; 4]);
            own(0, 2 * rounds * Products::<$w, $x, $n>::PER_ROUND, move || {
                let mut products = Products { w: &w, x: &x, rounds, sum: 0.0 };
                kernel.run(&mut products);
                black_box(products.sum);
            })
        })*
    };
}

products! {
    products_i8, PRODUCTS_I8, u8, i8, 64, (3, -5);
    products_bf16, PRODUCTS_BF16, u16, u16, 32, (0x4040, 0xc0a0);
    products_f32, PRODUCTS_F32, f32, f32, 16, (3.0, -5.0);
}

fn columns() -> Vec<Column> {
    vec![
        Column::text("kernel", 26),
        Column::number("shape", 11),
        Column::number("tokens", 6),
        Column::number("threads", 7),
        Column::number("µs", 17),
        Column::number("GB/s", 7),
        Column::number("%", 5),
        Column::number("GOP/s", 8),
        Column::number("%", 5),
    ]
}

struct Measured<'a> {
    entry: &'a Entry,
    case: Case,
    n_threads: usize,
    bytes: usize,
    ops: usize,
    /// Bytes and operations per second that can be.
    memory: Option<f64>,
    compute: Option<f64>,
    times: Vec<Duration>,
}

impl Measured<'_> {
    fn record(&self) -> Record {
        let us: Vec<f64> = self
            .times
            .iter()
            .map(|time| time.as_secs_f64() * 1e6)
            .collect();
        let seconds = median(&self.times).map_or(f64::NAN, |time| time.as_secs_f64().max(1e-12));
        let rate = |n: usize| (n > 0).then(|| n as f64 / seconds);
        let share = |rate: Option<f64>, limit: Option<f64>| Some(100.0 * rate? / limit?);
        let (read, computed) = (rate(self.bytes), rate(self.ops));
        let (read_share, computed_share) =
            (share(read, self.memory), share(computed, self.compute));
        let giga = |rate: Option<f64>| rate.map(|rate| rate / 1e9);
        let cell =
            |x: Option<f64>, digits: usize| x.map_or("-".to_owned(), |x| format!("{x:.digits$}"));
        let Case { n, k, kv, .. } = self.case;
        let mut shape = format!("{n}x{k}");
        if attends(self.entry) && kv != KvTypes::default() {
            write!(shape, " {}/{}", kv.keys.name(), kv.values.name()).expect("a string takes all");
        }
        Record {
            cells: vec![
                self.entry.name.to_owned(),
                shape,
                self.case.n_tokens.to_string(),
                self.n_threads.to_string(),
                format!("{:.2} ± {:.2}", mean(&us), deviation(&us)),
                cell(giga(read), 2),
                cell(read_share, 1),
                cell(giga(computed), 1),
                cell(computed_share, 1),
            ],
            fields: vec![
                ("kernel", json!(self.entry.name)),
                ("level", json!(self.entry.isa.name())),
                ("n_out", json!(self.case.n)),
                ("n_in", json!(self.case.k)),
                ("n_tokens", json!(self.case.n_tokens)),
                ("type_k", json!(attends(self.entry).then(|| kv.keys.name()))),
                (
                    "type_v",
                    json!(attends(self.entry).then(|| kv.values.name())),
                ),
                ("n_threads", json!(self.n_threads)),
                ("avg_us", json!(mean(&us))),
                ("stddev_us", json!(deviation(&us))),
                ("median_us", json!(seconds * 1e6)),
                ("bytes", json!(self.bytes)),
                ("ops", json!(self.ops)),
                ("gb_s", json!(giga(read))),
                ("percent_of_memory", json!(read_share)),
                ("gop_s", json!(giga(computed))),
                ("percent_of_compute", json!(computed_share)),
                ("limit_memory_gb_s", json!(giga(self.memory))),
                ("limit_compute_gop_s", json!(giga(self.compute))),
            ],
            lists: vec![("samples_us", json!(us))],
            details: Vec::new(),
            notes: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_this_cpu_runs() {
        let cases = [(8, 256, 1), (33, 512, 40)];
        for entry in entries().iter().filter(|entry| entry.isa.detected()) {
            for (n, k, n_tokens) in cases {
                let kv = KvTypes::default();
                let case = Case { n, k, n_tokens, kv };
                let prepared = (entry.prepare)(entry.name, &case);
                assert!(prepared.bytes > 0 || prepared.ops > 0, "{}", entry.name);
                assert_eq!(
                    prepared.own.is_none(),
                    entry.formats.is_some(),
                    "{}",
                    entry.name
                );
                if let Some(mut call) = prepared.own {
                    call();
                    call();
                }
            }
        }
    }

    #[test]
    fn random_weights_are_numbers() {
        for dtype in DType::ALL {
            let n = 4 * dtype.block_len();
            let mut weights = vec![0.0; n];
            quant::dequantize(*dtype, &random().weights(*dtype, n), &mut weights);
            assert!(weights.iter().all(|w| w.is_finite()), "{dtype}");
            assert!(weights.iter().any(|w| *w != 0.0), "{dtype}");
        }
    }
}
