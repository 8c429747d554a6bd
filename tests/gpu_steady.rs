//! Decoding on the GPU asks the system for no memory on our side: every allocation of the thread that decodes is told by its
//! backtrace to be ours or wgpu's, which makes an encoder, a pass and a command buffer of every submission anew. Needs an
//! adapter, as `gpu.rs`; a process of its own for its allocator.

#![allow(unsafe_code, reason = "an allocator that counts")]

#[path = "common/on_gpu.rs"]
#[expect(dead_code, reason = "shared with the other tests of the GPU")]
mod on_gpu;

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};

use kinglet::backend::select::Chunking;
use kinglet::sparsity::{Heads, Policy, Sparsity};
use kinglet::{BackendKind, KvType, Session};

use self::on_gpu::{adapter, load, prefill, sparse_session};

struct Watching;

thread_local! {
    static IS_WATCHED: Cell<bool> = const { Cell::new(false) };
    static SEEN: RefCell<Vec<Backtrace>> = const { RefCell::new(Vec::new()) };
}

fn seen() {
    // What it takes itself is not looked at.
    if IS_WATCHED.replace(false) {
        SEEN.with_borrow_mut(|seen| seen.push(Backtrace::force_capture()));
        IS_WATCHED.set(true);
    }
}

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        seen();
        // SAFETY: as the caller of this function owes.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller of this function owes.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        seen();
        // SAFETY: as the caller of this function owes.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Where memory was asked for while `run` ran.
fn allocations(run: impl FnOnce()) -> Vec<Backtrace> {
    IS_WATCHED.set(true);
    run();
    IS_WATCHED.set(false);
    SEEN.take()
}

/// The innermost line that is not the standard library's, or of this file, says whose it is.
fn is_ours(trace: &Backtrace) -> bool {
    let trace = trace.to_string();
    let mut places = trace
        .lines()
        .filter_map(|line| line.trim().strip_prefix("at "));
    let first = places.find(|at| !at.starts_with("/rustc/") && !at.contains(file!()));
    first.is_none_or(|at| at.starts_with("./src/"))
}

#[test]
fn steady_decode_allocates_nothing_of_its_own() {
    if !adapter() {
        return;
    }
    let smol = "models/lfm2-smol-Q4_0.gguf";
    let lfm2moe = "tests/data/lfm2moe-tiny-random.gguf";
    let smallthinker = "tests/data/smallthinker-tiny-random.gguf";
    let dense = Sparsity::default();
    let sparse = |policy| Sparsity {
        local: 40,
        ..Sparsity::new(policy, 240)
    };
    let dhsa = Policy::Dhsa {
        chunking: Chunking::Fixed(8),
        heads: Heads::Best,
    };
    for (file, k, sparsity) in [
        (smol, 0, dense),
        (smol, 1, dense),
        (smol, 1, sparse(dhsa)),
        (smallthinker, 1, dense),
        (smol, 0, sparse(dhsa)),
        (lfm2moe, 40, dense),
        (lfm2moe, 40, sparse(Policy::Blocks)),
        (smallthinker, 0, dense),
        (smallthinker, 0, sparse(Policy::Window)),
    ] {
        let model = load(file, BackendKind::Gpu);
        let mut session = sparse_session(&model, KvType::F16, 512, sparsity);
        // Keys of so many are read in parts that are merged.
        let prompt: Vec<u32> = (0..300).map(|i| (i * 37 + 11) % 300).collect();
        let first = allocations(|| prefill(&mut session, &prompt));
        assert!(first.iter().any(is_ours), "they are seen");
        // Of the largest logits alone each next pass begins ahead.
        let decode = |session: &mut Session, n: u32| {
            for token in 0..n {
                let token = session
                    .top()
                    .first()
                    .filter(|_| k == 1)
                    .map_or(token, |t| t.0);
                session.decode_top(token, k).expect("decode");
            }
        };
        decode(&mut session, 6);
        let seen = allocations(|| decode(&mut session, 1));
        let ours: Vec<_> = seen.iter().filter(|trace| is_ours(trace)).collect();
        println!(
            "{file}, {sparsity}, {k} logits: {} of wgpu for a token",
            seen.len()
        );
        assert!(
            ours.is_empty(),
            "{file}, {sparsity}, {k} logits, {}: {}",
            ours.len(),
            ours[0]
        );
    }
}
