//! Measures what this machine can do at most with some number of threads: memory of several kinds read by several
//! loops, bytes and floats multiplied. The loops are rows of the kernel table (`READ`, `PRODUCTS_I8`, `PRODUCTS_F32`),
//! spread over the same pool as the token loop.
#![allow(unsafe_code, reason = "mapping the temporary file of a measurement")]

use std::fs::{File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use memmap2::{Mmap, MmapMut, MmapOptions};

use super::isa::Isa;
use super::pool::Pool;
use super::table::{
    Kernel, Line, PRODUCTS_BF16, PRODUCTS_F32, PRODUCTS_I8, Products, ProductsBf16, ProductsF32,
    ProductsI8, READ, Read, Ready,
};
use crate::error::{Error, Result};
use crate::profile::machine;
use crate::profile::roofline::{Key, Rate, Resource, Roofline};

/// Bytes that a thread reads before it claims more.
const PIECE: usize = 4 << 20;

/// How much is done for a measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    /// Bytes of the memory that is read.
    pub buffer_bytes: usize,
    /// Rounds of [`Products`] in a call, at most [`Products::MAX_ROUNDS`].
    pub rounds: usize,
    /// Time for each loop, and each kind of memory.
    pub time: Duration,
}

impl Effort {
    /// Memory of four times the last-level cache, so that little of it is still there when it is read again; some
    /// seconds in all.
    pub fn for_this_machine() -> Self {
        let cache = machine::last_level_cache().unwrap_or(32 << 20);
        let most = machine::memory_available().unwrap_or(1 << 30) / 4;
        let bytes = (4 * cache)
            .clamp(256 << 20, 4 << 30)
            .min(most.max(64 << 20));
        Self {
            buffer_bytes: usize::try_from(bytes).unwrap_or(256 << 20),
            rounds: Products::<f32, f32, 16>::MAX_ROUNDS,
            time: Duration::from_millis(300),
        }
    }
}

/// What is kept of a measurement with `n_threads` belongs to this.
pub fn key(n_threads: usize) -> Key {
    let levels = Isa::ALL.iter().filter(|isa| isa.detected());
    Key {
        cpu: machine::cpu_name().unwrap_or_else(|| "unknown CPU".into()),
        levels: levels.map(|isa| isa.name().to_owned()).collect(),
        version: env!("CARGO_PKG_VERSION").into(),
        n_threads,
    }
}

/// How fast each row of a table computes on all threads at once.
macro_rules! product_rates {
    ($resource:ident, $kernel:ident, $table:ident, $pool:expr, $effort:expr, $w:expr, $x:expr, $n:literal) => {{
        let (w, x) = ([[$w; $n]; 4], [[$x; $n]; 4]);
        let run = |kernel: &Ready<$kernel>, rounds| {
            let mut products = Products {
                w: &w,
                x: &x,
                rounds,
                sum: 0.0,
            };
            kernel.run(&mut products);
            std::hint::black_box(products.sum);
        };
        let ops = 2 * 4 * 4 * $n;
        rates_of(Resource::$resource, $table, $pool, $effort, ops, run)
    }};
}

/// Measures everything with `n_threads`. Memory or a temporary file that cannot be had is left out.
///
/// # Errors
/// If the operating system refuses a thread.
pub fn measure(n_threads: usize, effort: &Effort) -> Result<Roofline> {
    let pool =
        Pool::new(n_threads).map_err(|e| Error::Invalid(format!("{n_threads} threads: {e}")))?;
    let (start, waited) = (Instant::now(), machine::waited_for_cores());
    let mut rates = Vec::new();
    for resource in [Resource::Anonymous, Resource::HugePages, Resource::Mapped] {
        if let Ok(memory) = Memory::new(resource, effort.buffer_bytes, &pool) {
            rates.extend(read_rates(resource, &pool, &[memory.bytes()], effort.time));
        }
    }
    rates.extend(product_rates!(
        Int8,
        ProductsI8,
        PRODUCTS_I8,
        &pool,
        effort,
        3u8,
        -5i8,
        64
    ));
    // Upper halves of the floats 3 and -5.
    let (w, x) = (0x4040u16, 0xc0a0u16);
    rates.extend(product_rates!(
        Bf16,
        ProductsBf16,
        PRODUCTS_BF16,
        &pool,
        effort,
        w,
        x,
        32
    ));
    rates.extend(product_rates!(
        F32,
        ProductsF32,
        PRODUCTS_F32,
        &pool,
        effort,
        3f32,
        -5f32,
        16
    ));
    // Before the pool ends: threads that are gone are not counted.
    let waited = waited.zip(machine::waited_for_cores());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // More threads than cores wait for each other.
    let waited = waited.filter(|_| n_threads <= cores);
    let waited = waited.map_or(0, |(before, now)| now.saturating_sub(before).as_nanos());
    let threads_time = start.elapsed().as_nanos().max(1) * n_threads.max(1) as u128;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(Roofline {
        key: key(n_threads),
        measured_at: since.map_or(0, |since| since.as_secs()),
        buffer_bytes: effort.buffer_bytes as u64,
        cache_bytes: machine::last_level_cache(),
        disturbed: u64::try_from(1000 * waited / threads_time).unwrap_or(1000),
        rates,
    })
}

/// How fast each loop reads `parts`, which are the memory of `resource`, as often as `time` allows.
pub fn read_rates(resource: Resource, pool: &Pool, parts: &[&[u8]], time: Duration) -> Vec<Rate> {
    let pieces: Vec<&[Line]> = parts
        .iter()
        .flat_map(|part| part.as_chunks().0.chunks(PIECE / size_of::<Line>()))
        .collect();
    let bytes: usize = pieces.iter().map(|piece| size_of_val(*piece)).sum();
    // Slower levels read no faster: the highest has the widest loads.
    let ready = || READ.iter().filter_map(Ready::new);
    let level = ready().map(|kernel| kernel.isa()).max();
    ready()
        .filter(|kernel| bytes > 0 && Some(kernel.isa()) == level)
        .map(|kernel| {
            let pass = || read(&kernel, pool, &pieces);
            pass(); // pages may not be there yet
            rate(
                resource,
                kernel.name(),
                kernel.isa(),
                bytes,
                best_time(time, pass),
            )
        })
        .collect()
}

fn read(kernel: &Ready<Read>, pool: &Pool, pieces: &[&[Line]]) {
    let total = AtomicU64::new(0);
    pool.run(pieces.len(), &|i| {
        let mut sum = 0;
        kernel.run(pieces[i], &mut sum);
        total.fetch_xor(sum, Ordering::Relaxed);
    });
    std::hint::black_box(total);
}

/// How fast each row of `table` computes on all threads at once. `run` does some rounds of it, of `ops` operations each.
fn rates_of<K: Kernel>(
    resource: Resource,
    table: &'static [K],
    pool: &Pool,
    effort: &Effort,
    ops: usize,
    run: impl Fn(&Ready<K>, usize) + Sync,
) -> Vec<Rate> {
    let rounds = effort.rounds;
    // Several tasks for each thread: one that starts late does not hold the others.
    let n_tasks = 16 * pool.n_threads();
    const RUNS: usize = 8;
    let ready = table.iter().filter_map(Ready::new);
    ready
        .map(|kernel| {
            let pass = || pool.run(n_tasks, &|_| (0..RUNS).for_each(|_| run(&kernel, rounds)));
            pass(); // wide vectors are slow until the core has made ready for them
            let best = best_time(effort.time, pass);
            let ops = ops * rounds * RUNS * n_tasks;
            rate(resource, kernel.name(), kernel.isa(), ops, best)
        })
        .collect()
}

fn rate(resource: Resource, kernel: &str, level: Isa, n: usize, time: Duration) -> Rate {
    Rate {
        resource,
        kernel: kernel.into(),
        level: level.name().into(),
        per_second: (n as f64 / time.as_secs_f64().max(1e-9)) as u64,
    }
}

/// The shortest time of `pass`, repeated for `time`, three times at least.
fn best_time(time: Duration, pass: impl Fn()) -> Duration {
    let start = Instant::now();
    let mut best = Duration::MAX;
    let mut n = 0;
    while n < 3 || start.elapsed() < time {
        let start = Instant::now();
        pass();
        best = best.min(start.elapsed());
        n += 1;
    }
    best
}

/// Memory to be read.
enum Memory {
    Anonymous(MmapMut),
    Mapped(Mmap),
}

impl Memory {
    fn new(resource: Resource, bytes: usize, pool: &Pool) -> io::Result<Self> {
        if resource == Resource::Mapped {
            return mapped(bytes).map(Self::Mapped);
        }
        let mut map = MmapOptions::new().len(bytes).map_anon()?;
        if resource == Resource::HugePages {
            #[cfg(target_os = "linux")]
            map.advise(memmap2::Advice::HugePage)?;
            #[cfg(not(target_os = "linux"))]
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Written once, else all of it would be the same page of zeros.
        pool.run_pieces(&mut map, PIECE, &|i, piece| piece.fill(i as u8 | 1));
        Ok(Self::Anonymous(map))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Memory::Anonymous(map) => map,
            Memory::Mapped(map) => map,
        }
    }
}

/// A file without contents, mapped: its pages are in memory when they have been read once, each its own, and nothing
/// is written to the disk.
fn mapped(bytes: usize) -> io::Result<Mmap> {
    let (file, path) = temporary_file()?;
    let map = file.set_len(bytes as u64).and_then(|()| {
        // SAFETY: the file is new, and nobody but this process knows of it; it is not written or cut while it is mapped.
        unsafe { MmapOptions::new().len(bytes).map(&file) }
    });
    // On systems that refuse this while it is mapped, the file stays in the folder for temporary files.
    let _ = std::fs::remove_file(path);
    map
}

fn temporary_file() -> io::Result<(File, PathBuf)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanos = time.map_or(0, |time| time.subsec_nanos());
    let name = format!("kinglet-{}-{nanos}", std::process::id());
    let path = std::env::temp_dir().join(name);
    options.open(&path).map(|file| (file, path))
}
