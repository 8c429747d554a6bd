//! Decoding token by token asks the system for no memory: what a pass needs is taken from what the one before gave
//! back. Counted in all threads, which is why this test has a process of its own.

#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kinglet::backend::select::Chunking;
use kinglet::sampler::{Sampler, Settings, Source};
use kinglet::session::chunks;
use kinglet::sparsity::{Heads, Policy, Repair, Sparsity};
use kinglet::{KvType, LoadOptions, Model, Session, SessionOptions};

struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller of this function owes.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller of this function owes.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller of this function owes.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `n` tokens, chosen by `sampler`.
fn allocations(session: &mut Session, sampler: &mut Sampler, n: usize) -> usize {
    let before = COUNT.load(Ordering::Relaxed);
    for _ in 0..n {
        let token = sampler.sample(session.logits()).expect("finite logits");
        sampler.accept(token);
        session.decode(token).expect("room for a token");
    }
    COUNT.load(Ordering::Relaxed) - before
}

#[test]
fn steady_decode_allocates_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut settings = Settings::neutral();
    for (name, value) in [
        ("temp", "0.8"),
        ("top-k", "40"),
        ("top-p", "0.9"),
        ("repeat-penalty", "1.1"),
        ("seed", "1"),
    ] {
        settings.set(name, value, Source::Flag).expect("a setting");
    }
    // Past one page of keys, and past several, whose sums are merged.
    let dhsa = Policy::Dhsa {
        chunking: Chunking::Shift(16),
        heads: Heads::Vote,
    };
    let labels = Policy::Dhsa {
        chunking: Chunking::Labels(8),
        heads: Heads::Best,
    };
    let predict = Policy::Dhsa {
        chunking: Chunking::Predict(8),
        heads: Heads::Best,
    };
    for (depth, kv, policy) in [
        (130, KvType::F16, Policy::Dense),
        (1100, KvType::F16, Policy::Dense),
        (600, KvType::F32, Policy::Dense),
        (1100, KvType::F16, Policy::Window),
        (1100, KvType::F16, Policy::Blocks),
        (1100, KvType::Q8_0, dhsa),
        (1100, KvType::F16, labels),
        (1100, KvType::F16, predict),
    ] {
        for threads in [1, 2] {
            let options = LoadOptions {
                threads,
                ..LoadOptions::default()
            };
            let model = Model::load(&root.join("models/lfm2-smol-Q4_0.gguf"), &options);
            let model = model.expect("a model of this repository");
            let predictor = || {
                let tokens: Vec<u32> = (100..400).collect();
                let go = &mut |_, _| ControlFlow::Continue(());
                let trained = chunks::train(&model, &tokens, go).expect("a predictor");
                Arc::new(trained.predictor)
            };
            let options = SessionOptions {
                n_ctx: 2048,
                predictor: (policy == predict).then(predictor),
                kv: kv.into(),
                sparsity: Sparsity {
                    repair: match policy == labels {
                        true => Repair::Delta(24),
                        false => Repair::None,
                    },
                    ..Sparsity::new(policy, 512)
                },
                ..SessionOptions::default()
            };
            let mut session = Session::new(&model, &options).expect("a session");
            let prompt: Vec<u32> = (100..100 + depth).collect();
            let go = &mut |_, _| ControlFlow::Continue(());
            session.prefill(&prompt, go).expect("a prompt that fits");
            let mut sampler = Sampler::new(&settings);
            let first = allocations(&mut session, &mut sampler, 16);
            assert!(first > 0, "allocations are counted");
            // Up to 120 tokens after the prompt: no page of keys begins here, and the list of tokens has room.
            let steady = allocations(&mut session, &mut sampler, 100);
            assert_eq!(
                steady, 0,
                "{depth} tokens before, {threads} threads, {kv:?}, {policy}"
            );
        }
    }
}
