//! The sampler chain against a plain one in double precision, and what each setting promises.

use std::collections::HashMap;

use kinglet::sampler::{Order, Rng, Sampler, Settings, Source, preset};
use proptest::prelude::*;

/// Sets values by their names.
fn settings(values: &[(&str, &str)]) -> Settings {
    let mut settings = Settings::neutral();
    for (name, value) in values {
        settings.set(name, value, Source::Flag).unwrap();
    }
    settings
}

fn sampler(values: &[(&str, &str)]) -> Sampler {
    Sampler::new(&settings(values))
}

/// Logits like a model's: a few large ones, a long tail.
fn logits(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed);
    let mut normal = || (0..12).map(|_| rng.next_f64()).sum::<f64>() - 6.0;
    (0..n).map(|_| (3.0 * normal()) as f32).collect()
}

/// The chain written down naively: the whole vocabulary, sorted, in double precision.
#[derive(Clone, Debug)]
struct Naive {
    order: Vec<&'static str>,
    repeat: f64,
    frequency: f64,
    presence: f64,
    window: Vec<u32>,
    top_k: usize,
    typical: f64,
    top_p: f64,
    min_p: f64,
    temperature: f64,
}

/// Tokens with probabilities, or `None` if a cut is too close to call in single precision.
fn naive(logits: &[f32], n: &Naive) -> Option<HashMap<u32, f64>> {
    const CLOSE: f64 = 1e-4;
    let mut list: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|x| f64::from(*x))).collect();
    let softmax = |list: &[(u32, f64)]| {
        let max = list.iter().map(|c| c.1).fold(f64::MIN, f64::max);
        let sum: f64 = list.iter().map(|c| (c.1 - max).exp()).sum();
        list.iter()
            .map(|c| (c.1 - max).exp() / sum)
            .collect::<Vec<_>>()
    };
    for stage in &n.order {
        match *stage {
            "penalties" => {
                for (id, logit) in &mut list {
                    let count = n.window.iter().filter(|t| *t == id).count();
                    if count > 0 {
                        *logit = if *logit <= 0.0 {
                            *logit * n.repeat
                        } else {
                            *logit / n.repeat
                        };
                        *logit -= count as f64 * n.frequency + n.presence;
                    }
                }
            }
            "top_k" if n.top_k > 0 => {
                list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                if n.top_k < list.len() && list[n.top_k - 1].1 - list[n.top_k].1 < CLOSE {
                    return None;
                }
                list.truncate(n.top_k);
            }
            "typ_p" if n.typical < 1.0 => {
                let p = softmax(&list);
                let entropy: f64 = p.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
                let mut by: Vec<_> = list
                    .iter()
                    .zip(&p)
                    .map(|(c, p)| ((-p.ln() - entropy).abs(), *p, *c))
                    .collect();
                by.sort_by(|a, b| a.0.total_cmp(&b.0));
                let (mut sum, mut keep) = (0.0, by.len());
                for (i, (_, p, _)) in by.iter().enumerate() {
                    sum += p;
                    if (sum - n.typical).abs() < CLOSE {
                        return None;
                    }
                    if sum > n.typical {
                        keep = i + 1;
                        break;
                    }
                }
                if keep < by.len() && by[keep].0 - by[keep - 1].0 < CLOSE {
                    return None;
                }
                list = by[..keep].iter().map(|x| x.2).collect();
            }
            "top_p" if n.top_p < 1.0 => {
                list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let p = softmax(&list);
                let (mut sum, mut keep) = (0.0, list.len());
                for (i, p) in p.iter().enumerate() {
                    sum += p;
                    if (sum - n.top_p).abs() < CLOSE {
                        return None;
                    }
                    if sum >= n.top_p {
                        keep = i + 1;
                        break;
                    }
                }
                list.truncate(keep);
            }
            "min_p" if n.min_p > 0.0 => {
                let p = softmax(&list);
                let max = p.iter().copied().fold(0.0, f64::max);
                if p.iter().any(|p| (p / max / n.min_p - 1.0).abs() < CLOSE) {
                    return None;
                }
                list = list
                    .iter()
                    .zip(&p)
                    .filter(|(_, p)| **p >= n.min_p * max)
                    .map(|(c, _)| *c)
                    .collect();
            }
            "temperature" => list.iter_mut().for_each(|c| c.1 /= n.temperature),
            _ => {}
        }
    }
    let p = softmax(&list);
    Some(list.iter().map(|c| c.0).zip(p).collect())
}

/// The distribution that the chain leaves.
fn distribution(sampler: &mut Sampler, logits: &[f32]) -> HashMap<u32, f64> {
    let left: Vec<_> = sampler.candidates(logits).unwrap().iter().collect();
    let max = left.iter().map(|c| c.logit).fold(f32::MIN, f32::max);
    let weight = |logit: f32| f64::from(logit - max).exp();
    let sum: f64 = left.iter().map(|c| weight(c.logit)).sum();
    left.iter().map(|c| (c.id, weight(c.logit) / sum)).collect()
}

const STAGES: [&str; 6] = [
    "penalties",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "temperature",
];

fn chains() -> impl Strategy<Value = Naive> {
    let order = Just(STAGES.to_vec()).prop_shuffle();
    let order = (order, 0usize..=6).prop_map(|(mut order, n)| {
        order.truncate(n.max(3));
        order
    });
    let order = prop_oneof![Just(STAGES.to_vec()), order];
    let penalties = (
        prop_oneof![Just(1.0), 0.5..2.0],
        prop_oneof![Just(0.0), -1.0..1.0],
        prop_oneof![Just(0.0), -1.0..1.0],
        prop::collection::vec(0u32..40, 0..90),
    );
    let cuts = (
        prop_oneof![Just(0), 1usize..80],
        prop_oneof![Just(1.0), 0.05..1.0],
        prop_oneof![Just(1.0), 0.05..1.0],
        prop_oneof![Just(0.0), 0.001..1.0],
        prop_oneof![Just(1.0), 0.05..3.0],
    );
    (order, penalties, cuts).prop_map(|(order, penalties, cuts)| Naive {
        order,
        repeat: penalties.0,
        frequency: penalties.1,
        presence: penalties.2,
        window: penalties.3,
        top_k: cuts.0,
        typical: cuts.1,
        top_p: cuts.2,
        min_p: cuts.3,
        temperature: cuts.4,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn any_chain_leaves_the_naive_distribution(
        chain in chains(),
        n in prop_oneof![Just(3usize), Just(40), Just(700), Just(5000)],
        seed in any::<u64>(),
    ) {
        let logits = logits(n, seed);
        let mut sampler = sampler(&[
            ("samplers", &chain.order.join(";")),
            ("repeat-penalty", &chain.repeat.to_string()),
            ("frequency-penalty", &chain.frequency.to_string()),
            ("presence-penalty", &chain.presence.to_string()),
            ("repeat-last-n", "64"),
            ("top-k", &chain.top_k.to_string()),
            ("typical", &chain.typical.to_string()),
            ("top-p", &chain.top_p.to_string()),
            ("min-p", &chain.min_p.to_string()),
            ("temp", &chain.temperature.to_string()),
        ]);
        chain.window.iter().for_each(|token| sampler.accept(*token));
        let mut plain = chain.clone();
        plain.window = chain.window[chain.window.len().saturating_sub(64)..].to_vec();
        let Some(expected) = naive(&logits, &plain) else {
            return Ok(());
        };
        let found = distribution(&mut sampler, &logits);
        prop_assert_eq!(found.len(), expected.len(), "{:?}", chain);
        for (id, p) in &expected {
            let q = found.get(id).copied().unwrap_or(-1.0);
            prop_assert!((p - q).abs() < 1e-4 * p + 1e-6, "token {}: expected {}, found {}, {:?}", id, p, q, chain);
        }
    }
}

#[test]
fn neutral_settings_leave_every_bit() {
    let mut logits = logits(1003, 1);
    logits[5] = f32::NEG_INFINITY;
    logits[6] = -0.0;
    let mut sampler = Sampler::new(&Settings::neutral());
    assert!(sampler.stages().is_empty());
    sampler.accept(7);
    let left = sampler.candidates(&logits).unwrap();
    assert_eq!(left.len(), logits.len());
    for (c, (id, logit)) in left.iter().zip((0..).zip(&logits)) {
        assert_eq!((c.id, c.logit.to_bits()), (id, logit.to_bits()));
    }
}

#[test]
fn each_neutral_value_leaves_its_sampler_out() {
    let all = [
        ("temp", "0.5"),
        ("top-k", "3"),
        ("top-p", "0.5"),
        ("min-p", "0.5"),
        ("typical", "0.5"),
        ("repeat-penalty", "2"),
    ];
    let neutral = [
        ("temp", "1"),
        ("top-k", "0"),
        ("top-p", "1"),
        ("min-p", "0"),
        ("typical", "1"),
        ("repeat-penalty", "1"),
    ];
    assert_eq!(sampler(&all).stages().len(), 6);
    for (i, value) in neutral.iter().enumerate() {
        let mut values = all;
        values[i] = *value;
        assert_eq!(sampler(&values).stages().len(), 5, "{value:?}");
    }
    let mut no_window = all.to_vec();
    no_window.push(("repeat-last-n", "0"));
    assert_eq!(sampler(&no_window).stages().len(), 5);
}

#[test]
fn draws_follow_the_distribution() {
    let logits = logits(50, 3);
    let mut sampler = sampler(&[("temp", "0.7"), ("top-k", "12"), ("seed", "11")]);
    let expected = distribution(&mut sampler, &logits);
    let n = 200_000;
    let mut counts = HashMap::<u32, f64>::new();
    for _ in 0..n {
        *counts.entry(sampler.sample(&logits).unwrap()).or_default() += 1.0;
    }
    let chi2: f64 = expected
        .iter()
        .map(|(id, p)| {
            let expected = p * f64::from(n);
            (counts.get(id).copied().unwrap_or(0.0) - expected).powi(2) / expected
        })
        .sum();
    assert_eq!(
        counts
            .keys()
            .filter(|id| !expected.contains_key(id))
            .count(),
        0
    );
    // 11 degrees of freedom: above 31.3 in one of a thousand; the seed is fixed.
    assert!(chi2 < 31.3, "chi2 {chi2}");
}

#[test]
fn a_seed_names_the_draws() {
    let logits = logits(300, 4);
    let draw = |seed: &str| -> Vec<u32> {
        let mut sampler = sampler(&[("seed", seed), ("temp", "1.5")]);
        (0..50).map(|_| sampler.sample(&logits).unwrap()).collect()
    };
    assert_eq!(draw("42"), draw("42"));
    assert_ne!(draw("42"), draw("43"));

    let mut random = Sampler::new(&settings(&[("temp", "1.5")]));
    let seed = random.seed().to_string();
    let drawn: Vec<u32> = (0..50).map(|_| random.sample(&logits).unwrap()).collect();
    assert_eq!(drawn, draw(&seed), "the seed that it tells");
}

#[test]
fn temperature_zero_takes_the_likeliest_and_of_equals_the_first() {
    let mut greedy = sampler(&[("temp", "0")]);
    assert!(greedy.is_greedy());
    assert_eq!(greedy.sample(&[0.0, 3.0, 1.0, 3.0]).unwrap(), 1);
    // Cuts that would take the likeliest away do not run.
    let mut cut = sampler(&[("temp", "0"), ("typical", "0.05"), ("top-k", "1")]);
    let logits = logits(100, 5);
    let best = greedy.sample(&logits).unwrap();
    assert_eq!(cut.sample(&logits).unwrap(), best);
    // Penalties do.
    let mut penalized = sampler(&[("temp", "0"), ("repeat-penalty", "100")]);
    penalized.accept(1);
    assert_eq!(penalized.sample(&[0.0, 3.0, 1.0, 3.0]).unwrap(), 3);
    // Without the temperature in the chain there is no greedy choice.
    assert!(!sampler(&[("temp", "0"), ("samplers", "top_k")]).is_greedy());
}

#[test]
fn penalties_are_exact() {
    let mut sampler = sampler(&[
        ("repeat-penalty", "2"),
        ("frequency-penalty", "0.25"),
        ("presence-penalty", "1"),
        ("repeat-last-n", "4"),
    ]);
    // The first two fall out of the window.
    [3, 3, 0, 1, 1, 2]
        .iter()
        .for_each(|token| sampler.accept(*token));
    let left: Vec<f32> = sampler
        .candidates(&[4.0, -4.0, 0.0, 5.0])
        .unwrap()
        .iter()
        .map(|c| c.logit)
        .collect();
    assert_eq!(left, [4.0 / 2.0 - 1.25, -8.0 - 1.5, 0.0 - 1.25, 5.0]);
    sampler.reset();
    let left: Vec<f32> = sampler
        .candidates(&[4.0, -4.0])
        .unwrap()
        .iter()
        .map(|c| c.logit)
        .collect();
    assert_eq!(left, [4.0, -4.0]);
}

#[test]
fn a_window_of_all_tokens_forgets_none() {
    let mut sampler = sampler(&[("presence-penalty", "1"), ("repeat-last-n", "-1")]);
    (0..10_000).for_each(|token| sampler.accept(token));
    let left = sampler.candidates(&vec![0.0; 10_001]).unwrap();
    let unpenalized: Vec<u32> = left
        .iter()
        .filter(|c| c.logit == 0.0)
        .map(|c| c.id)
        .collect();
    assert_eq!(unpenalized, [10_000]);
}

#[test]
fn logits_that_are_no_numbers_are_errors() {
    let chains = [
        vec![("temp", "0")],
        vec![("temp", "0"), ("repeat-penalty", "2")],
        vec![],
        vec![
            ("top-k", "5"),
            ("top-p", "0.5"),
            ("min-p", "0.1"),
            ("typical", "0.5"),
            ("temp", "0.5"),
        ],
    ];
    for chain in chains {
        let mut sampler = sampler(&chain);
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for at in [0, 7, 8, 19] {
                let mut logits = vec![0.5; 20];
                logits[at] = bad;
                assert!(
                    sampler.sample(&logits).is_err(),
                    "{bad} at {at} in {chain:?}"
                );
            }
        }
        assert!(
            sampler.sample(&[f32::NEG_INFINITY; 20]).is_err(),
            "{chain:?}"
        );
        assert!(sampler.sample(&[]).is_err(), "{chain:?}");
        assert!(
            sampler.sample(&[0.5; 20]).is_ok(),
            "{chain:?}: an error has left something behind"
        );
        let mut masked = [f32::NEG_INFINITY; 20];
        masked[13] = -1e30;
        assert_eq!(sampler.sample(&masked).unwrap(), 13, "{chain:?}");
    }
}

#[test]
fn extreme_values_still_give_a_token() {
    let logits = [f32::MAX, f32::MIN, 0.0, 1e-40];
    for chain in [
        vec![("temp", "0.000001")],
        vec![("temp", "1000"), ("repeat-penalty", "100")],
        vec![
            ("min-p", "1"),
            ("top-p", "0"),
            ("typical", "0"),
            ("top-k", "1"),
        ],
        vec![("top-p", "0.000001"), ("top-k", "999999999999")],
    ] {
        let mut sampler = sampler(&chain);
        sampler.accept(2);
        assert_eq!(sampler.sample(&logits).unwrap(), 0, "{chain:?}");
    }
}

#[test]
fn forbidden_tokens_are_never_chosen() {
    for temperature in ["0", "1"] {
        let mut sampler = sampler(&[("temp", temperature)]);
        sampler.forbid(&[1, 9]);
        for _ in 0..100 {
            assert_ne!(sampler.sample(&[0.0, 5.0, 0.0]).unwrap(), 1);
        }
        sampler.forbid(&[]);
        assert!((0..100).any(|_| sampler.sample(&[0.0, 5.0, 0.0]).unwrap() == 1));
    }
}

#[test]
fn nothing_is_allocated_after_the_first_token() {
    let logits = logits(49_152, 6);
    for chain in [
        vec![
            ("temp", "0.8"),
            ("top-k", "40"),
            ("top-p", "0.95"),
            ("min-p", "0.05"),
            ("repeat-penalty", "1.1"),
        ],
        vec![("temp", "1.5"), ("top-p", "0.99"), ("typical", "0.9")],
        vec![("temp", "1.5")],
    ] {
        let mut sampler = sampler(&chain);
        sampler.sample(&logits).unwrap();
        let bytes = sampler.bytes();
        for i in 0..200 {
            let token = sampler.sample(&logits).unwrap();
            sampler.accept(token);
            sampler.accept(i);
        }
        assert_eq!(sampler.bytes(), bytes, "{chain:?}");
    }
}

#[test]
fn settings_know_their_sources() {
    let smol = preset("lfm2", "LFM2 Smol 89M").unwrap();
    let mut settings = Settings::for_model(smol);
    settings.read_file(|key| match key {
        "temp" => Some("0.45".into()),
        "top_k" => Some("-7".into()), // out of range: passed over
        "sequence" => Some("dry;top_k;nonesuch;temperature".into()),
        _ => None,
    });
    settings.set("--min_p", "0.2", Source::Flag).unwrap();
    settings.set("temperature", "0.9", Source::Set).unwrap();
    let row = |name: &str| {
        let row = settings
            .rows()
            .into_iter()
            .find(|row| row.name == name)
            .unwrap();
        (row.value, row.source.to_string())
    };
    let expect = |value: &str, source: &str| (value.to_owned(), source.to_owned());
    assert_eq!(row("temp"), expect("0.9", "/set"));
    assert_eq!(row("min-p"), expect("0.2", "command line"));
    assert_eq!(
        row("repeat-penalty"),
        expect("1.15", "recommended for LFM2 Smol")
    );
    assert_eq!(row("top-k"), expect("0", "recommended for LFM2 Smol"));
    assert_eq!(row("samplers"), expect("top_k;temperature", "model file"));
    assert_eq!(row("repeat-last-n"), expect("64", "default"));

    // What a row shows can be set again.
    let mut again = Settings::default();
    for row in settings.rows() {
        again.set(row.name, &row.value, row.source).unwrap();
    }
    assert_eq!(again, settings);
}

#[test]
fn values_out_of_range_are_named() {
    let mut settings = Settings::default();
    for (name, value) in [
        ("temp", "-1"),
        ("temp", "NaN"),
        ("temp", "hot"),
        ("top-p", "1.1"),
        ("min-p", "-0.1"),
        ("top-k", "-1"),
        ("repeat-penalty", "0"),
        ("repeat-last-n", "-2"),
        ("seed", "x"),
        ("samplers", "top_k;top_k"),
        ("samplers", "mirostat"),
        ("nonesuch", "1"),
    ] {
        let error = settings
            .set(name, value, Source::Set)
            .unwrap_err()
            .to_string();
        assert!(error.contains(name), "{error}");
    }
    assert_eq!(settings, Settings::default());
    assert_eq!(Order::default().to_string(), STAGES.join(";"));
}
