//! Traces: the replayer agrees with the store, and policies compare as they must.

use std::path::PathBuf;

use kinglet::experts::replay::{ReplayPolicy, replay};
use kinglet::experts::trace::{Event, Trace};
use kinglet::experts::{Class, Mode, Options, PolicyKind, Prefetch};

use crate::common::{Random, Shape, pace, slots};

fn shape() -> Shape {
    Shape {
        n_layers: 6,
        n_experts: 16,
        n_used: 3,
        parts: vec![4096, 4096],
        residue: 0,
        step: 0,
    }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("experts-{name}.trace"))
}

/// The experts of a layer for a token: mostly those of the token's topic, which changes now and then.
fn route(random: &mut Random, topic: u64, layer: usize, shape: &Shape) -> Vec<u32> {
    let n = shape.n_experts as u64;
    let shift = Random(topic * 100 + layer as u64).next() % n;
    let ids = random.choose(shape.n_used, shape.n_experts, 3.0);
    ids.iter()
        .map(|id| ((u64::from(*id) + shift) % n) as u32)
        .collect()
}

/// A run of `n_tokens` after a prompt that goes in waves; two requests are open at times.
fn run(options: &Options, n_tokens: usize, seed: u64) -> (kinglet::experts::Stats, Trace) {
    let shape = shape();
    let pace = kinglet::experts::disk::Pace {
        jitter: std::time::Duration::from_millis(3),
        seed,
        ..pace(3, 4096)
    };
    let store = shape.fake(pace, options);
    let mut random = Random(seed);
    for layer in 0..shape.n_layers {
        let ids = random.choose(11, shape.n_experts, 1.0);
        let weights: Vec<f32> = ids.iter().map(|id| (id % 3) as f32).collect();
        for wave in store.waves(layer, &ids, &weights).expect("sound") {
            let wave = wave.expect("room");
            for j in 0..2 * wave.len() {
                wave.wait(j / 2, j % 2).expect("no fault");
            }
        }
    }
    for token in 0..n_tokens {
        store.next_token();
        let mut before = None;
        for layer in 0..shape.n_layers {
            let ids = route(&mut random, token as u64 / 40, layer, &shape);
            let weights: Vec<f32> = ids.iter().map(|_| random.unit() as f32).collect();
            let request = store
                .begin(layer, &ids, &weights, Class::Exact)
                .expect("room");
            drop(before.take());
            for j in 0..2 * ids.len() {
                request.wait(j / 2, j % 2).expect("no fault");
            }
            if token % 3 == 0 {
                before = Some(request);
            }
        }
    }
    let stats = store.stats();
    drop(store);
    let trace = Trace::open(options.trace.as_ref().expect("a trace")).expect("a sound trace");
    (stats, trace)
}

#[test]
fn the_replayer_agrees_with_the_store_to_the_last_hit() {
    let mut modes = Vec::new();
    for kind in PolicyKind::ALL {
        for (n_slots, prefetch) in [
            (9, Prefetch::Exact),
            (9, Prefetch::Off),
            (17, Prefetch::Exact),
            (23, Prefetch::Off),
            (24, Prefetch::Exact),
            (50, Prefetch::Exact),
            (95, Prefetch::Off),
        ] {
            let options = Options {
                policy: kind,
                prefetch,
                trace: Some(path(&format!("agree-{}-{n_slots}", kind.name()))),
                ..slots(n_slots)
            };
            let (stats, trace) = run(&options, 150, n_slots as u64);
            let outcome = replay(&trace, n_slots, ReplayPolicy::Store(kind)).expect("it fits");
            let hits: Vec<bool> = trace.uses.iter().map(|used| used.hit).collect();
            assert!(outcome.was_hit == hits, "{} with {n_slots}", kind.name());
            assert_eq!(outcome.hits, stats.total.hits);
            assert_eq!(outcome.used, stats.total.used);
            assert_eq!(outcome.evictions, stats.total.evictions);
            assert_eq!(outcome.bytes, stats.total.misses() * 8192);
            assert_eq!(outcome.bytes, stats.total.all_bytes());
            let layers: u64 = stats.layers.iter().map(|layer| layer.hits).sum();
            assert_eq!(layers, outcome.hits);
            modes.push(stats.mode);
        }
    }
    assert!(modes.contains(&Mode::Admission) && modes.contains(&Mode::Cached));
}

#[test]
fn lru_is_what_a_list_says_and_nothing_below_the_cycle() {
    let options = Options {
        trace: Some(path("lru")),
        ..slots(96)
    };
    let (stats, mut trace) = run(&options, 200, 3);
    assert_eq!(stats.mode, Mode::Resident);
    // The prompt and its open ends aside: each request ends before the next.
    let decode = |event: &Event| matches!(event, Event::Begin { token, .. } if *token > 0);
    let begins: Vec<Event> = trace.events.iter().filter(|e| decode(e)).cloned().collect();
    trace.events = begins
        .into_iter()
        .enumerate()
        .flat_map(|(n, begin)| [begin, Event::End(n)])
        .collect();

    for n_slots in [9, 12, 15, 16, 18, 30, 60, 96] {
        let outcome = replay(&trace, n_slots, ReplayPolicy::Plain(PolicyKind::Lru));
        let outcome = outcome.expect("it fits");
        let mut list: Vec<u32> = Vec::new();
        let mut hits = 0;
        for event in &trace.events {
            let Event::Begin { uses, .. } = event else {
                continue;
            };
            let keys: Vec<u32> = trace.uses[uses.clone()].iter().map(|u| u.key).collect();
            hits += keys.iter().filter(|key| list.contains(key)).count() as u64;
            list.retain(|key| !keys.contains(key));
            list.extend(&keys);
            let too_many = list.len().saturating_sub(n_slots);
            list.drain(..too_many);
        }
        assert_eq!(outcome.hits, hits, "{n_slots} slots");
        if n_slots <= 5 * 3 {
            assert_eq!(
                hits, 0,
                "{n_slots} slots: at most those of all other layers"
            );
            let admission = ReplayPolicy::Admission(PolicyKind::Decayed);
            let admission = replay(&trace, n_slots, admission).expect("it fits");
            assert!(
                n_slots == 9 || admission.hit_rate() > 0.02,
                "{n_slots} slots"
            );
        } else {
            assert!(hits > 0);
        }
    }
}

#[test]
fn nobody_beats_one_who_knows_the_future() {
    for seed in 0..4 {
        let options = Options {
            trace: Some(path(&format!("belady-{seed}"))),
            ..slots(96)
        };
        let (_, trace) = run(&options, 120, seed);
        let mut last = 0.0;
        for n_slots in [9, 14, 20, 26, 40, 70, 96] {
            let rate = |policy| replay(&trace, n_slots, policy).map(|o| o.hit_rate());
            // With all experts resident the prompt held eleven at once.
            let Ok(best) = rate(ReplayPolicy::Belady) else {
                assert!(n_slots < 96);
                continue;
            };
            for policy in ReplayPolicy::ALL {
                let other = rate(policy).expect("it fits");
                assert!(best >= other, "{}: {other} of {best}", policy.name());
            }
            assert!(best >= last);
            last = best;
        }
        assert!(last > 0.5);
    }
}

/// The trace of 600 tokens: in turns of `turn` tokens routers prefer other experts, ever less the more they rank.
fn preferring(name: &str, turn: usize, skew: f64) -> Trace {
    let shape = shape();
    let mut random = Random(turn as u64);
    let layer = format!("layer {} {} 1\n", shape.n_experts, shape.n_used);
    let mut text = format!("kinglet-experts 1\n{}", layer.repeat(shape.n_layers));
    for token in 0..600 {
        for layer in 0..shape.n_layers {
            let topic = (token / turn) as u64;
            let shift = Random(topic * 100 + layer as u64).next() % 16;
            let ids = random.choose(shape.n_used, shape.n_experts, skew);
            let ids = ids.iter().map(|id| (u64::from(*id) + shift) % 16);
            let uses: String = ids.map(|id| format!(" {id}:1:m")).collect();
            let n = token * shape.n_layers + layer;
            text += &format!("begin {token} {layer}{uses}\nend {n}\n");
        }
    }
    let file = path(name);
    std::fs::write(&file, text).expect("a file");
    Trace::open(&file).expect("sound")
}

#[test]
fn the_adaptive_policy_is_near_the_best_of_the_others_whichever_that_is() {
    let fixed = [
        ReplayPolicy::Plain(PolicyKind::Lru),
        ReplayPolicy::Plain(PolicyKind::Decayed),
        ReplayPolicy::Admission(PolicyKind::Decayed),
    ];
    let mut ahead = [0.0f64; 3];
    for trace in [
        preferring("topics", 12, 7.0),
        preferring("favourites", 600, 2.0),
    ] {
        for n_slots in [12, 20, 30, 48] {
            let rate = |policy| replay(&trace, n_slots, policy).expect("it fits").hit_rate();
            let rates = fixed.map(rate);
            let best = rates.into_iter().fold(0.0, f64::max);
            let adaptive = rate(ReplayPolicy::Store(PolicyKind::Adaptive));
            println!("{n_slots} slots: {rates:.3?}, adaptive {adaptive:.3}");
            assert!(adaptive > best - 0.02, "{n_slots}: {adaptive} of {best}");
            for (ahead, rate) in ahead.iter_mut().zip(rates) {
                *ahead = ahead.max(adaptive - rate);
            }
        }
    }
    // Each of the others is the wrong choice somewhere.
    assert!(ahead.iter().all(|ahead| *ahead > 0.05), "{ahead:?}");
}

#[test]
fn hostile_traces_are_refused_by_line() {
    let head = "kinglet-experts 1\nlayer 4 2 100\n";
    for (text, expected) in [
        ("", "without layers"),
        (
            "kinglet-experts 2\n",
            "line 1: expected `kinglet-experts 1`",
        ),
        ("kinglet-experts 1\n", "without layers"),
        (
            "kinglet-experts 1\nlayer 4 5 1\n",
            "line 2: expected 1 to 4 used, found 5",
        ),
        (
            "kinglet-experts 1\nlayer 99999999999 1 1\n",
            "at most 1048576",
        ),
        (
            "HEAD\nbegin 0 1 0:1:h\n",
            "layer: expected one below 1, found 1",
        ),
        (
            "HEAD\nbegin 0 0 4:1:h\n",
            "expert: expected one below 4, found 4",
        ),
        ("HEAD\nbegin 0 0 1:1:h 1:1:h\n", "expert 1 twice"),
        (
            "HEAD\nbegin 0 0 1:x:h\n",
            "weight: expected a number, found `x`",
        ),
        ("HEAD\nbegin 0 0 1:1:y\n", "expected h or m"),
        (
            "HEAD\nbegin 5 0 1:1:h\nbegin 4 0 1:1:h\n",
            "token 4 after 5",
        ),
        ("HEAD\nend 0\n", "request 0 is not open"),
        (
            "HEAD\nbegin 0 0 1:1:h\nend 0\nend 0\n",
            "line 5: request 0 is not open",
        ),
        ("HEAD\nfrob\n", "expected layer, begin or end, found `frob`"),
    ] {
        let file = path("hostile");
        std::fs::write(&file, text.replace("HEAD\n", head)).expect("a file");
        let error = Trace::open(&file).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    // A run that was killed: the last line is cut off.
    let file = path("killed");
    std::fs::write(&file, format!("{head}begin 0 0 1:1:h\nbegin 0 0 2:0.")).expect("a file");
    assert_eq!(Trace::open(&file).expect("sound").n_tokens(), 1);
}
