//! Asking for experts takes no memory from the system once the store has run for a while, misses and evictions
//! included. Counted in all threads, which is why this test has a process of its own.

#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout as Block, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kinglet::experts::disk::FakeDisk;
use kinglet::experts::{Budget, Class, ExpertStore, LayerExperts, Layout, Options, Part};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller of this function owes.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, block: Block) {
        // SAFETY: as the caller of this function owes.
        unsafe { System.dealloc(memory, block) }
    }

    unsafe fn realloc(&self, memory: *mut u8, block: Block, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller of this function owes.
        unsafe { System.realloc(memory, block, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// 8 layers of 16 experts of three parts, one after the other.
fn layout() -> (u64, Layout) {
    const BYTES: u64 = 6000;
    let mut offset = 0;
    let mut part = || {
        let part = Part {
            file: 0,
            offset,
            expert_bytes: BYTES,
        };
        offset += 16 * BYTES;
        part
    };
    let layers = (0..8).map(|_| LayerExperts {
        n_experts: 16,
        n_used: 2,
        parts: (0..3).map(|_| part()).collect(),
    });
    let layers = layers.collect();
    (offset, Layout::new(vec![offset], layers).expect("sound"))
}

#[test]
fn steady_requests_allocate_nothing() {
    for n_slots in [6, 12, 40] {
        let (bytes, layout) = layout();
        let disk = FakeDisk::new(vec![vec![1; bytes as usize]], None);
        let options = Options {
            budget: Budget::Slots(n_slots),
            ..Options::default()
        };
        let store = ExpertStore::with_disk(Box::new(disk), layout, &options).expect("a store");
        let run = |tokens: std::ops::Range<u32>| {
            let before = COUNT.load(Ordering::Relaxed);
            for token in tokens {
                for layer in 0..8 {
                    let ids = [token * (layer + 1) % 7, 7 + token % 9];
                    let layer = layer as usize;
                    let request = store.begin(layer, &ids, &[0.6, 0.4], Class::Exact);
                    let request = request.expect("room");
                    for j in 0..2 {
                        for part in 0..3 {
                            assert_eq!(request.wait(j, part).expect("no fault")[0], 1);
                        }
                    }
                }
                store.next_token();
            }
            COUNT.load(Ordering::Relaxed) - before
        };
        run(0..200);
        let misses = store.stats().total.misses();
        assert_eq!(run(200..300), 0, "{n_slots} slots");
        assert!(store.stats().total.misses() > misses + 100);
    }
}
