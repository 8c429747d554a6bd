//! Imagined time: what overlaps, what overtakes, what is given up; all figures by hand. A part takes one millisecond.

use std::sync::Arc;
use std::time::Duration;

use kinglet::experts::disk::{FakeDisk, Pace};
use kinglet::experts::{Class, Counters, ExpertStore, Options, Prefetch};

use crate::common::{Random, Shape, ones, pace, slots};

const PART: usize = 256 << 10;

fn ms(n: f64) -> Duration {
    Duration::from_secs_f64(n / 1e3)
}

fn shape(n_layers: usize) -> Shape {
    Shape {
        n_layers,
        n_experts: 16,
        n_used: 2,
        parts: vec![PART; 3],
        residue: 0,
        step: 0,
    }
}

fn lent(shape: &Shape, pace: Pace, options: &Options) -> (Arc<FakeDisk>, ExpertStore) {
    let disk = Arc::new(FakeDisk::new(vec![shape.image()], Some(pace)));
    let _ = disk.take_log();
    let store = ExpertStore::with_disk(Box::new(disk.clone()), shape.layout(), options);
    (disk, store.expect("a store"))
}

/// Which expert each read of the log was for, and which part: reads of whole parts.
fn reads(shape: &Shape, log: &[(usize, u64, usize)]) -> Vec<(usize, u32, usize)> {
    let layout = shape.layout();
    let of = |at: u64| {
        for (layer, experts) in layout.layers().iter().enumerate() {
            for (part, place) in experts.parts.iter().enumerate() {
                let end = place.offset + place.expert_bytes * experts.n_experts as u64;
                if (place.offset..end).contains(&at) {
                    return (layer, ((at - place.offset) / PART as u64) as u32, part);
                }
            }
        }
        panic!("a read outside of all experts");
    };
    log.iter().map(|(_, at, _)| of(*at)).collect()
}

/// A layer with two misses: attention, then the experts in order, each waited for whole. What was added.
fn layer(store: &ExpertStore, attention: f64, expert: f64, ids: &[u32]) -> Counters {
    store.next_token();
    let request = store.begin(0, ids, &ones(ids), Class::Exact).expect("room");
    store.advance(ms(attention));
    for j in 0..ids.len() {
        for part in 0..3 {
            request.wait(j, part).expect("no fault");
        }
        store.advance(ms(expert));
    }
    drop(request);
    store.next_token()
}

fn near(a: Duration, b: f64) {
    let a = a.as_secs_f64() * 1e3;
    assert!((a - b).abs() < 1e-3, "expected {b} ms, found {a} ms");
}

#[test]
fn a_window_that_suffices_hides_all() {
    let store = shape(1).fake(pace(1, PART), &slots(6));
    let layer = layer(&store, 10.0, 1.0, &[0, 1]);
    near(layer.reading, 6.0);
    near(layer.waited, 0.0);
    assert_eq!(layer.hidden(), Some(1.0));
    near(store.now().expect("imagined"), 12.0); // computing alone
}

#[test]
fn a_window_that_does_not_hides_as_much_as_it_can() {
    // Parts land at 1, 2, …, 6 ms. The first expert is whole at 3 ms, one after attention ended; computing it takes
    // until 4, the second is whole at 6.
    let store = shape(1).fake(pace(1, PART), &slots(6));
    let layer = layer(&store, 2.0, 1.0, &[0, 1]);
    near(layer.reading, 6.0);
    near(layer.waited, 1.0 + 2.0);
    assert!((layer.hidden().expect("reads") - 0.5).abs() < 1e-6);
    near(store.now().expect("imagined"), 7.0);
}

#[test]
fn on_demand_hides_only_what_the_experts_themselves_take() {
    // Reads begin at 2 ms: the first expert is whole at 5, computed until 6, the second whole at 8.
    let options = Options {
        prefetch: Prefetch::Off,
        ..slots(6)
    };
    let store = shape(1).fake(pace(1, PART), &options);
    let layer = layer(&store, 2.0, 1.0, &[0, 1]);
    near(layer.reading, 6.0);
    near(layer.waited, 3.0 + 2.0);
    assert!((layer.hidden().expect("reads") - 1.0 / 6.0).abs() < 1e-6);
    near(store.now().expect("imagined"), 9.0);
}

#[test]
fn parts_are_used_as_they_land() {
    // Gate after 1 ms, up after 2, down after 3; each used for 1 ms: nothing but the first part is waited for.
    let store = shape(1).fake(pace(1, PART), &slots(6));
    store.next_token();
    let request = store.begin(0, &[3], &[1.0], Class::Exact).expect("room");
    assert!(!request.ready(0, 0));
    for part in 0..3 {
        request.wait(0, part).expect("no fault");
        assert!(request.ready(0, part) && (part == 2 || !request.ready(0, part + 1)));
        store.advance(ms(1.0));
    }
    near(store.next_token().waited, 1.0);
    near(store.now().expect("imagined"), 4.0);
}

#[test]
fn the_wall_takes_no_longer_than_reading_or_computing() {
    // All misses: 48 tokens of 8 layers through 6 slots. Each layer takes what is longer, its reads or its attention,
    // and then its last expert.
    for (attention, io) in [(8.0, 6.0), (6.0, 6.0), (3.0, 6.0)] {
        let store = shape(8).fake(pace(2, PART), &slots(6));
        let mut random = Random(7);
        for _ in 0..48 {
            for layer in 0..8 {
                let ids = random.choose(2, 16, 1.0);
                let request = store.begin(layer, &ids, &ones(&ids), Class::Exact);
                let request = request.expect("room");
                store.advance(ms(attention));
                for part in 0..6 {
                    request.wait(part / 3, part % 3).expect("no fault");
                }
            }
        }
        let wall = store.now().expect("imagined");
        let most = 48.0 * 8.0 * f64::max(attention, io);
        assert!(wall <= ms(most + 0.01), "{wall:?} for {most} ms");
        let total = store.stats().total;
        assert!(total.reading <= wall && total.misses() > 700);
    }
}

#[test]
fn latencies_overlap_on_lanes() {
    // One millisecond until the first byte. Alone, each of six parts takes 2 ms; with two lanes the pipe is never
    // empty after the first.
    for (lanes, end) in [(1, 12.0), (2, 7.0), (4, 7.0)] {
        let pace = Pace {
            latency: ms(1.0),
            ..pace(lanes, PART)
        };
        let store = shape(1).fake(pace, &slots(6));
        let request = store.begin(0, &[0, 1], &[1.0; 2], Class::Demand);
        let request = request.expect("room");
        request.wait(1, 2).expect("no fault");
        request.wait(0, 2).expect("no fault");
        near(store.now().expect("imagined"), end);
    }
}

#[test]
fn one_who_waits_overtakes_what_is_only_known_or_guessed() {
    let shape = shape(2);
    let options = Options {
        prefetch: Prefetch::Speculative,
        ..slots(16)
    };
    let (disk, store) = lent(&shape, pace(1, PART), &options);
    store.hint(1, &[8, 9]);
    store.advance(ms(0.5)); // the first guess is half read
    let exact = store
        .begin(0, &[1, 2], &[1.0; 2], Class::Exact)
        .expect("room");
    store.advance(ms(1.0));
    let demand = store.begin(0, &[5], &[1.0], Class::Demand).expect("room");
    demand.wait(0, 2).expect("no fault");
    // At most the read that was under way came before it: it asked at 1.5, and its three parts took 3.
    near(store.now().expect("imagined"), 5.0);
    // Of what is known, the one that is waited for goes first.
    exact.wait(1, 1).expect("no fault");
    near(store.now().expect("imagined"), 8.0);
    store.settle();
    let order = reads(&shape, &disk.take_log());
    let expected = [
        (1, 8, 0),
        (0, 1, 0),
        (0, 5, 0),
        (0, 5, 1),
        (0, 5, 2),
        (0, 1, 1), // begun when the one before ended
        (0, 2, 0),
        (0, 2, 1),
        (0, 2, 2),
        (0, 1, 2),
        (1, 8, 1),
        (1, 8, 2),
        (1, 9, 0),
        (1, 9, 1),
        (1, 9, 2),
    ];
    assert_eq!(order, expected);
}

#[test]
fn guesses_come_true_or_are_given_up() {
    let shape = shape(2);
    let options = Options {
        prefetch: Prefetch::Speculative,
        ..slots(16)
    };
    let (disk, store) = lent(&shape, pace(1, PART), &options);
    store.hint(1, &[8, 9]);
    store.advance(ms(1.5)); // expert 8: gate there, up half read; expert 9 not begun
    // The router says 8 and 3: 8 is joined, 9 is never read.
    let request = store
        .begin(1, &[8, 3], &[1.0; 2], Class::Exact)
        .expect("room");
    assert!(request.is_hit(0) && !request.is_hit(1));
    request.wait(0, 2).expect("no fault");
    request.wait(1, 2).expect("no fault");
    drop(request);
    store.settle();
    let total = store.stats().total;
    let kinds = (
        total.guesses,
        total.guesses_used,
        total.guesses_wasted,
        total.late,
    );
    assert_eq!(kinds, (1, 1, 0, 1));
    assert_eq!(total.reads, 6);
    let _ = disk.take_log();

    // A guess of which a part is under way: that part ends, the others are never read, and its slot is free.
    let held = store.stats().n_held;
    store.hint(1, &[10]);
    store.advance(ms(0.5));
    let request = store.begin(1, &[3], &[1.0], Class::Exact).expect("room");
    store.settle();
    assert_eq!(reads(&shape, &disk.take_log()), [(1, 10, 0)]);
    assert_eq!(store.stats().n_held, held);
    assert_eq!(store.stats().total.guesses_wasted, 1);
    drop(request);

    // What is stopped is not read on either.
    store.hint(0, &[1, 2]);
    store.advance(ms(0.5));
    store.cancel();
    store.settle();
    assert_eq!(reads(&shape, &disk.take_log()), [(0, 1, 0)]);
    store.check();
    assert_eq!(store.stats().n_held, held);
}

#[test]
fn guesses_never_hold_more_slots_than_they_may() {
    let shape = shape(2);
    let options = Options {
        prefetch: Prefetch::Speculative,
        guesses: Some(2),
        ..slots(8)
    };
    let store = shape.fake(pace(1, PART), &options);
    let ids: Vec<u32> = (0..4).collect();
    for pair in ids.chunks(2) {
        for layer in 0..2 {
            let request = store.begin(layer, pair, &ones(pair), Class::Exact);
            shape.check(&shape.image(), &request.expect("room"));
        }
    }
    for first in [4, 8, 12] {
        store.hint(1, &[first, first + 1, first + 2]);
        store.settle();
    }
    // Two of the eight went to guesses, and then guesses replaced guesses.
    let request = store.begin(0, &[0, 1, 2, 3], &[1.0; 4], Class::Exact);
    let hits = |request: &kinglet::experts::Request| (0..4).filter(|j| request.is_hit(*j)).count();
    let first = hits(&request.expect("room"));
    let request = store.begin(1, &[0, 1, 2, 3], &[1.0; 4], Class::Exact);
    let second = hits(&request.expect("room"));
    assert!(first + second >= 6, "{first} and {second} of 4 left");
}

#[test]
fn a_request_joins_a_load_that_is_under_way() {
    let shape = shape(1);
    let (disk, store) = lent(&shape, pace(1, PART), &slots(6));
    let image = shape.image();
    let first = store
        .begin(0, &[4, 5], &[1.0; 2], Class::Exact)
        .expect("room");
    store.advance(ms(0.5));
    let second = store
        .begin(0, &[5, 4], &[1.0; 2], Class::Demand)
        .expect("room");
    shape.check(&image, &second);
    drop(first);
    shape.check(&image, &second);
    assert_eq!(disk.take_log().len(), 6);
    assert_eq!(store.stats().total.late, 2);
}

#[test]
fn too_many_open_requests_are_an_error_and_not_a_wait_without_end() {
    let shape = shape(1);
    let store = shape.fake(pace(1, PART), &slots(6));
    let open: Vec<_> = (0..3)
        .map(|i| {
            let ids = [2 * i, 2 * i + 1];
            store.begin(0, &ids, &[1.0; 2], Class::Exact).expect("room")
        })
        .collect();
    let error = store.begin(0, &[0, 10], &[1.0; 2], Class::Exact).err();
    let error = error.expect("six slots are held").to_string();
    assert!(error.contains("6 slots"), "{error}");
    drop(open);
    store.settle();
    store.check();
    let request = store.begin(0, &[0, 10], &[1.0; 2], Class::Exact);
    shape.check(&shape.image(), &request.expect("room"));
}

#[test]
fn waves_take_what_is_there_first_and_read_ahead() {
    let shape = shape(1);
    let image = shape.image();
    let store = shape.fake(pace(1, PART), &slots(6));
    for ids in [[1, 7], [12, 13]] {
        let request = store.begin(0, &ids, &[1.0; 2], Class::Exact);
        shape.check(&image, &request.expect("room"));
    }
    let ids: Vec<u32> = (0..16).collect();
    let start = store.now().expect("imagined");
    store.next_token();
    let mut seen = Vec::new();
    let mut hits = 0;
    for wave in store.waves(0, &ids, &[0.0; 16]).expect("sound") {
        let wave = wave.expect("room");
        assert!(wave.len() <= 2);
        shape.check(&image, &wave);
        store.advance(ms(6.0)); // as long as the next takes to read
        for j in 0..wave.len() {
            seen.push(wave.expert(j));
            hits += usize::from(wave.is_hit(j));
        }
    }
    assert_eq!(hits, 4);
    assert_eq!(seen[..4], [1, 7, 12, 13]);
    seen.sort();
    assert_eq!(seen, ids);
    // Two waves of hits and six of misses, all read while another was computed.
    near(store.now().expect("imagined") - start, 8.0 * 6.0);
    near(store.next_token().waited, 0.0);
}

#[test]
fn arguments_are_checked() {
    let store = shape(2).fake(pace(1, PART), &slots(6));
    for (layer, ids, weights, expected) in [
        (
            2,
            vec![0],
            vec![1.0],
            "layer: expected one below 2, found 2",
        ),
        (
            0,
            vec![16],
            vec![1.0],
            "expected an expert below 16, found 16",
        ),
        (0, vec![1, 2], vec![1.0], "expected 2 weights, found 1"),
        (0, vec![1, 1], vec![1.0, 1.0], "expert 1 twice"),
    ] {
        let error = store.begin(layer, &ids, &weights, Class::Exact).err();
        let error = error.expect(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    store.check();
}
