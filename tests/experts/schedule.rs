//! Everything at once, in random order: the state machine under seeds, and under threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kinglet::Error;
use kinglet::experts::disk::{FakeDisk, Fault, FaultRates, Pace};
use kinglet::experts::{Budget, Class, ExpertStore, Options, PolicyKind, Prefetch, Request};

use crate::common::{Random, Shape, ones, slots};

const FAULTS: FaultRates = FaultRates {
    os: 0.02,
    short: 0.02,
    changed: 0.02,
};

fn is_fault(error: &Error) -> bool {
    matches!(error, Error::Io { .. } | Error::BadFile { .. })
}

/// All bytes of a part, compared.
fn check(shape: &Shape, image: &[u8], request: &Request, j: usize, part: usize, found: &[u8]) {
    let expected = shape.expert(image, request.layer(), request.expert(j), part);
    assert!(found == expected, "the bytes of another expert");
}

/// One run of random calls. How many waits failed.
fn run(seed: u64, shape: &Shape, image: &[u8]) -> u64 {
    let mut random = Random(seed);
    let all = shape.n_layers * shape.n_experts;
    let min = 3 * shape.n_used;
    let options = Options {
        policy: PolicyKind::ALL[random.below(4)],
        prefetch: Prefetch::ALL[random.below(3)],
        ..slots(min + random.below(all - min + 2))
    };
    let pace = Pace {
        lanes: 1 + random.below(4),
        latency: Duration::from_micros(random.below(50) as u64),
        bytes_per_second: 1e9,
        jitter: Duration::from_micros(random.below(300) as u64),
        tick: Duration::from_micros(random.below(5) as u64),
        seed,
    };
    let disk = Arc::new(FakeDisk::new(vec![image.to_vec()], Some(pace)));
    let faulty = random.below(2) == 0;
    if faulty {
        disk.set_fault_rates(FAULTS);
    }
    let store = ExpertStore::with_disk(Box::new(disk.clone()), shape.layout(), &options);
    let store = store.expect("a store");
    let mut open: Vec<Request> = Vec::new();
    let mut failed = 0;
    for _ in 0..300 {
        match random.below(14) {
            0..=3 => {
                let layer = random.below(shape.n_layers);
                let n = 1 + random.below(shape.n_used);
                let ids = random.choose(n, shape.n_experts, 2.0);
                let class = [Class::Exact, Class::Demand][random.below(2)];
                match store.begin(layer, &ids, &ones(&ids), class) {
                    Ok(request) => open.push(request),
                    Err(error) => {
                        assert!(matches!(error, Error::Invalid(_)), "{error}");
                        assert!(open.len() > 1, "room for one request at least");
                    }
                }
            }
            4..=6 if !open.is_empty() => {
                let request = &open[random.below(open.len())];
                let (j, part) = (random.below(request.len()), random.below(shape.parts.len()));
                match request.wait(j, part) {
                    Ok(bytes) => check(shape, image, request, j, part, bytes),
                    Err(error) => {
                        assert!(faulty && is_fault(&error), "{error}");
                        assert!(request.ready(j, part), "who waits is not kept waiting");
                        failed += 1;
                    }
                }
            }
            7..=8 if !open.is_empty() => drop(open.swap_remove(random.below(open.len()))),
            9 => {
                let layer = random.below(shape.n_layers);
                store.hint(layer, &random.choose(shape.n_used, shape.n_experts, 1.0));
            }
            10 => store.advance(Duration::from_micros(random.below(2000) as u64)),
            11 if random.below(4) == 0 => store.cancel(),
            12 if random.below(4) == 0 => {
                let slots = Budget::Slots(min + random.below(all));
                let n = store.set_budget(slots).expect("enough");
                assert_eq!(store.stats().n_slots, n);
            }
            13 if random.below(4) == 0 => {
                store.trim(random.below(4 << 20) as u64);
                assert!(store.stats().n_slots >= min);
            }
            _ => drop(store.next_token()),
        }
        store.check();
        // What is held stays what it is, whatever else happens.
        for request in &open {
            let (j, part) = (random.below(request.len()), random.below(shape.parts.len()));
            if let Some(bytes) = request.get(j, part) {
                check(shape, image, request, j, part, bytes);
            }
        }
    }
    // Nothing leaked: when all is let go of, each expert can be had, and every slot.
    open.clear();
    disk.set_fault_rates(FaultRates::default());
    store.settle();
    store.check();
    let stats = store.stats();
    assert!(stats.n_held <= stats.n_slots);
    for layer in 0..shape.n_layers {
        for id in 0..shape.n_experts as u32 {
            let request = store.begin(layer, &[id], &[1.0], Class::Exact);
            shape.check(image, &request.expect("room"));
        }
    }
    store.settle();
    store.check();
    let stats = store.stats();
    assert_eq!(stats.n_held, stats.n_slots.min(all));
    failed
}

#[test]
fn thousands_of_random_orders() {
    let shape = Shape {
        n_layers: 3,
        n_experts: 8,
        n_used: 2,
        parts: vec![5000, 4096, 9000],
        residue: 96,
        step: 32,
    };
    let image = shape.image();
    let failed: u64 = (0..1000).map(|seed| run(seed, &shape, &image)).sum();
    assert!(failed > 500, "{failed} waits met a fault");
}

#[test]
fn random_orders_of_experts_in_several_reads() {
    let shape = Shape {
        n_layers: 2,
        n_experts: 6,
        n_used: 2,
        parts: vec![700_000, 1_100_000],
        residue: 32,
        step: 0,
    };
    let image = shape.image();
    for seed in 0..6 {
        run(seed, &shape, &image);
    }
}

#[test]
fn a_thousand_faults_under_threads() {
    let shape = Shape {
        n_layers: 4,
        n_experts: 8,
        n_used: 2,
        parts: vec![5000, 4096, 9000],
        residue: 64,
        step: 32,
    };
    let image = shape.image();
    let disk = Arc::new(FakeDisk::new(vec![image.clone()], None));
    disk.set_fault_rates(FAULTS);
    let options = Options {
        prefetch: Prefetch::Speculative,
        ..slots(14)
    };
    let store = ExpertStore::with_disk(Box::new(disk.clone()), shape.layout(), &options);
    let store = store.expect("a store");
    let stop = AtomicBool::new(false);
    let (right, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (store, shape, image, disk) = (&store, &shape, &image, &disk);
            let (stop, right, failed) = (&stop, &right, &failed);
            scope.spawn(move || {
                let mut random = Random(seed);
                while disk.n_faults() < 1000 {
                    for layer in 0..shape.n_layers {
                        let ids = random.choose(2, 8, 1.5);
                        store.hint((layer + 1) % 4, &random.choose(2, 8, 1.5));
                        let request = store.begin(layer, &ids, &ones(&ids), Class::Exact);
                        let request = request.expect("two threads hold four slots");
                        for part in 0..3 {
                            for j in 0..2 {
                                match request.wait(j, part) {
                                    Ok(bytes) => {
                                        check(shape, image, &request, j, part, bytes);
                                        right.fetch_add(1, Ordering::Relaxed);
                                    }
                                    Err(error) => {
                                        assert!(is_fault(&error), "{error}");
                                        failed.fetch_add(1, Ordering::Relaxed);
                                    }
                                }
                            }
                        }
                    }
                    store.next_token();
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
        scope.spawn(|| {
            let mut random = Random(99);
            while !stop.load(Ordering::Relaxed) {
                match random.below(4) {
                    0 => store.cancel(),
                    1 => drop(store.trim(40_000)),
                    _ => {
                        let slots = Budget::Slots(12 + random.below(20));
                        store.set_budget(slots).expect("enough");
                    }
                }
                store.check();
                std::thread::sleep(Duration::from_micros(200));
            }
        });
    });
    let (right, failed) = (right.into_inner(), failed.into_inner());
    assert!(disk.n_faults() >= 1000 && failed > 0);
    assert!(right > failed, "{right} right, {failed} failed");
    store.settle();
    assert_eq!(store.stats().total.errors, disk.n_faults());
    disk.set_fault_rates(FaultRates::default());
    for layer in 0..4 {
        for id in 0..8 {
            let request = store.begin(layer, &[id], &[1.0], Class::Exact);
            shape.check(&image, &request.expect("room"));
        }
    }
    store.settle();
    store.check();
    let stats = store.stats();
    assert_eq!(stats.n_held, stats.n_slots);
}

/// Sessions whose experts are together far more than there are slots, which also come and go: each gets its turn.
#[test]
fn many_share_the_fewest_slots() {
    let shape = Shape {
        n_layers: 3,
        n_experts: 16,
        n_used: 3,
        parts: vec![5000, 4096, 9000],
        residue: 64,
        step: 32,
    };
    let image = shape.image();
    let disk = FakeDisk::new(vec![image.clone()], None);
    let store = ExpertStore::with_disk(Box::new(disk), shape.layout(), &slots(9));
    let store = store.expect("a store");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..6)
            .map(|seed| {
                let (store, shape, image) = (&store, &shape, &image);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..100 {
                        let layer = random.below(shape.n_layers);
                        if random.below(3) > 0 {
                            let ids = random.choose(3, 16, 1.0);
                            let request =
                                store.begin_in_turn(layer, &ids, &ones(&ids), Class::Exact);
                            shape.check(image, &request.expect("its turn comes"));
                            continue;
                        }
                        // A prompt, which takes two groups where there is room for them.
                        let mut ids = random.choose(12, 16, 1.0);
                        let waves = store.waves(layer, &ids, &ones(&ids)).expect("experts");
                        let mut seen = Vec::new();
                        for wave in waves {
                            let wave = wave.expect("its turn comes");
                            shape.check(image, &wave);
                            seen.extend((0..wave.len()).map(|j| wave.expert(j)));
                        }
                        ids.sort_unstable();
                        seen.sort_unstable();
                        assert_eq!(seen, ids);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let mut random = Random(99);
            while !stop.load(Ordering::Relaxed) {
                let slots = Budget::Slots(9 + random.below(40));
                store.set_budget(slots).expect("enough");
                store.trim(u64::MAX);
                store.check();
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let ended: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, Ordering::Relaxed);
        for worker in ended {
            worker.expect("every check holds");
        }
    });
    store.settle();
    store.check();
    // More than there are slots are never had, and nobody waits for that.
    store.trim(u64::MAX);
    let ids: Vec<u32> = (0..10).collect();
    let request = store.begin_in_turn(0, &ids, &ones(&ids), Class::Exact);
    assert!(matches!(request, Err(Error::Invalid(_))));
}

#[test]
fn an_error_names_the_file_and_the_next_request_tries_again() {
    let shape = Shape {
        n_layers: 1,
        n_experts: 8,
        n_used: 2,
        parts: vec![5000; 3],
        residue: 0,
        step: 0,
    };
    let image = shape.image();
    let options = Options {
        io_threads: 1, // so that the first part is the one that fails
        ..slots(6)
    };
    for (fault, expected) in [
        (Fault::Os(std::io::ErrorKind::Other, Some(5)), "os error 5"),
        (
            Fault::Short(777),
            "fake-0: truncated while in use: an expert was expected, the file ends at byte 777",
        ),
        (Fault::Changed, "fake-0: written to while in use"),
    ] {
        let disk = Arc::new(FakeDisk::new(vec![image.clone()], None));
        let store = ExpertStore::with_disk(Box::new(disk.clone()), shape.layout(), &options);
        let store = store.expect("a store");
        disk.fail_next(fault);
        let request = store.begin(0, &[1], &[1.0], Class::Exact).expect("room");
        let error = request.wait(0, 2).map(<[u8]>::len);
        let error = error.expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
        // Who comes later reads it anew; who has failed stays failed.
        let again = store.begin(0, &[1], &[1.0], Class::Exact).expect("room");
        assert!(!again.is_hit(0));
        shape.check(&image, &again);
        assert!((0..3).all(|part| request.wait(0, part).is_err()));
        assert_eq!(store.stats().n_held, 2);
        drop(request);
        assert_eq!(store.stats().n_held, 1);
        store.check();
    }
}

#[test]
fn a_store_that_is_closed_tells_those_who_wait() {
    let shape = Shape {
        n_layers: 1,
        n_experts: 8,
        n_used: 2,
        parts: vec![5000; 3],
        residue: 0,
        step: 0,
    };
    let options = Options {
        prefetch: Prefetch::Off,
        ..slots(6)
    };
    let disk = FakeDisk::new(vec![shape.image()], None);
    let store = ExpertStore::with_disk(Box::new(disk), shape.layout(), &options);
    let store = store.expect("a store");
    let there = store.begin(0, &[1], &[1.0], Class::Demand).expect("room");
    shape.check(&shape.image(), &there);
    let request = store.begin(0, &[2], &[1.0], Class::Exact).expect("room");
    drop(store);
    assert!(matches!(request.wait(0, 0), Err(Error::Cancelled)));
    shape.check(&shape.image(), &there); // what is held stays
}
