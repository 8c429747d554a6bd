//! How many experts may be in memory, and what happens when that changes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kinglet::Error;
use kinglet::experts::disk::FakeDisk;
use kinglet::experts::{Budget, Class, ExpertStore, Mode, Options, PolicyKind};

use crate::common::{Random, Shape, ones, pace, slots};

fn shape() -> Shape {
    Shape {
        n_layers: 6,
        n_experts: 16,
        n_used: 2,
        parts: vec![40_000, 40_000, 50_000],
        residue: 32,
        step: 0,
    }
}

#[test]
fn too_little_is_refused_with_the_least_that_works() {
    let layout = shape().layout();
    let least = 6 * layout.slot_bytes() as u64;
    for (budget, works) in [
        (Budget::Slots(5), false),
        (Budget::Slots(6), true),
        (Budget::Bytes(0), false),
        (Budget::Bytes(least - 1), false),
        (Budget::Bytes(least), true),
        (Budget::Bytes(u64::MAX), true),
    ] {
        let options = Options {
            budget,
            ..Options::default()
        };
        let disk = FakeDisk::new(vec![shape().image()], Some(pace(1, 1 << 20)));
        match ExpertStore::with_disk(Box::new(disk), layout.clone(), &options) {
            Ok(store) => {
                assert!(works);
                assert!(matches!(
                    store.set_budget(Budget::Slots(5)),
                    Err(Error::OverBudget { needed, .. }) if needed == least
                ));
            }
            Err(Error::OverBudget { needed, .. }) => assert!(!works && needed == least),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn the_mode_follows_from_the_slots() {
    for (n_slots, mode, adaptive, decayed) in [
        (6, Mode::Admission, "adaptive: admission", "admission"),
        (15, Mode::Admission, "adaptive: admission", "admission"),
        (16, Mode::Cached, "adaptive: lru", "decayed"),
        (95, Mode::Cached, "adaptive: lru", "decayed"),
        (96, Mode::Resident, "decayed", "decayed"),
        (1000, Mode::Resident, "decayed", "decayed"),
    ] {
        for (kind, name) in [
            (PolicyKind::Adaptive, adaptive),
            (PolicyKind::Decayed, decayed),
        ] {
            let options = Options {
                policy: kind,
                ..slots(n_slots)
            };
            let store = shape().fake(pace(1, 1 << 20), &options);
            let stats = store.stats();
            assert_eq!((stats.mode, stats.policy), (mode, name), "{n_slots} slots");
            assert_eq!(stats.n_slots, n_slots.min(96));
        }
    }
}

#[test]
fn with_room_for_all_everything_is_read_once() {
    let shape = shape();
    let store = shape.fake(pace(2, 1 << 20), &Options::default());
    store.settle();
    let stats = store.stats();
    assert_eq!(stats.n_held, 96);
    let warm = stats.total.bytes[Class::Warmup as usize];
    assert_eq!(warm, stats.total.all_bytes());
    let image = shape.image();
    for layer in 0..6 {
        let ids: Vec<u32> = (0..16).collect();
        let request = store
            .begin(layer, &ids, &ones(&ids), Class::Exact)
            .expect("room");
        assert!((0..16).all(|j| request.is_hit(j)));
        shape.check(&image, &request);
    }
    let total = store.stats().total;
    assert_eq!(
        (total.all_bytes(), total.evictions, total.waits),
        (warm, 0, 0)
    );
}

#[test]
fn the_budget_changes_while_experts_are_in_use() {
    let shape = shape();
    let image = shape.image();
    let store = shape.fake(pace(2, 1 << 20), &slots(60));
    let mut random = Random(5);
    let mut token = |store: &ExpertStore| {
        for layer in 0..6 {
            let ids = random.choose(2, 16, 2.0);
            let request = store
                .begin(layer, &ids, &ones(&ids), Class::Exact)
                .expect("room");
            shape.check(&image, &request);
        }
        store.next_token();
    };
    (0..100).for_each(|_| token(&store));
    let full = store.stats();
    assert_eq!(full.n_held, 60);
    // Two are held: they go when they are let go of.
    let held = store
        .begin(0, &[3, 9], &[1.0; 2], Class::Exact)
        .expect("room");
    assert_eq!(store.set_budget(Budget::Slots(6)).expect("enough"), 6);
    assert_eq!(store.stats().n_held, 6);
    shape.check(&image, &held);
    let slot = store.layout().slot_bytes() as u64;
    assert_eq!(store.trim(slot), 0, "six is the least");
    drop(held);
    (0..20).for_each(|_| token(&store));
    assert_eq!(store.stats().n_held, 6);
    assert_eq!(store.stats().mode, Mode::Admission);
    // And back: what was used most is read again.
    assert_eq!(store.set_budget(Budget::Slots(40)).expect("enough"), 40);
    store.settle();
    assert_eq!(store.stats().n_held, 40);
    assert_eq!(store.trim(3 * slot - 1), 3 * slot);
    assert_eq!(store.stats().n_held, 37);
    (0..20).for_each(|_| token(&store));
    store.check();
}

#[test]
fn trimming_takes_no_200_ms_while_a_token_runs() {
    let shape = Shape {
        parts: vec![500_000, 500_000],
        ..shape()
    };
    let disk = FakeDisk::new(vec![shape.image()], None);
    let store = ExpertStore::with_disk(Box::new(disk), shape.layout(), &slots(90));
    let store = store.expect("a store");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(1);
            while !stop.load(Ordering::Relaxed) {
                for layer in 0..6 {
                    let ids = random.choose(2, 16, 1.0);
                    let request = store.begin(layer, &ids, &ones(&ids), Class::Exact);
                    let request = request.expect("room");
                    for j in 0..2 {
                        request.wait(j, 1).expect("no fault");
                    }
                }
                store.next_token();
            }
        });
        while store.stats().n_held < 85 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let slot = store.layout().slot_bytes() as u64;
        let began = Instant::now();
        let freed = store.trim(60 * slot);
        let took = began.elapsed();
        while store.stats().n_held > 30 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let all = began.elapsed();
        stop.store(true, Ordering::Relaxed);
        assert!(freed >= 50 * slot, "{} slots", freed / slot);
        assert!(
            took.max(all) < Duration::from_millis(200),
            "{took:?}, {all:?}"
        );
    });
    store.check();
}
