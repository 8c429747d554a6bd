//! Hostile GGUF files: each kind of lie has its own error; truncated, flipped and mutated headers give an error or a
//! model that is sound; and memory while reading stays below 64 MiB + 4 × the bytes of the header.
#![allow(
    unsafe_code,
    reason = "an allocator that counts implements an unsafe trait"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::Arc;

use kinglet::gguf::{Gguf, TensorInfo};
use kinglet::{Error, Result};

// ---------------------------------------------------------------------------------------------------- memory

/// Counts the bytes that each thread holds, and the most it held.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Not counted while a thread ends and its variables are gone.
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(held.get())));
    });
}

// SAFETY: every call goes to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize); // the worst case: both at once
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The result of `f`, and the most bytes it held at once.
fn peak_of<T>(f: impl FnOnce() -> T) -> (T, u64) {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let result = f();
    let peak = PEAK.with(Cell::get) - before;
    (result, peak as u64)
}

#[test]
fn the_allocator_counts() {
    let (_, peak) = peak_of(|| drop(vec![1u8; 1 << 20]));
    assert!((1 << 20..1 << 21).contains(&peak), "{peak}");
    let (_, peak) = peak_of(|| {
        let mut v = vec![1u8; 1 << 20];
        v.reserve_exact(2 << 20);
        v.len()
    });
    assert!((4 << 20..5 << 20).contains(&peak), "old and new: {peak}");
}

// ------------------------------------------------------------------------------------------------- soundness

/// A file in memory that a test goes on changing between two readings.
#[derive(Clone)]
struct Shared(Arc<Vec<u8>>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// What must hold of every file that opens, computed by other means than the reader's.
fn check_sound(gguf: &Gguf, file_bytes: usize) {
    let alignment = gguf.alignment();
    assert!(alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment));
    let mut names = HashSet::new();
    let mut ranges = Vec::new();
    for t in gguf.tensors() {
        assert!(names.insert(&t.name), "two tensors {}", t.name);
        assert!(!t.name.is_empty() && t.name.len() <= 255);
        assert!((1..=4).contains(&t.n_dims));
        assert!(t.shape.iter().all(|d| *d > 0));
        let start = t.offset - gguf.header_bytes().next_multiple_of(alignment);
        assert!(start.is_multiple_of(alignment));
        let end = u128::from(t.offset) + t.bytes as u128;
        assert!(end <= file_bytes as u128, "{t:?}");
        ranges.push((u128::from(t.offset), end));
        if let Some(dtype) = t.dtype.dtype() {
            let rows: u128 = t.shape[1..].iter().map(|d| *d as u128).product();
            let blocks = t.shape[0] as u128 / dtype.block_len() as u128;
            assert_eq!(t.shape[0] % dtype.block_len(), 0);
            assert_eq!(t.bytes as u128, rows * blocks * dtype.block_bytes() as u128);
            let data = gguf.load(&t.name).unwrap().data;
            assert_eq!(data.len(), t.bytes);
        } else {
            let result = gguf.load(&t.name);
            assert!(matches!(result, Err(Error::Unsupported { .. })));
        }
    }
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|w| w[0].1 <= w[1].0), "overlap");
    let m = gguf.metadata();
    let mut keys = HashSet::new();
    for (key, value) in m.iter() {
        assert!(keys.insert(key), "two keys {key}");
        assert!(std::ptr::eq(m.get(key).unwrap(), value), "{key}");
        assert!(value.to_string().len() < 10_000, "{key} is printed in full");
        // Every getter on every value: an error at worst.
        let _ = (
            m.opt_u32(key),
            m.opt_f32(key),
            m.opt_str(key),
            m.opt_bool(key),
        );
        let _ = (
            m.opt_i32s(key),
            m.opt_f32s(key),
            m.opt_per_layer_usize(key, 6),
        );
        if let Ok(Some(strings)) = m.opt_strings(key) {
            let text: usize = strings.iter().map(<[u8]>::len).sum();
            assert!(text <= file_bytes);
        }
    }
    assert!(gguf.problems().iter().all(|p| !p.contains('\n')));
}

/// Opens `bytes`: a sound model or an error of one line, within the bound. Returns whether it opened.
#[track_caller]
fn open_within_bound(bytes: &Shared) -> bool {
    let (result, peak) = peak_of(|| Gguf::from_bytes(bytes.clone()));
    let header_bytes = result.as_ref().map_or(0, Gguf::header_bytes);
    let bound = (64 << 20) + 4 * header_bytes;
    assert!(peak <= bound, "{peak} bytes held, {bound} allowed");
    match result {
        Ok(gguf) => {
            check_sound(&gguf, bytes.0.len());
            true
        }
        Err(e) => {
            assert!(matches!(e, Error::BadFile { .. }), "{e:?}");
            let e = e.to_string();
            assert!(e.len() < 1000 && !e.contains('\n'), "{e}");
            assert!(e.contains("expected") && e.contains("found"), "{e}");
            false
        }
    }
}

// ------------------------------------------------------------------------------------------ files that lie

const U8: u32 = 0;
const U32: u32 = 4;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// A header, written field by field, each free to lie.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_keys: u64) -> Self {
        Raw(b"GGUF".to_vec()).u32(3).u64(n_tensors).u64(n_keys)
    }

    fn u8(mut self, x: u8) -> Self {
        self.0.push(x);
        self
    }

    fn u32(mut self, x: u32) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn u64(mut self, x: u64) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }

    fn bytes(mut self, x: &[u8]) -> Self {
        self.0.extend(x);
        self
    }

    fn string(self, x: &[u8]) -> Self {
        self.u64(x.len() as u64).bytes(x)
    }

    fn key(self, name: &str, value_type: u32) -> Self {
        self.string(name.as_bytes()).u32(value_type)
    }

    fn tensor(self, name: &str, dims: &[u64], dtype: u32, offset: u64) -> Self {
        let raw = self.string(name.as_bytes()).u32(dims.len() as u32);
        dims.iter()
            .fold(raw, |raw, d| raw.u64(*d))
            .u32(dtype)
            .u64(offset)
    }

    /// Pads the header and adds a data section of `n` bytes.
    fn data(mut self, n: usize) -> Self {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + n, 0);
        self
    }

    fn zeros(mut self, n: usize) -> Self {
        self.0.resize(self.0.len() + n, 0);
        self
    }

    fn open(self) -> Result<Gguf> {
        Gguf::from_bytes(self.0)
    }

    /// Opening fails, in memory bounds, with a message that has every part of `with` in it.
    #[track_caller]
    fn refused(self, with: &[&str]) {
        let shared = Shared(Arc::new(self.0));
        assert!(!open_within_bound(&shared), "expected an error");
        let message = Gguf::from_bytes(shared).unwrap_err().to_string();
        for part in with {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}

const MAX: u64 = u64::MAX;

#[test]
fn counts_that_lie() {
    let tensors = [
        "number of tensors: expected at most",
        "found 1844674407370955",
    ];
    Raw::new(MAX, 0).zeros(1000).refused(&tensors);
    Raw::new(0, MAX)
        .zeros(1000)
        .refused(&["number of metadata keys"]);
    Raw::new(31, 0)
        .zeros(1000)
        .refused(&["at most 30 in", "found 31"]);
    Raw::new(65_537, 0)
        .zeros(4_000_000)
        .refused(&["number of tensors: expected at most 65536, found 65537"]);
    Raw::new(0, 65_537)
        .zeros(4_000_000)
        .refused(&["number of metadata keys: expected at most 65536"]);
    for n in [MAX, MAX / 8 + 1, MAX / 2, 1 << 32, 1 << 61] {
        for element in [0, 4, 7, 8, 9, 12] {
            Raw::new(0, 1)
                .key("a.b", ARRAY)
                .u32(element)
                .u64(n)
                .zeros(1000)
                .refused(&["metadata key `a.b`: count of ", "expected at most", "found"]);
        }
    }
}

#[test]
fn lengths_that_lie() {
    for n in [MAX, MAX - 30, 1 << 63, 1 << 32, 1 << 20] {
        let found = format!("found {n}");
        Raw::new(0, 1)
            .u64(n)
            .zeros(1000)
            .refused(&["metadata key 0: length of the key", &found]);
        Raw::new(0, 1)
            .key("k", STRING)
            .u64(n)
            .zeros(1000)
            .refused(&["metadata key `k`: string", &found]);
        Raw::new(0, 1)
            .key("k", ARRAY)
            .u32(STRING)
            .u64(2)
            .string(b"fine")
            .u64(n)
            .zeros(1000)
            .refused(&["metadata key `k`: element 1: string", &found]);
        Raw::new(1, 0)
            .u64(n)
            .zeros(1000)
            .refused(&["tensor 0: length of the name", &found]);
    }
    Raw::new(0, 1)
        .u64(65_536)
        .zeros(70_000)
        .refused(&["length of the key: expected at most 65535, found 65536"]);
    Raw::new(1, 0)
        .u64(256)
        .zeros(1000)
        .refused(&["tensor 0: length of the name: expected at most 255, found 256"]);
}

#[test]
fn names_that_are_none() {
    let key = |name: &[u8]| Raw::new(0, 1).string(name).u32(U8).u8(0).zeros(10);
    key(b"").refused(&["metadata key 0: expected a name, found an empty one"]);
    key(b"a\xff").refused(&["metadata key 0: expected a name in UTF-8, found `a"]);
    let tensor = |name: &[u8]| Raw::new(1, 0).string(name).u32(1).zeros(100);
    tensor(b"").refused(&["tensor 0: expected a name, found an empty one"]);
    tensor(b"a\xff").refused(&["tensor 0: expected a name in UTF-8, found `a"]);
    Raw::new(0, 2)
        .key("twice", U8)
        .u8(1)
        .key("twice", U8)
        .u8(1)
        .refused(&["metadata key `twice`: expected once, found twice"]);
    Raw::new(2, 0)
        .tensor("twice", &[1], 0, 0)
        .tensor("twice", &[1], 0, 32)
        .data(64)
        .refused(&["tensor `twice`: expected once, found twice"]);
    // A name cannot reach the terminal as it is, nor fill it.
    Raw::new(0, 1)
        .key("\x1b[2J\n", 99)
        .zeros(20)
        .refused(&["metadata key `\\u{1b}[2J\\n`"]);
    Raw::new(0, 1)
        .key(&"x".repeat(60_000), 99)
        .zeros(20)
        .refused(&["xxx…`: value type: expected 0 to 12, found 99"]);
}

#[test]
fn values_that_are_none() {
    let value = |t: u32| Raw::new(0, 1).key("k", t);
    value(13)
        .zeros(20)
        .refused(&["metadata key `k`: value type: expected 0 to 12, found 13"]);
    value(BOOL)
        .u8(2)
        .refused(&["metadata key `k`: bool: expected 0 or 1, found 2"]);
    value(ARRAY)
        .u32(BOOL)
        .u64(2)
        .u8(1)
        .u8(255)
        .refused(&["metadata key `k`: bool: expected 0 or 1, found 255"]);
    value(ARRAY)
        .u32(77)
        .u64(0)
        .refused(&["metadata key `k`: array element type", "found 77"]);
    Raw::new(0, 2)
        .key("a", U8)
        .u8(0)
        .key("b", U32)
        .u8(0)
        .refused(&["metadata key `b`: u32: expected 4 more bytes", "after 1"]);
    // Arrays of arrays of arrays …
    let deep = |levels: usize| {
        (1..levels)
            .fold(value(ARRAY), |raw, _| raw.u32(ARRAY).u64(1))
            .u32(U8)
            .u64(0)
    };
    assert!(deep(4).open().is_ok());
    deep(5).refused(&["metadata key `k`: array: expected at most 4 levels"]);
    deep(100_000).refused(&["expected at most 4 levels"]);
    let wide = |n: usize| {
        let inner = Raw(Vec::new()).u32(U8).u64(0).0.repeat(n);
        value(ARRAY).u32(ARRAY).u64(n as u64).bytes(&inner)
    };
    assert!(wide(65_536).open().is_ok());
    wide(65_537).refused(&["count of arrays in an array: expected at most 65536"]);
}

#[test]
fn alignments_that_are_none() {
    let with = |x: u32| Raw::new(0, 1).key("general.alignment", U32).u32(x);
    for x in [0, 1, 4, 12, 33, 1 << 21, u32::MAX] {
        with(x).refused(&[
            "metadata key `general.alignment`: expected a power of two from 8 to 1048576",
            &format!("found u32 {x}"),
        ]);
    }
    for x in [8, 64, 1 << 20] {
        assert_eq!(with(x).open().unwrap().alignment(), u64::from(x));
    }
    Raw::new(0, 1)
        .key("general.alignment", STRING)
        .string(b"32")
        .refused(&["found string `32`"]);
}

#[test]
fn shapes_that_are_none() {
    let one = |dims: &[u64], dtype: u32| Raw::new(1, 0).tensor("w", dims, dtype, 0).data(1 << 12);
    assert!(one(&[4, 2, 2, 2], 0).open().is_ok());
    one(&[], 0).refused(&["tensor `w`: expected 1 to 4 dimensions, found 0"]);
    one(&[1; 5], 0).refused(&["tensor `w`: expected 1 to 4 dimensions, found 5"]);
    let many = Raw::new(1, 0).string(b"w").u32(u32::MAX).zeros(1000);
    many.refused(&["expected 1 to 4 dimensions, found 4294967295"]);
    one(&[4, 0], 0).refused(&["tensor `w`: expected dimensions of at least 1, found [4, 0]"]);
    for dims in [
        &[MAX, MAX, MAX, MAX][..],
        &[1 << 32, 1 << 32],
        &[1 << 63, 2],
        &[3, 1 << 62],
        &[1 << 16, 1 << 16, 1 << 16, 1 << 16],
    ] {
        one(dims, 0).refused(&["tensor `w`: expected at most 9223372036854775807 elements"]);
    }
    // As many elements as a number holds, in bytes too many.
    one(&[1 << 61, 2], 0).refused(&["tensor `w`: expected at most 9223372036854775807 bytes"]);
    one(&[48], 2).refused(&["expected a first dimension in blocks of 32 (Q4_0), found 48"]);
    one(&[320, 2], 12).refused(&["blocks of 256 (Q4_K), found 320"]);
    one(&[100], 16).refused(&["blocks of 256 (IQ2_XXS), found 100"]);
}

#[test]
fn places_outside_the_file() {
    let at = |dims: &[u64], offset: u64| Raw::new(1, 0).tensor("w", dims, 0, offset).data(128);
    assert!(at(&[32], 0).open().is_ok());
    assert!(at(&[24], 32).open().is_ok());
    at(&[33], 0).refused(&["tensor `w`: expected 132 bytes at 0", "truncated"]);
    at(&[25], 32).refused(&["tensor `w`: expected 100 bytes at 32", "found a file of"]);
    at(&[1], 128).refused(&["tensor `w`: expected 4 bytes at 128"]);
    at(&[1], MAX - 31).refused(&["tensor `w`: expected 4 bytes at 1844674407370955"]);
    at(&[1 << 60], 32).refused(&["tensor `w`: expected 4611686018427387904 bytes"]);
    at(&[1], 1).refused(&["tensor `w`: expected an offset in multiples of 32, found 1"]);
    at(&[1], MAX).refused(&["tensor `w`: expected an offset in multiples of 32"]);
    // The data section itself begins behind the end of the file.
    let mut raw = at(&[1], 0);
    raw.0.truncate(60);
    raw.refused(&["tensor `w`", "found a file of 60 bytes"]);
}

#[test]
fn places_on_each_other() {
    let two = |a: u64, b: u64| {
        Raw::new(2, 0)
            .tensor("a", &[16], 0, a)
            .tensor("b", &[16], 0, b)
            .data(256)
    };
    assert!(two(0, 64).open().is_ok());
    assert!(two(128, 0).open().is_ok());
    two(0, 0).refused(&["expected 64 bytes at", "they overlap"]);
    two(0, 32).refused(&["tensor `a`", "found tensor `b` at", "they overlap"]);
    two(64, 32).refused(&["tensor `b`", "found tensor `a` at", "they overlap"]);
}

/// A type without a known layout has what lies before the next tensor, and cannot be loaded.
#[test]
fn unknown_types_are_kept_and_not_loaded() {
    let gguf = Raw::new(3, 0)
        .tensor("last", &[7], 4_000_000_000, 128)
        .tensor("first", &[7], 36, 0)
        .tensor("sound", &[8], 0, 96)
        .data(160)
        .open()
        .unwrap();
    let bytes: Vec<_> = gguf.tensors().map(|t: &TensorInfo| t.bytes).collect();
    assert_eq!(bytes, [32, 96, 32]);
    assert_eq!(gguf.raw("first").unwrap().len(), 96);
    let error = gguf.load("last").unwrap_err().to_string();
    assert!(
        error.contains("`unknown (4000000000) (tensor last)`"),
        "{error}"
    );
    assert!(error.contains("supported: F32, F16, Q4_0"), "{error}");
    let problems = gguf.problems().join("\n");
    for dtype in ["unknown (4000000000)", "I2_S"] {
        let line = format!("1 of the tensors have the unsupported type {dtype}");
        assert!(problems.contains(&line), "{problems}");
    }
    Raw::new(2, 0)
        .tensor("a", &[7], 36, 0)
        .tensor("b", &[7], 36, 0)
        .data(64)
        .refused(&["they overlap"]);
}

#[test]
fn oddities_are_listed() {
    let gguf = Raw::new(2, 0)
        .tensor("a", &[1], 0, 32)
        .tensor("b", &[1], 0, 128)
        .data(200)
        .open()
        .unwrap();
    let problems = gguf.problems().join("\n");
    assert!(
        problems.contains("96 unused bytes in 2 places"),
        "{problems}"
    );
    assert!(problems.contains("40 bytes after the last"), "{problems}");
    let short = Raw::new(1, 0).tensor("a", &[1], 0, 0).data(4).open();
    let problems = short.unwrap().problems().join("\n");
    assert!(problems.contains("not padded to 32 bytes"), "{problems}");
}

#[test]
fn a_list_of_oddities_ends() {
    let n = 500;
    let raw = (0..n).fold(Raw::new(n, 0), |raw, i| {
        raw.tensor(&format!("{i}"), &[1], 1000 + i as u32, i * 32)
    });
    let problems = raw.data(n as usize * 32).open().unwrap().problems();
    assert_eq!(problems.len(), 101);
    assert_eq!(problems[100], "and 403 more problems");
}

// ---------------------------------------------------------------------------------------------------- bounds

/// Opens and stays within the bound.
#[track_caller]
fn bounded(what: &str, raw: Raw) {
    let len = raw.0.len();
    let shared = Shared(Arc::new(raw.0));
    let (gguf, peak) = peak_of(|| Gguf::from_bytes(shared.clone()));
    let gguf = gguf.unwrap();
    let bound = (64 << 20) + 4 * gguf.header_bytes();
    eprintln!("{what}: file {len}, peak {peak}, bound {bound}");
    assert!(peak <= bound, "{what}: {peak} bytes held, {bound} allowed");
    check_sound(&gguf, len);
}

#[test]
fn what_takes_more_memory_than_file_is_bounded() {
    let array = |element: u32, n: usize, bytes: usize| {
        Raw::new(0, 1)
            .key("k", ARRAY)
            .u32(element)
            .u64(n as u64)
            .zeros(bytes)
    };
    bounded("empty strings", array(STRING, 4_000_000, 32_000_000));
    bounded("u64s", array(10, 8_000_000, 64_000_000));
    bounded("u8s", array(U8, 64_000_001, 64_000_001));
    bounded("bools", array(BOOL, 40_000_001, 40_000_001));
    bounded("empty arrays", array(ARRAY, 65_536, 65_536 * 12));
    let long = vec![b'x'; 50_000_001];
    bounded("string", Raw::new(0, 1).key("k", STRING).string(&long));
    let text = Raw(Vec::new()).string(b"x").0.repeat(3_000_000);
    let head = Raw::new(0, 1).key("k", ARRAY).u32(STRING).u64(3_000_000);
    bounded("strings of one byte", head.bytes(&text));
    let head = Raw::new(0, 1).key("k", ARRAY).u32(STRING).u64(1);
    bounded("an array of one string", head.string(&long));

    let n = 65_536;
    let mut raw = Raw::new(n, n);
    for i in 0..n {
        // As short as 65,536 different names can be.
        raw = raw.key(&format!("{i:x}"), STRING).u64(0);
    }
    let inner = Raw(Vec::new()).u32(U8).u64(0).0.repeat(n as usize);
    // All limits at once: the last key has all the arrays that a file may have.
    raw.0.truncate(raw.0.len() - 12);
    raw = raw.u32(ARRAY).u32(ARRAY).u64(n).bytes(&inner);
    for i in 0..n {
        raw = raw.tensor(&format!("{i:x}"), &[1], 0, i * 32);
    }
    bounded("keys, tensors, arrays", raw.data(n as usize * 32));
}

/// A file of a terabyte, nearly all of it a hole, that announces an array of all of it.
#[cfg(unix)]
#[test]
fn a_huge_file_does_not_make_a_huge_header() {
    let dir = std::env::temp_dir();
    let path = dir.join(format!("kinglet-huge-{}.gguf", std::process::id()));
    for element in [U8, STRING, ARRAY, 12] {
        let raw = Raw::new(0, 1).key("k", ARRAY).u32(element).u64(1 << 36);
        std::fs::write(&path, &raw.0).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        let (result, peak) = peak_of(|| Gguf::open(&path));
        let error = result.unwrap_err().to_string();
        assert!(error.contains("`k`: count of"), "{error}");
        assert!(error.contains("256 MiB"), "{error}");
        assert!(peak < 1 << 20, "{peak}");
    }
    // A count that the file has room for, of strings of which the first is a lie: nothing is reserved on its word.
    let head = Raw::new(0, 1).key("k", ARRAY).u32(STRING);
    std::fs::write(&path, head.u64(1 << 24).u64(MAX).0).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    let (result, peak) = peak_of(|| Gguf::open(&path));
    let error = result.unwrap_err().to_string();
    assert!(error.contains("`k`: element 0: string"), "{error}");
    assert!(peak < 1 << 20, "{peak}");
    std::fs::remove_file(&path).unwrap();
}

// ------------------------------------------------------------------------- truncations, flips and mutations

static GOLDEN: &[u8] = include_bytes!("data/lfm2-tiny-random.gguf");

fn golden() -> Gguf {
    Gguf::from_bytes(GOLDEN).unwrap()
}

#[test]
fn version_2_is_read() {
    let mut file = GOLDEN.to_vec();
    file[4] = 2;
    let gguf = Gguf::from_bytes(file).unwrap();
    assert_eq!((gguf.version(), golden().version()), (2, 3));
    assert!(gguf.tensors().eq(golden().tensors()));
    assert_eq!(gguf.metadata(), golden().metadata());
}

#[test]
fn truncated_at_every_byte() {
    let gguf = golden();
    let start = gguf.parts()[0].data_start() as usize;
    let last = gguf.tensors().map(|t| t.offset as usize + t.bytes).max();
    let last = last.unwrap();
    // The data section at its ends byte by byte, and here and there between.
    let ends = (0..start + 2000)
        .chain((start..last).step_by(997))
        .chain(last - 2000..last);
    for n in ends {
        let (result, peak) = peak_of(|| Gguf::from_bytes(&GOLDEN[..n]));
        let e = result.expect_err("a truncated file opened").to_string();
        assert!(e.contains("expected") && e.contains("found"), "{n}: {e}");
        assert!(peak <= (64 << 20) + n as u64 + 16, "{n}: {peak}");
    }
    assert!(Gguf::from_bytes(&GOLDEN[..last]).is_ok());

    // The same through a real file: the map and the file agree.
    let path = std::env::temp_dir().join(format!("kinglet-cut-{}.gguf", std::process::id()));
    for n in (1..start).step_by(1009).chain([start, start + 1, last - 1]) {
        std::fs::write(&path, &GOLDEN[..n]).unwrap();
        let in_file = Gguf::open(&path).unwrap_err().to_string();
        let in_memory = Gguf::from_bytes(&GOLDEN[..n]).unwrap_err().to_string();
        let tail = |e: &str| e.split_once(": ").unwrap().1.to_string();
        assert_eq!(tail(&in_file), tail(&in_memory));
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn every_bit_of_the_first_4_kib_flipped() {
    let mut file = Shared(Arc::new(GOLDEN.to_vec()));
    let mut opened = 0;
    for bit in 0..4096 * 8 {
        Arc::get_mut(&mut file.0).unwrap()[bit / 8] ^= 1 << (bit % 8);
        opened += usize::from(open_within_bound(&file));
        Arc::get_mut(&mut file.0).unwrap()[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(*file.0 == GOLDEN);
    eprintln!("{opened} of 32768 opened");
    assert!((1000..32_000).contains(&opened), "{opened} opened");
}

/// Random numbers (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Where the fields of a sound header lie: counts, lengths, types, dimensions, offsets, values; position and bytes.
struct Fields<'a> {
    file: &'a [u8],
    at: usize,
    fields: Vec<(usize, usize)>,
}

impl<'a> Fields<'a> {
    fn of(file: &'a [u8]) -> Vec<(usize, usize)> {
        let mut f = Fields {
            file,
            at: 0,
            fields: Vec::new(),
        };
        f.number(4);
        f.number(4);
        let (n_tensors, n_keys) = (f.number(8), f.number(8));
        for _ in 0..n_keys {
            f.string();
            let value_type = f.number(4);
            f.value(value_type);
        }
        for _ in 0..n_tensors {
            f.string();
            for _ in 0..f.number(4) {
                f.number(8);
            }
            f.number(4);
            f.number(8);
        }
        f.fields
    }

    fn number(&mut self, bytes: usize) -> u64 {
        let mut x = [0; 8];
        x[..bytes].copy_from_slice(&self.file[self.at..][..bytes]);
        self.fields.push((self.at, bytes));
        self.at += bytes;
        u64::from_le_bytes(x)
    }

    fn string(&mut self) {
        let n = self.number(8) as usize;
        if n > 0 {
            self.fields.push((self.at, 1.min(n)));
        }
        self.at += n;
    }

    fn value(&mut self, value_type: u64) {
        match value_type {
            0 | 1 | 7 => drop(self.number(1)),
            2 | 3 => drop(self.number(2)),
            4..=6 => drop(self.number(4)),
            8 => self.string(),
            9 => {
                let element = self.number(4);
                for _ in 0..self.number(8) {
                    self.value(element);
                }
            }
            10..=12 => drop(self.number(8)),
            _ => unreachable!("the file is sound"),
        }
    }
}

/// Changes one thing in `file`, whose fields were at `fields` before anything was changed.
fn mutate(file: &mut Vec<u8>, fields: &[(usize, usize)], rng: &mut Rng) {
    const EXTREMES: [u64; 24] = [
        0,
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
        12,
        13,
        16,
        32,
        36,
        255,
        256,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 32,
        1 << 63,
        MAX / 2,
        MAX,
    ];
    // The tables first of all: half of the time among the few fields that are no element of a large array.
    let (at, n) = match rng.below(2) {
        0 => rng.pick(fields),
        _ => rng.pick(&fields[fields.len().saturating_sub(600)..]),
    };
    if at + n > file.len() {
        return; // cut off by an earlier change
    }
    let mut old = [0; 8];
    old[..n].copy_from_slice(&file[at..at + n]);
    let old = u64::from_le_bytes(old);
    let new = match rng.below(12) {
        0..=3 => rng.pick(&EXTREMES),
        4 => old.wrapping_add(1),
        5 => old.wrapping_sub(1),
        6 => old.wrapping_mul(rng.pick(&[2, 3, 256, 1 << 32])),
        7 => old ^ 1 << rng.below(64),
        8 => (file.len() - at) as u64 / rng.pick(&[1, 2, 4, 8, 12, 13, 33]),
        9 => rng.next() >> rng.below(64),
        10 => {
            // The value of another field.
            let (other, m) = rng.pick(fields);
            let mut x = [0; 8];
            if other + m <= file.len() {
                x[..m].copy_from_slice(&file[other..other + m]);
            }
            u64::from_le_bytes(x)
        }
        _ => {
            // Bytes disappear or appear: everything behind is read as something else.
            let amount = 1 + rng.below(40);
            if rng.below(2) == 0 {
                file.drain(at..(at + amount).min(file.len()));
            } else {
                let fill = rng.pick(&[0u8, 1, 8, 9, 0xff]);
                file.splice(at..at, std::iter::repeat_n(fill, amount));
            }
            return;
        }
    };
    file[at..at + n].copy_from_slice(&new.to_le_bytes()[..n]);
}

#[test]
fn ten_thousand_mutations() {
    // A small file with every kind of value, and a real one.
    let small = Raw::new(4, 8)
        .key("general.alignment", U32)
        .u32(32)
        .key("general.architecture", STRING)
        .string(b"lfm2")
        .key("flag", BOOL)
        .u8(1)
        .key("tokens", ARRAY)
        .u32(STRING)
        .u64(3)
        .string(b"")
        .string(b"ab")
        .string(b"c")
        .key("layers", ARRAY)
        .u32(U32)
        .u64(6)
        .zeros(24)
        .key("nested", ARRAY)
        .u32(ARRAY)
        .u64(2)
        .u32(BOOL)
        .u64(2)
        .zeros(2)
        .u32(12)
        .u64(1)
        .u64(7)
        .key("u64", 10)
        .u64(1)
        .key("split.count", U32)
        .u32(1)
        .tensor("a", &[32, 3], 2, 0)
        .tensor("b", &[4], 0, 64)
        .tensor("c", &[256, 2], 12, 96)
        .tensor("d", &[2, 2, 2, 2], 1, 384)
        .data(416)
        .0;
    assert!(open_within_bound(&Shared(Arc::new(small.clone()))));
    let mut rng = Rng(20_261_123);
    let mut opened = 0;
    for (file, n) in [(&small[..], 8_000), (GOLDEN, 4_000)] {
        let fields = Fields::of(file);
        for _ in 0..n {
            let mut mutant = file.to_vec();
            for _ in 0..1 + rng.below(3) {
                mutate(&mut mutant, &fields, &mut rng);
            }
            if rng.below(8) == 0 {
                mutant.truncate(rng.below(mutant.len() + 1));
            }
            opened += usize::from(open_within_bound(&Shared(Arc::new(mutant))));
        }
    }
    eprintln!("{opened} of 12000 opened");
    assert!((500..11_000).contains(&opened), "{opened} opened");
}
