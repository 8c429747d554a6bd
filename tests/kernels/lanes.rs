//! Attention of a batch with queries in the lanes, against the definition in `f64`: exactly, with scores from
//! differences of keys (DeltaLLM), and to keys that tokens choose; on random numbers and on the queries and keys of a
//! model.

use kinglet::backend::KvType;
use kinglet::backend::cpu::pool::OutCols;
use kinglet::backend::cpu::table::{
    self, AttendBatch, AttendLanes, Chosen, LanesBatch, Ready, Rows,
};
use kinglet::backend::delta::Exact;
use kinglet::profile::DeltaWork;
use kinglet::quant;

use crate::common::{Random, assert_near, scalar_row, vector_rows};
use crate::recorded::{self, Recorded};

const PAGE: usize = 256;

#[derive(Clone)]
struct Case {
    head_dim: usize,
    group: usize,
    n_keys: usize,
    window: Option<usize>,
    scale: f32,
    /// `(n_keys, group, head_dim)`: a row for each position.
    q: Vec<f32>,
    /// Pages, as they are cached, and what is left of the numbers.
    pages: [Vec<Vec<u32>>; 2],
    kind: KvType,
    keys: Vec<f32>,
    values: Vec<f32>,
    thresholds: Vec<f32>,
    frame: usize,
    sink: usize,
    exact: Exact,
    most: usize,
    /// For each position the keys that it reads, in order; `None`: all it sees.
    chosen: Option<Vec<Vec<usize>>>,
}

impl Case {
    fn random(
        head_dim: usize,
        group: usize,
        n_keys: usize,
        kind: KvType,
        random: &mut Random,
    ) -> Self {
        // Keys wander, as those of a text do.
        let mut keys = random.floats(n_keys * head_dim, 1.0);
        for i in head_dim..keys.len() {
            keys[i] = 0.8 * keys[i - head_dim] + 0.4 * keys[i];
        }
        let q = random.floats(n_keys * group * head_dim, 4.0);
        let values = random.floats(n_keys * head_dim, 2.0);
        let thresholds = (0..head_dim).map(|c| 0.1 + 0.1 * (c % 4) as f32).collect();
        Self::new((head_dim, group), kind, [q, keys, values], thresholds)
    }

    /// A layer's head of keys and its queries, with any values.
    fn recorded(of: &Recorded, threshold: f32, random: &mut Random) -> Self {
        let n = of.head_dim;
        let values = random.floats(of.keys.len(), 2.0);
        let numbers = [of.q.clone(), of.keys.clone(), values];
        let case = Self::new((n, of.group), KvType::F16, numbers, vec![threshold; n]);
        Self {
            scale: of.scale,
            ..case
        }
    }

    fn new(
        (head_dim, group): (usize, usize),
        kind: KvType,
        [q, keys, values]: [Vec<f32>; 3],
        thresholds: Vec<f32>,
    ) -> Self {
        let n_keys = keys.len() / head_dim;
        let n_all = n_keys.next_multiple_of(PAGE) * head_dim;
        let store = |mut rows: Vec<f32>| {
            // Pages are cached whole; what was never written may hold anything.
            rows.resize(n_all, f32::NAN);
            let mut bytes = vec![0; kind.row_bytes(n_all)];
            quant::quantize(kind.dtype(), &rows, &mut bytes);
            quant::dequantize(kind.dtype(), &bytes, &mut rows);
            let pages = bytes.chunks_exact(kind.row_bytes(PAGE * head_dim));
            let words = |page: &[u8]| {
                let mut words = vec![0u32; page.len() / 4];
                bytemuck::cast_slice_mut(&mut words).copy_from_slice(page);
                words
            };
            (pages.map(words).collect(), rows)
        };
        let (key_pages, keys) = store(keys);
        let (value_pages, values) = store(values);
        Self {
            head_dim,
            group,
            n_keys,
            window: None,
            scale: 0.125,
            q,
            pages: [key_pages, value_pages],
            kind,
            keys,
            values,
            thresholds,
            frame: 64,
            sink: 0,
            exact: Exact::Last(64),
            most: usize::MAX,
            chosen: None,
        }
    }

    /// Each token reads some eighths of what it sees, and itself.
    fn choosing(self) -> Self {
        let chosen = |position: usize| {
            let first = self.first(position);
            let is_read = |j: &usize| {
                *j == position
                    || (position / 3 * 31 + *j / 8 * 17 + position * *j / 64).is_multiple_of(5)
            };
            (first..=position).filter(is_read).collect()
        };
        let chosen = (0..self.n_keys).map(chosen).collect();
        Self {
            chosen: Some(chosen),
            most: 0,
            ..self
        }
    }

    /// The first key that a query sees.
    fn first(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Positions `start..`, `batch` at a time.
    fn run(&self, kernel: Ready<AttendLanes>, start: usize, batch: usize) -> (Vec<f32>, DeltaWork) {
        let row = self.group * self.head_dim;
        let mut out = vec![f32::NAN; (self.n_keys - start) * row];
        let mut done = DeltaWork::default();
        let [keys, values] = self.pages.each_ref().map(|pages| {
            let pages = pages.iter().map(|page| bytemuck::cast_slice(page));
            pages
                .map(|page| Rows::new(self.kind, page))
                .collect::<Vec<_>>()
        });
        for (i, out) in out.chunks_mut(batch * row).enumerate() {
            let at = start + i * batch;
            let n_tokens = out.len() / row;
            let first = self.first(at) / PAGE;
            let n_words = self.n_keys.next_multiple_of(PAGE) / 32;
            let words = self.chosen.as_ref().map(|chosen| {
                let mut words = vec![0u32; n_tokens * n_words];
                for (token, keys) in chosen[at..at + n_tokens].iter().enumerate() {
                    for j in keys.iter().map(|j| j - first * PAGE) {
                        words[j / 32 * n_tokens + token] |= 1 << (j % 32);
                    }
                }
                words
            });
            let frame = match words {
                Some(_) => LanesBatch::FRAME_TO_CHOOSE,
                None => self.frame,
            };
            let mut room =
                vec![f32::NAN; LanesBatch::room(n_tokens * self.group, self.head_dim, frame)];
            let mut batch = LanesBatch {
                attend: AttendBatch {
                    q: &self.q[at * row..],
                    q_stride: row,
                    group: self.group,
                    head_dim: self.head_dim,
                    scale: self.scale,
                    start: at,
                    window: self.window,
                    first: first * PAGE,
                    page: PAGE,
                    keys: &keys[first..],
                    values: &values[first..],
                    out: OutCols::whole(out, row),
                },
                frame,
                sink: self.sink,
                exact: self.exact,
                thresholds: &self.thresholds,
                most: self.most,
                chosen: words.as_deref().map(|words| Chosen { words }),
                room: &mut room,
                done: DeltaWork::default(),
            };
            kernel.run(&mut batch);
            done += batch.done;
        }
        (out, done)
    }

    /// What is held at each key, and how many elements changed there.
    fn held(&self) -> (Vec<f32>, Vec<usize>) {
        let n = self.head_dim;
        let mut held = self.keys.clone();
        let mut changes = vec![n; self.n_keys];
        for j in (0..self.n_keys).filter(|j| j % self.frame != 0) {
            changes[j] = 0;
            for c in 0..n {
                let before = held[(j - 1) * n + c];
                if (self.keys[j * n + c] - before).abs() > self.thresholds[c] {
                    changes[j] += 1;
                } else {
                    held[j * n + c] = before;
                }
            }
        }
        (held, changes)
    }

    /// Compares positions `start..`, and what was counted.
    fn check(&self, kernel: Ready<AttendLanes>, start: usize, batch: usize) {
        let (n, group) = (self.head_dim, self.group);
        let (out, done) = self.run(kernel, start, batch);
        let (held, changes) = self.held();
        let pays = |frame: usize| {
            let keys = frame * self.frame..(frame + 1) * self.frame;
            keys.end <= self.n_keys
                && changes[keys].iter().sum::<usize>() <= self.most
                && self.most > 0
        };
        let mut expected = DeltaWork::default();
        for position in start..self.n_keys {
            let all = || (self.first(position)..=position).collect();
            let read: Vec<usize> = match &self.chosen {
                Some(chosen) => chosen[position].clone(),
                None => all(),
            };
            let is_far = |j: usize| {
                let frame = j / self.frame * self.frame;
                let end = frame + self.frame;
                let before = match self.exact {
                    Exact::Last(last) => (position + 1).saturating_sub(last),
                    Exact::Block(block) => position / block * block,
                };
                self.most > 0 && frame >= self.sink && end <= before
            };
            for head in 0..group {
                let q = &self.q[(position * group + head) * n..][..n];
                let mut size = 0.0;
                let mut score = |j: usize| {
                    let differs = is_far(j) && pays(j / self.frame);
                    if self.chosen.is_none() {
                        expected.dense += n as u64;
                        expected.far += if is_far(j) { n as u64 } else { 0 };
                        expected.done += if differs { changes[j] } else { n } as u64;
                    }
                    let key = match differs {
                        true => &held[j * n..][..n],
                        false => &self.keys[j * n..][..n],
                    };
                    let products = q
                        .iter()
                        .zip(key)
                        .map(|(q, k)| f64::from(*q) * f64::from(*k));
                    size += products.clone().map(f64::abs).sum::<f64>();
                    products.sum::<f64>() * f64::from(self.scale)
                };
                let scores: Vec<f64> = read.iter().copied().map(&mut score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let tolerance = 1e-5 + 1e-6 * size / scores.len() as f64;
                for i in 0..n {
                    let values = read.iter().map(|j| f64::from(self.values[j * n + i]));
                    let value = values.zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum;
                    let found = out[((position - start) * group + head) * n + i];
                    let what = format!(
                        "{} {:?} n {n} group {group} window {:?} {:?} sink {} frame {} most {} chosen {} position \
                         {position} head {head} element {i}",
                        kernel.name(),
                        self.kind,
                        self.window,
                        self.exact,
                        self.sink,
                        self.frame,
                        self.most,
                        self.chosen.is_some()
                    );
                    assert_near(found, value, tolerance, &what);
                }
            }
        }
        assert_eq!(
            (done.dense, done.far, done.done),
            (expected.dense, expected.far, expected.done),
            "{} n {n} window {:?} {:?}",
            kernel.name(),
            self.window,
            self.exact
        );
    }
}

fn kernels() -> Vec<Ready<AttendLanes>> {
    let vectors = vector_rows(table::ATTEND_LANES).map(|(_, kernel)| kernel);
    vectors.chain([scalar_row(table::ATTEND_LANES)]).collect()
}

#[test]
fn whole_products_are_dense_attention() {
    let mut random = Random::new(21);
    for (head_dim, group, n_keys, window, kind) in [
        (64, 3, 300, None, KvType::F16),
        (64, 1, 290, Some(70), KvType::Q8_0),
        (128, 7, 270, None, KvType::F32),
        (256, 4, 260, Some(100), KvType::Q4_0),
        (80, 2, 100, None, KvType::F16),
    ] {
        let case = Case {
            window,
            most: 0,
            thresholds: vec![0.0; head_dim],
            ..Case::random(head_dim, group, n_keys, kind, &mut random)
        };
        for kernel in kernels() {
            case.check(kernel, 0, n_keys);
            case.check(kernel, 230.min(n_keys - 3), 7);
        }
    }
}

#[test]
fn differences_are_their_definition() {
    let mut random = Random::new(22);
    for (head_dim, group, kind) in [
        (64, 3, KvType::F16),
        (128, 2, KvType::Q8_0),
        (80, 1, KvType::F32),
    ] {
        let case = Case::random(head_dim, group, 420, kind, &mut random);
        for (exact, frame, sink, window, most) in [
            (Exact::Last(1), 64, 0, None, usize::MAX),
            (Exact::Last(50), 32, 40, None, usize::MAX),
            (Exact::Block(100), 64, 0, None, usize::MAX),
            (Exact::Last(64), 64, 0, Some(150), usize::MAX),
            // Of some frames only.
            (Exact::Last(64), 32, 0, None, 32 * head_dim * 45 / 100),
            (Exact::Last(64), 256, 0, None, usize::MAX),
        ] {
            let case = Case {
                exact,
                frame,
                sink,
                window,
                most,
                ..case.clone()
            };
            for kernel in kernels() {
                case.check(kernel, 300, 120);
            }
        }
    }
}

/// Nothing but numbers that are told apart: then the definition with every threshold at 0 is dense attention.
#[test]
fn a_threshold_of_nothing_changes_nothing() {
    let mut random = Random::new(23);
    let case = Case::random(64, 3, 400, KvType::F16, &mut random);
    let nothing = Case {
        thresholds: vec![0.0; 64],
        ..case.clone()
    };
    let dense = Case {
        most: 0,
        ..case.clone()
    };
    for kernel in kernels() {
        let (found, _) = nothing.run(kernel, 0, 400);
        let (dense, _) = dense.run(kernel, 0, 400);
        for (found, dense) in found.iter().zip(&dense) {
            assert!(
                (found - dense).abs() < 1e-5,
                "{}: {found} {dense}",
                kernel.name()
            );
        }
    }
}

#[test]
fn what_a_query_gets_does_not_depend_on_the_others() {
    let mut random = Random::new(24);
    let case = Case::random(64, 3, 400, KvType::F16, &mut random);
    for kernel in kernels() {
        let (whole, _) = case.run(kernel, 0, 400);
        for batch in [1, 5, 33, 128] {
            let (parts, _) = case.run(kernel, 0, batch);
            assert!(parts == whole, "{} {batch}", kernel.name());
        }
    }
}

#[test]
fn chosen_keys_are_read_and_no_others() {
    let mut random = Random::new(25);
    for (head_dim, group, n_keys, window, kind) in [
        (64, 3, 300, None, KvType::F16),
        (64, 40, 290, Some(70), KvType::Q8_0),
        (128, 7, 270, None, KvType::F32),
        (256, 1, 530, Some(200), KvType::Q4_0),
        (80, 2, 100, None, KvType::F16),
    ] {
        let case = Case::random(head_dim, group, n_keys, kind, &mut random);
        let case = Case { window, ..case }.choosing();
        for kernel in kernels() {
            case.check(kernel, 0, n_keys);
            let (whole, _) = case.run(kernel, 0, n_keys);
            for batch in [1, 5, 33, 128] {
                let (parts, _) = case.run(kernel, 0, batch);
                assert!(parts == whole, "{} {batch}", kernel.name());
            }
        }
    }
}

/// Where every key is chosen, sums are those of dense attention; chosen keys are weighted in longer frames.
#[test]
fn all_keys_chosen_are_dense_attention() {
    let mut random = Random::new(26);
    let case = Case::random(64, 3, 400, KvType::F16, &mut random);
    let dense = Case { most: 0, ..case };
    let all = Case {
        chosen: Some((0..400).map(|position| (0..=position).collect()).collect()),
        ..dense.clone()
    };
    for kernel in kernels() {
        let [dense, all] = [&dense, &all].map(|case| case.run(kernel, 0, 400).0);
        let differs = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-5;
        assert!(!dense.iter().zip(&all).any(differs), "{}", kernel.name());
    }
}

#[test]
fn differences_and_choices_are_their_definitions_on_keys_of_a_model() {
    let mut random = Random::new(27);
    for of in recorded::record(420) {
        let case = Case::recorded(&of, 0.7, &mut random);
        let (held, changes) = case.held();
        // It must be a case: much is held, not all of it, and something is off.
        let share = changes.iter().sum::<usize>() as f64 / held.len() as f64;
        assert!((0.1..0.9).contains(&share), "{share}");
        assert!(held != case.keys);
        let chosen = Case {
            chosen: Some(of.chosen.clone()),
            most: 0,
            ..case.clone()
        };
        assert!(of.chosen[419].len() < 300);
        for kernel in kernels() {
            case.check(kernel, 300, 120);
            chosen.check(kernel, 300, 120);
        }
    }
}

/// What the differences of a model's keys cost and save, for `break_even`: run it on an idle machine.
#[test]
#[ignore = "a measurement"]
fn time_of_differences() {
    const THRESHOLDS: [f32; 10] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.4, 2.0];
    let n_keys = 2048;
    let mut random = Random::new(28);
    let all = recorded::record(n_keys);
    for (_, kernel) in vector_rows(table::ATTEND_LANES) {
        // Dense; what is not products of keys, where nothing changes but first keys of frames; each threshold.
        let mut seconds = [0.0; THRESHOLDS.len() + 2];
        let mut changed = [0.0; THRESHOLDS.len() + 2];
        for of in &all {
            let mut case = |threshold, most| Case {
                most,
                ..Case::recorded(of, threshold, &mut random)
            };
            let mut cases = vec![case(0.0, 0), case(f32::MAX, usize::MAX)];
            cases.extend(THRESHOLDS.map(|threshold| case(threshold, usize::MAX)));
            let mut best = [f64::INFINITY; THRESHOLDS.len() + 2];
            // In turns: the machine may be faster now than then.
            for _ in 0..20 {
                for (i, case) in cases.iter().enumerate() {
                    let begin = std::time::Instant::now();
                    let (out, done) = case.run(kernel, n_keys - 126, 126);
                    best[i] = best[i].min(begin.elapsed().as_secs_f64());
                    assert!(out.iter().all(|x| x.is_finite()));
                    let share = done.changes as f64 / done.elements.max(1) as f64;
                    changed[i] += share / (20 * all.len()) as f64;
                }
            }
            for (sum, best) in seconds.iter_mut().zip(best) {
                *sum += best;
            }
        }
        println!("{}: heads of {} layers", kernel.name(), all.len());
        for (i, threshold) in THRESHOLDS.iter().enumerate() {
            println!(
                "threshold {threshold}: {:.0} % change; attention {:.2}, scores {:.2} of dense time",
                100.0 * changed[i + 2],
                seconds[i + 2] / seconds[0],
                (seconds[i + 2] - seconds[1]) / (seconds[0] - seconds[1])
            );
        }
    }
}
