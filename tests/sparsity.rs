//! Policies: what they choose against a slow definition of it, on the queries and keys of a real model, and that sessions
//! with one stay exact.

#[path = "common/boundaries.rs"]
mod boundaries;
#[path = "common/models.rs"]
mod models;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use kinglet::backend::cpu::Cpu;
use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::delta::{Delta, Exact, Factors};
use kinglet::backend::predictor::{Predictor, Shape};
use kinglet::backend::select::{Ask, Chunking, KvOptions, LABEL_AHEAD, LABEL_EVERY, Plan, Select};
use kinglet::backend::{Backend, KvType, Step};
use kinglet::gguf::Gguf;
use kinglet::model::{self, Network, Pass};
use kinglet::sampler::Rng;
use kinglet::session::{Extra, Plan as MemoryPlan, calibration, chunks};
use kinglet::sparsity::{Heads, Layers, Policy, Repair, Sparsity};
use kinglet::{Error, LoadOptions, Model, Session, SessionOptions};

use self::models::{at, real_model};

/// A real model that reads while somebody chooses its keys.
struct Read {
    cpu: Cpu,
    network: Box<dyn Network<Cpu>>,
    /// Of keys so wide, with any parameters.
    predictor: Arc<Predictor>,
}

impl Read {
    fn open() -> Self {
        let gguf = Gguf::open(&real_model()).expect("a model");
        let cpu = Cpu::new(Arc::new(Pool::new(2).expect("threads")));
        let network = model::load(&gguf, &cpu, &kinglet::Cancel::default()).expect("a network");
        let config = network.config();
        let shape = Shape {
            width: config.n_kv_heads.iter().max().expect("layers") * config.head_dim,
            n_heads: 4,
            n_hidden: 40,
        };
        let mut rng = Rng::new(3);
        let params = (0..shape.n_params()).map(|_| (rng.next_f64() - 0.5) as f32 * 0.2);
        let predictor = Arc::new(Predictor::new(0, shape, params.collect()));
        Self {
            cpu,
            network,
            predictor,
        }
    }

    /// All of `tokens` in one pass.
    /// What is seen of a text with chunks that end so.
    fn watch(&mut self, tokens: &[u32], chunking: Chunking) -> Watcher {
        let watcher = Arc::new(Watcher {
            chunking,
            n: tokens.len(),
            queries: Mutex::default(),
            layers: Mutex::default(),
        });
        self.read(tokens, watcher.clone());
        Arc::into_inner(watcher).expect("nobody else has it")
    }

    fn read(&mut self, tokens: &[u32], select: Arc<dyn Select>) {
        let options = KvOptions {
            select: Some(select),
            predictor: Some(self.predictor.clone()),
            ..KvOptions::default()
        };
        let mut state = self.network.state(&self.cpu, &options);
        state.reserve(&self.cpu, 0..tokens.len()).expect("room");
        let pass = Pass {
            tokens,
            input: None,
            start: 0,
            output: model::Output::Logits,
            output_from: tokens.len(),
            step: Step::Prefill,
            write_kv: true,
            follows: false,
        };
        self.cpu.begin(Step::Prefill);
        let none = self.network.forward(&mut self.cpu, &mut state, &pass);
        assert!(none.is_none());
        self.cpu.flush().expect("computed");
    }
}

fn dhsa(chunking: Chunking, heads: Heads) -> Policy {
    Policy::Dhsa { chunking, heads }
}

/// Every policy with a budget of `n`.
fn policies(n: usize) -> Vec<Sparsity> {
    let policies = [
        Policy::Window,
        Policy::Blocks,
        dhsa(Chunking::Fixed(16), Heads::Each),
        dhsa(Chunking::Fixed(16), Heads::Shared),
        dhsa(Chunking::Shift(16), Heads::Each),
        dhsa(Chunking::Fixed(16), Heads::Vote),
        dhsa(Chunking::Fixed(8), Heads::Best),
        dhsa(Chunking::Labels(8), Heads::Best),
        dhsa(Chunking::Predict(12), Heads::Best),
    ];
    let with_local = |policy| Sparsity {
        local: 40,
        ..Sparsity::new(policy, n)
    };
    // And a share of what is seen, in all layers but two, of which the second has attention in every model here.
    let share = |policy| Sparsity {
        per_cent: 70,
        dense_layers: "0,2".parse().expect("layers"),
        ..with_local(policy)
    };
    let shares = [Policy::Window, Policy::Blocks, policies[6]].map(share);
    // And means of what is left out.
    let pooled = |policy| Sparsity {
        repair: Repair::Pooled,
        ..with_local(policy)
    };
    let means = [policies[2], policies[4], policies[6]].map(pooled);
    // And differences of a token in 24, some of them in layers that are not dense.
    let corrected = |sparsity| Sparsity {
        repair: Repair::Delta(24),
        ..sparsity
    };
    let differences = [with_local(policies[0]), share(policies[6])].map(corrected);
    let plain = policies.into_iter().map(with_local);
    let repaired = means.into_iter().chain(differences);
    plain.chain(shares).chain(repaired).collect()
}

/// Asks a policy and compares the answer with the definition.
#[derive(Debug)]
struct Checked {
    sparsity: Sparsity,
    n_asked: AtomicUsize,
    broken: Mutex<Vec<String>>,
}

impl Select for Checked {
    fn is_for(&self, layer: usize) -> bool {
        self.sparsity.is_for(layer)
    }

    fn pools(&self) -> bool {
        self.sparsity.pools()
    }

    fn chunking(&self) -> Option<Chunking> {
        self.sparsity.chunking()
    }

    fn sees_all(&self, position: usize, seen: &Range<usize>) -> bool {
        self.sparsity.sees_all(position, seen)
    }

    fn budget(&self, n_seen: usize) -> usize {
        self.sparsity.budget(n_seen)
    }

    fn sums_queries(&self) -> bool {
        self.sparsity.sums_queries()
    }

    fn select(&self, ask: &Ask, plan: &mut Plan) {
        self.sparsity.select(ask, plan);
        self.n_asked.fetch_add(1, Ordering::Relaxed);
        if let Err(what) = check(&self.sparsity, ask, &plan.spans) {
            let what = format!("{}, position {}: {what}", self.sparsity, ask.position);
            self.broken.lock().expect("no panic before").push(what);
        }
    }
}

/// That `spans` are what the policy's definition says, up to scores that are equal within rounding.
fn check(sparsity: &Sparsity, ask: &Ask, spans: &[Range<usize>]) -> Result<(), String> {
    if spans.iter().any(|span| span.is_empty()) || spans.windows(2).any(|w| w[0].end >= w[1].start)
    {
        return Err(format!("out of order or not apart: {spans:?}"));
    }
    let chosen: BTreeSet<usize> = spans.iter().cloned().flatten().collect();
    let n = ask.seen.end;
    let budget = sparsity.budget_of(n);
    let needed = |keys: Range<usize>| match keys.clone().find(|j| !chosen.contains(j)) {
        Some(j) => Err(format!(
            "key {j} is missing, of {keys:?} that must be there"
        )),
        None => Ok(()),
    };
    if chosen.last() != Some(&(n - 1)) {
        return Err("a query must see itself and nothing later".into());
    }
    let (units, n_read): (Vec<(Range<usize>, f64)>, RangeExact) = match sparsity.policy {
        Policy::Dense => return Err("nobody asks".into()),
        Policy::Window => {
            needed(0..sparsity.sink)?;
            needed(n - (budget - sparsity.sink)..n)?;
            (Vec::new(), (budget, budget))
        }
        Policy::Blocks => {
            let end = (n - sparsity.local) / 64;
            needed(0..64)?;
            needed(end * 64..n)?;
            let units = (1..end).map(|b| (b * 64..b * 64 + 64, block_score(ask, b)));
            (units.collect(), (budget - 63, budget))
        }
        Policy::Dhsa { heads, .. } => {
            let known = ask.chunks.n_known(n);
            let chunks = &ask.chunks.chunks()[..known];
            let complete = chunks.last().expect("some").end as usize;
            let local = (n - sparsity.local).min(complete);
            needed(0..sparsity.sink)?;
            needed(local..n)?;
            let local_chunks = chunks.partition_point(|c| (c.start as usize) < local);
            let unit = |(i, chunk): (usize, &kinglet::backend::select::Chunk)| {
                let keys = chunk.start as usize..chunk.end as usize;
                let keys = keys.start.max(sparsity.sink)..keys.end.min(local);
                (!keys.is_empty()).then(|| (keys, chunk_score(ask, heads, i, local_chunks)))
            };
            let units = chunks.iter().enumerate().filter_map(unit);
            (units.collect(), (budget, budget))
        }
    };
    if !(n_read.0..=n_read.1).contains(&chosen.len()) {
        return Err(format!("{} keys, expected {n_read:?}", chosen.len()));
    }
    // Whole units from the best on, of the last the beginning.
    let mut worst_read = f64::INFINITY;
    let mut best_left = f64::NEG_INFINITY;
    let mut n_cut = 0;
    for (keys, score) in &units {
        let read = keys.clone().filter(|j| chosen.contains(j)).count();
        if read > 0 {
            worst_read = worst_read.min(*score);
        }
        if read < keys.len() {
            best_left = best_left.max(*score);
        }
        if read > 0 && read < keys.len() {
            n_cut += 1;
            needed(keys.start..keys.start + read)?;
        }
    }
    let tolerance = 1e-4 * best_left.abs().max(1e-6);
    if n_cut > 1 || worst_read < best_left - tolerance {
        return Err(format!(
            "read one of score {worst_read}, left one of {best_left}; {n_cut} cut"
        ));
    }
    Ok(())
}

type RangeExact = (usize, usize);

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn doubles(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// The mean over heads of queries times the mean over heads of (mean of keys) times `sqrt(n)`; for votes the softmax of
/// that over `n_chunks`, of single queries; for the best query its distance from the query's best of `n_chunks`.
fn chunk_score(ask: &Ask, heads: Heads, i: usize, n_chunks: usize) -> f64 {
    let shape = ask.attention;
    let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let own = ask.kv_head * group..(ask.kv_head + 1) * group;
    let score = |h: usize, i: usize| {
        let q = doubles(&ask.q[h * n..][..n]);
        let sum = doubles(&ask.chunks.sums(ask.kv_head)[i * n..][..n]);
        let n_keys = ask.chunks.chunks()[i].n_keys() as f64;
        dot(&q, &sum) / n_keys.sqrt() * f64::from(shape.scale)
    };
    if heads == Heads::Vote {
        let weight = |h: usize, i: usize| score(h, i).exp();
        let vote = |h| weight(h, i) / (0..n_chunks).map(|i| weight(h, i)).sum::<f64>();
        return own.map(vote).sum();
    }
    if heads == Heads::Best {
        let best = |h| {
            let scores = (0..n_chunks).map(|i| score(h, i));
            scores.fold(f64::NEG_INFINITY, f64::max)
        };
        let below = own.map(|h| score(h, i) - best(h));
        return below.fold(f64::NEG_INFINITY, f64::max);
    }
    let (q_heads, kv_heads) = match heads {
        Heads::Each => (
            ask.kv_head * group..(ask.kv_head + 1) * group,
            ask.kv_head..ask.kv_head + 1,
        ),
        Heads::Shared | Heads::Vote | Heads::Best => (0..shape.n_heads, 0..shape.n_kv_heads),
    };
    let mean = |rows: Vec<Vec<f64>>| -> Vec<f64> {
        let sum = |c: usize| rows.iter().map(|row| row[c]).sum::<f64>();
        (0..n).map(|c| sum(c) / rows.len() as f64).collect()
    };
    let q = mean(q_heads.map(|h| doubles(&ask.q[h * n..][..n])).collect());
    let k = mean(
        kv_heads
            .map(|h| doubles(&ask.chunks.sums(h)[i * n..][..n]))
            .collect(),
    );
    let n_keys = ask.chunks.chunks()[i].n_keys() as f64;
    dot(&q, &k) / n_keys * n_keys.sqrt()
}

/// The best, of the pooled keys that reach into block `b`, of the probabilities summed over heads.
fn block_score(ask: &Ask, b: usize) -> f64 {
    let shape = ask.attention;
    let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
    let sums = ask.chunks.sums(ask.kv_head);
    // Means are looked at that end where blocks end before the last keys, or one step later.
    let end = (ask.seen.end - 40) / 64;
    let n_means = ask.chunks.n_known(ask.seen.end).min(end * 4 + 1) - 1;
    let mut total = vec![0.0; n_means];
    for h in ask.kv_head * group..(ask.kv_head + 1) * group {
        let q = doubles(&ask.q[h * n..][..n]);
        let mean = |i: usize| {
            let sum = doubles(&sums[i * n..][..2 * n]);
            let pooled: Vec<f64> = (0..n).map(|c| (sum[c] + sum[n + c]) / 32.0).collect();
            (dot(&q, &pooled) * f64::from(shape.scale)).exp()
        };
        let weights: Vec<f64> = (0..n_means).map(mean).collect();
        let sum: f64 = weights.iter().sum();
        total
            .iter_mut()
            .zip(weights)
            .for_each(|(t, w)| *t += w / sum);
    }
    let reach = (b * 4 - 1)..(b * 4 + 4).min(n_means);
    total[reach]
        .iter()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max)
}

/// Tokens without a meaning, but with repeats, as text has them.
fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32)
        .map(|i| 40 + (i * i / 7 + i % 13) % 250)
        .collect()
}

#[test]
fn policies_choose_what_their_definitions_say_on_a_real_model() {
    let mut model = Read::open();
    let tokens = tokens(420);
    for sparsity in policies(256) {
        let checked = Arc::new(Checked {
            sparsity,
            n_asked: AtomicUsize::new(0),
            broken: Mutex::default(),
        });
        model.read(&tokens, checked.clone());
        // Positions 256 to 419, in each layer that is not dense and for each head of keys.
        let n_kv_heads = model.network.config().n_kv_heads.iter().enumerate();
        let sparse = n_kv_heads.filter(|(layer, _)| !sparsity.dense_layers.contains(*layer));
        let n_heads: usize = sparse.map(|(_, n)| n).sum();
        assert_eq!(checked.n_asked.load(Ordering::Relaxed), 164 * n_heads);
        let broken = checked.broken.lock().expect("no panic before");
        assert!(broken.is_empty(), "{} of them: {}", broken.len(), broken[0]);
    }
}

/// The chunks of a layer, and for each head of keys their sums.
type Watched = (Vec<Range<usize>>, Vec<Vec<f32>>);

/// Reads everything, and writes down queries of one token in [`LABEL_EVERY`], `(n_heads, head_dim)`, and of each layer after
/// `n` tokens the chunks and the sums of keys, `(n_kv_heads, n_chunks, head_dim)`.
#[derive(Debug)]
struct Watcher {
    chunking: Chunking,
    n: usize,
    queries: Mutex<BTreeMap<(usize, usize), Vec<f32>>>,
    layers: Mutex<BTreeMap<usize, Watched>>,
}

impl Select for Watcher {
    fn chunking(&self) -> Option<Chunking> {
        Some(self.chunking)
    }

    fn sees_all(&self, _: usize, _: &Range<usize>) -> bool {
        false
    }

    fn budget(&self, n_seen: usize) -> usize {
        n_seen
    }

    fn sums_queries(&self) -> bool {
        false
    }

    fn select(&self, ask: &Ask, plan: &mut Plan) {
        plan.push(ask.seen.clone());
        if ask.kv_head > 0 {
            return;
        }
        if ask.position.is_multiple_of(LABEL_EVERY) {
            let mut queries = self.queries.lock().expect("no panic before");
            queries.insert((ask.layer, ask.position), ask.q.to_vec());
        }
        if ask.position + 1 == self.n {
            let known = &ask.chunks.chunks()[..ask.chunks.n_known(self.n)];
            let chunks = known.iter().map(|c| c.start as usize..c.end as usize);
            let sums = (0..ask.attention.n_kv_heads).map(|head| ask.chunks.sums(head).to_vec());
            let mut layers = self.layers.lock().expect("no panic before");
            layers.insert(ask.layer, (chunks.collect(), sums.collect()));
        }
    }
}

/// Where chunks end by how later queries attend, against the definition in double precision, on a real model.
#[test]
fn chunks_end_where_the_attention_of_later_queries_changes() {
    let mut model = Read::open();
    let (config, tokens) = (model.network.config().clone(), tokens(420));
    let mut watch = |chunking| model.watch(&tokens, chunking);
    let of_keys = watch(Chunking::Fixed(1));
    let queries = of_keys.queries.into_inner().expect("no panic");
    let keys = of_keys.layers.into_inner().expect("no panic");
    let (n, n_heads) = (config.head_dim, config.n_heads);
    // `[j]` of the mean over heads of the softmax of the query at `i`.
    let attention = |layer: usize, i: usize| {
        let q = &queries[&(layer, i)];
        let mut row = vec![0.0; i + 1];
        for h in 0..n_heads {
            let keys = &keys[&layer].1[h * keys[&layer].1.len() / n_heads];
            let q = doubles(&q[h * n..][..n]);
            let score = |j: usize| dot(&q, &doubles(&keys[j * n..][..n])) / (n as f64).sqrt();
            let weights: Vec<f64> = (0..=i).map(|j| score(j).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let means = row.iter_mut().zip(&weights);
            means.for_each(|(mean, w)| *mean += w / sum / n_heads as f64);
        }
        row
    };
    let of_chunks = watch(Chunking::Labels(16));
    let mut n_off = 0;
    for (layer, (chunks, _)) in of_chunks.layers.into_inner().expect("no panic") {
        assert!(chunks.len() >= 420 / 24 - 5, "{chunks:?}");
        let samples = (0..420).step_by(LABEL_EVERY);
        let rows: Vec<(usize, Vec<f64>)> = samples.map(|i| (i, attention(layer, i))).collect();
        let mut at = 0;
        for chunk in chunks {
            assert_eq!(chunk.start, at);
            at = chunk.end;
            let ratio = |end: usize| {
                let seen = chunk.start + 24 + 4 + LABEL_AHEAD;
                let later = rows.iter().filter(|(i, _)| (end + 3..seen).contains(i));
                let (mut past, mut future) = (1e-6, 1e-6);
                for (_, row) in later {
                    past += row[end - 4..end].iter().sum::<f64>();
                    future += row[end..end + 4].iter().sum::<f64>();
                }
                f64::max(past, future) / f64::min(past, future)
            };
            let ends = chunk.start + 8..=chunk.start + 24;
            assert!(ends.contains(&chunk.end));
            let best = ends.clone().map(ratio).fold(0.0, f64::max);
            assert!(ratio(chunk.end) > 0.999 * best, "layer {layer}, {chunk:?}");
            n_off += usize::from(chunk.len() != 16);
        }
    }
    assert!(n_off > 100, "most are not of the middle length: {n_off}");
}

/// Where chunks end by a predictor, against its definition in double precision, on the keys of a real model.
#[test]
fn chunks_end_where_a_predictor_says() {
    let mut model = Read::open();
    let tokens = tokens(300);
    let mut watch = |chunking| {
        let watcher = model.watch(&tokens, chunking);
        watcher.layers.into_inner().expect("no panic")
    };
    let of_keys = watch(Chunking::Fixed(1));
    let of_chunks = watch(Chunking::Predict(16));
    let shape = model.predictor.shape();
    let parts = shape.split(model.predictor.params()).map(doubles);
    let head_dim = model.network.config().head_dim;
    let mut n_off = 0;
    for (layer, (chunks, _)) in of_chunks {
        assert!(chunks.len() >= 300 / 24 - 1, "{chunks:?}");
        let key = |j: usize| {
            let heads = of_keys[&layer].1.iter();
            let heads = heads.map(|keys| doubles(&keys[j * head_dim..][..head_dim]));
            heads.collect::<Vec<_>>().concat()
        };
        let keys: Vec<Vec<f64>> = (0..300).map(key).collect();
        let mut at = 0;
        for chunk in chunks {
            assert_eq!(chunk.start, at);
            at = chunk.end;
            let logit =
                |end: usize| boundaries::logit(shape.n_heads, &parts, &keys[end - 4..end + 4]);
            let ends = chunk.start + 8..=chunk.start + 24;
            assert!(ends.contains(&chunk.end));
            let best = ends.clone().map(logit).fold(f64::NEG_INFINITY, f64::max);
            let found = logit(chunk.end);
            assert!(
                found > best - 1e-3,
                "layer {layer}, {chunk:?}: {found}, best {best}"
            );
            n_off += usize::from(chunk.len() != 16);
        }
    }
    assert!(n_off > 30, "most are not of the middle length: {n_off}");
}

fn tiny() -> Model {
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    };
    Model::load(&at("tests/data/lfm2-tiny-random.gguf"), &options).expect("a model")
}

/// Heads of 64, which kernels with vectors take.
fn small() -> Model {
    let model = Model::load(&at("models/lfm2-smol-Q4_0.gguf"), &LoadOptions::default());
    model.expect("a model of this repository")
}

/// A predictor of a model, from so many tokens.
fn predictor(model: &Model, n: usize) -> Arc<Predictor> {
    let go = &mut |_, _| ControlFlow::Continue(());
    let trained = chunks::train(model, &tokens(n), go).expect("a predictor");
    Arc::new(trained.predictor)
}

/// With a predictor of the tiny model where chunks end by one.
fn options_for(sparsity: Sparsity) -> SessionOptions {
    static OF_TINY: OnceLock<Arc<Predictor>> = OnceLock::new();
    let predicts = matches!(
        sparsity.policy,
        Policy::Dhsa {
            chunking: Chunking::Predict(_),
            ..
        }
    );
    SessionOptions {
        sparsity,
        predictor: predicts.then(|| OF_TINY.get_or_init(|| predictor(&tiny(), 300)).clone()),
        ..SessionOptions::default()
    }
}

/// Each policy with a budget of 256, and differences of keys, which are summed although that does not pay.
fn kinds_of_attention() -> Vec<SessionOptions> {
    let sparse = policies(256).into_iter().map(options_for);
    let delta = |exact, frame| SessionOptions {
        delta: Some(Arc::new(Delta {
            exact,
            frame,
            always: true,
            ..Delta::new(0.5)
        })),
        ..SessionOptions::default()
    };
    let deltas = [delta(Exact::Last(70), 32), delta(Exact::Block(100), 64)];
    sparse.chain(deltas).collect()
}

fn session(model: &Model, sparsity: Sparsity, batch: usize) -> Session {
    session_of(model, &options_for(sparsity), batch)
}

fn session_of(model: &Model, options: &SessionOptions, batch: usize) -> Session {
    let options = SessionOptions {
        n_ctx: 700,
        batch,
        ..options.clone()
    };
    Session::new(model, &options).expect("a session")
}

fn prefill(session: &mut Session, tokens: &[u32]) {
    let go = &mut |_, _| ControlFlow::Continue(());
    session.prefill(tokens, go).expect("tokens that fit");
}

fn decode(session: &mut Session, tokens: &[u32]) {
    for token in tokens {
        session.decode(*token).expect("a token that fits");
    }
}

#[test]
fn a_budget_as_long_as_the_text_is_dense_to_the_bit() {
    let model = tiny();
    let tokens = tokens(450);
    let run = |sparsity| {
        let mut session = session(&model, sparsity, 128);
        prefill(&mut session, &tokens[..400]);
        decode(&mut session, &tokens[400..]);
        (session.logits().to_vec(), session.work())
    };
    let (dense, _) = run(Sparsity::default());
    for budget in [450, 1000] {
        for sparsity in policies(budget) {
            let (logits, work) = run(sparsity);
            assert!(logits == dense, "{sparsity}");
            // Queries that tell where chunks end read once more.
            match sparsity.policy {
                Policy::Dhsa {
                    chunking: Chunking::Labels(_),
                    ..
                } => assert!(work.pairs < work.pairs_read),
                _ => assert_eq!(work.pairs, work.pairs_read),
            }
        }
    }
    // Below that something is left out, and it matters.
    for sparsity in policies(256) {
        let (logits, work) = run(sparsity);
        assert!(logits != dense, "{sparsity}");
        assert!(work.pairs_read < work.pairs);
        let all_dense = Sparsity {
            dense_from: Some(256),
            ..sparsity
        };
        assert!(run(all_dense).0 == dense, "{all_dense}");
    }
}

#[test]
fn sessions_with_a_policy_are_exact() {
    let (tiny, small) = (tiny(), small());
    let tokens = tokens(600);
    let folder = std::env::temp_dir().join(format!("kinglet-sparsity-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let all = kinds_of_attention();
    let deltas = all.iter().filter(|options| options.delta.is_some());
    let runs = all.iter().map(|options| (options, &tiny));
    for (options, model) in runs.chain(deltas.map(|options| (options, &small))) {
        let attention = options.attention();
        // 500 read, 20 decoded, 40 read: what any way there must give.
        let mut straight = session_of(model, options, 512);
        prefill(&mut straight, &tokens[..500]);
        decode(&mut straight, &tokens[500..520]);
        prefill(&mut straight, &tokens[520..560]);
        let expected = straight.logits().to_vec();

        let same = |session: &Session, what: &str| {
            assert!(session.logits() == expected, "{attention}: {what}");
        };
        let mut other = session_of(model, options, 37);
        prefill(&mut other, &tokens[..500]);
        decode(&mut other, &tokens[500..520]);
        prefill(&mut other, &tokens[520..560]);
        same(&other, "batches");

        // Beyond, back to several places, and on, in the middle of chunks and of what was read at once.
        for back in [555, 519, 511, 470, 271, 130] {
            prefill(&mut other, &tokens[..30]);
            other.truncate(back).expect("a shorter session");
            if back < 500 {
                prefill(&mut other, &tokens[back..500]);
            }
            if back < 520 {
                decode(&mut other, &tokens[back.max(500)..520]);
            }
            prefill(&mut other, &tokens[back.max(520)..560]);
            same(&other, "back and on");
        }

        // Apart: the other side writes other tokens, and neither sees what the other does.
        let mut base = session_of(model, options, 100);
        prefill(&mut base, &tokens[..500]);
        let mut fork = base.fork().expect("a fork");
        prefill(&mut fork, &tokens[..100]);
        decode(&mut base, &tokens[500..520]);
        fork.truncate(500).expect("a shorter session");
        decode(&mut fork, &tokens[500..520]);
        for session in [&mut base, &mut fork] {
            prefill(session, &tokens[520..560]);
            same(session, "apart");
        }

        // To disk and back; as another policy's it is refused.
        let mut saved = session_of(model, options, 100);
        prefill(&mut saved, &tokens[..500]);
        decode(&mut saved, &tokens[500..509]);
        let path = folder.join("it.state");
        saved.save(&path, &Extra::default()).expect("saved");
        let mut loaded = Session::load(model, &path, &saved.options()).expect("loaded");
        decode(&mut loaded, &tokens[509..520]);
        prefill(&mut loaded, &tokens[520..560]);
        same(&loaded, "saved and loaded");
        let other = Sparsity::new(Policy::Window, 257);
        let with = |sparsity, delta, predictor: &Option<_>| SessionOptions {
            sparsity,
            delta,
            predictor: predictor.clone(),
            ..saved.options()
        };
        let mut others = vec![
            with(Sparsity::default(), None, &None),
            with(other, options.delta.clone(), &None),
            with(
                options.sparsity,
                Some(Arc::new(Delta::new(0.25))),
                &options.predictor,
            ),
        ];
        if options.predictor.is_some() {
            let another = Some(predictor(model, 280));
            others.push(with(options.sparsity, None, &another));
        }
        for options in others {
            let error = Session::load(model, &path, &options)
                .err()
                .expect("refused");
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
            assert!(error.to_string().contains(&options.attention()), "{error}");
            let other = Session::new(model, &options)
                .expect("a session")
                .restore(&saved.snapshot().expect("a snapshot"));
            assert!(matches!(other, Err(Error::Invalid(_))));
        }
    }
    std::fs::remove_dir_all(&folder).expect("the folder");
}

/// Differences above nothing are all of it; where everything is near, nothing is left out; and with a threshold something
/// is, of which there is an account.
#[test]
fn differences_above_nothing_are_dense_attention() {
    let model = small();
    let tokens = tokens(450);
    let run = |delta: Option<Delta>| {
        let options = SessionOptions {
            delta: delta.map(Arc::new),
            ..SessionOptions::default()
        };
        let mut session = session_of(&model, &options, 128);
        prefill(&mut session, &tokens[..400]);
        decode(&mut session, &tokens[400..]);
        (session.logits().to_vec(), session.work().delta)
    };
    let with = |rate, exact, always| Delta {
        exact,
        always,
        ..Delta::new(rate)
    };
    let (dense, none) = run(None);
    assert_eq!(none.sparsity(), None);
    let (zero, _) = run(Some(Delta::new(0.0)));
    assert!(zero == dense);
    let (near, work) = run(Some(with(1.0, Exact::Last(500), false)));
    assert!(near == dense && work.far == 0 && work.done == work.dense);
    let (summed, work) = run(Some(with(0.0, Exact::Last(64), true)));
    assert!(work.far > 0 && work.elements > 0);
    let off = summed.iter().zip(&dense).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    // Sums in another order, rounded to 8 bits between layers.
    assert!(off < 0.5, "{off}");
    let (saved, work) = run(Some(with(1.0, Exact::Last(64), true)));
    assert!(saved != dense);
    let saved = work.sparsity().expect("something was compared");
    assert!(saved.unchanged > saved.published && saved.published > 0.0);
    assert!(saved.products > 0.0 && saved.attention == saved.products / 2.0);
    assert!(work.done < work.dense && work.far < work.dense && work.changes < work.elements);
}

#[test]
fn deltas_out_of_range_are_refused() {
    let model = tiny();
    let good = Delta::new(1.0);
    let factors = |model, n| {
        Some(Arc::new(Factors {
            model,
            layers: vec![vec![1.0; n]; 3],
            hash: 0,
        }))
    };
    for (bad, what) in [
        (
            Delta {
                rate: f32::NAN,
                ..good.clone()
            },
            "threshold",
        ),
        (
            Delta {
                rate: -1.0,
                ..good.clone()
            },
            "threshold",
        ),
        (
            Delta {
                frame: 48,
                ..good.clone()
            },
            "frame",
        ),
        (
            Delta {
                exact: Exact::Last(0),
                ..good.clone()
            },
            "exact keys",
        ),
        (
            Delta {
                exact: Exact::Block(0),
                ..good.clone()
            },
            "exact keys",
        ),
        (
            Delta {
                factors: factors(7, 8),
                ..good.clone()
            },
            "another",
        ),
    ] {
        let options = SessionOptions {
            delta: Some(Arc::new(bad)),
            ..SessionOptions::default()
        };
        let error = Session::new(&model, &options).err().expect("refused");
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
}

/// Thresholds of a text: written, read, taken by their model and by no other.
#[test]
fn calibrated_thresholds_belong_to_their_model() {
    let model = small();
    let tokens = tokens(300);
    let go = &mut |_, _| ControlFlow::Continue(());
    let made = calibration::calibrate(&model, &tokens, go).expect("thresholds");
    let config = &model.info().config;
    for (i, layer) in made.layers.iter().enumerate() {
        assert_eq!(layer.len(), config.n_kv_heads[i] * config.head_dim);
        assert!(
            layer
                .iter()
                .all(|factor| factor.is_finite() && *factor >= 0.0)
        );
    }
    let path = std::env::temp_dir().join(format!("kinglet-delta-{}.json", std::process::id()));
    calibration::write(&made, &path).expect("written");
    let read = calibration::read(&path).expect("read");
    assert_eq!((read.model, &read.layers), (made.model, &made.layers));
    let options = SessionOptions {
        delta: Some(Arc::new(Delta {
            factors: Some(Arc::new(read)),
            always: true,
            ..Delta::new(1.0)
        })),
        ..SessionOptions::default()
    };
    let mut session = session_of(&model, &options, 128);
    prefill(&mut session, &tokens);
    let saved = session.work().delta.sparsity().expect("something");
    // On the same text, but for first keys of frames.
    let expected = calibration::UNCHANGED;
    assert!(
        (saved.unchanged - expected).abs() < 0.03,
        "{}",
        saved.unchanged
    );
    let error = Session::new(&tiny(), &options).err().expect("refused");
    assert!(error.to_string().contains("another"), "{error}");
    // A plan needs the header alone, which tells no model from another of its shape.
    let outline = Model::outline(&at("models/lfm2-smol-Q4_0.gguf"), &LoadOptions::default());
    MemoryPlan::new(&outline.expect("a header"), &options, 300).expect("a plan");
    for bad in [
        "",
        "{}",
        r#"{"kinglet":"delta thresholds 1","model":"x","layers":[]}"#,
        r#"{"kinglet":"delta thresholds 1","model":"1","layers":[[-1.0]]}"#,
        r#"{"kinglet":"else","model":"1","layers":[[1.0]]}"#,
    ] {
        std::fs::write(&path, bad).expect("written");
        assert!(
            matches!(calibration::read(&path), Err(Error::BadFile { .. })),
            "{bad}"
        );
    }
    std::fs::remove_file(&path).expect("the file");
}

/// A predictor of a text: written, read, taken by its model and by no other.
#[test]
fn a_trained_predictor_belongs_to_its_model() {
    let model = small();
    let made = predictor(&model, 300);
    assert!(made == predictor(&model, 300), "the same each time");
    assert!(made != predictor(&model, 290));
    let path = std::env::temp_dir().join(format!("kinglet-chunks-{}.gguf", std::process::id()));
    chunks::write(&made, &path).expect("written");
    let read = Arc::new(chunks::read(&path).expect("read"));
    assert_eq!((&read, read.params()), (&made, made.params()));
    let sparsity = Sparsity::new(dhsa(Chunking::Predict(8), Heads::Best), 256);
    let options = SessionOptions {
        sparsity,
        predictor: Some(read.clone()),
        ..SessionOptions::default()
    };
    prefill(&mut session_of(&model, &options, 128), &tokens(300));
    let refused = |model: &Model, options: &SessionOptions, what: &str| {
        let error = Session::new(model, options).err().expect("refused");
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    };
    refused(&tiny(), &options, "found one for another");
    let of_shape = |n_kv_heads: usize| {
        let shape = Shape {
            width: n_kv_heads * model.info().config.head_dim,
            ..read.shape()
        };
        Arc::new(Predictor::new(
            read.model,
            shape,
            vec![0.0; shape.n_params()],
        ))
    };
    let with = |sparsity, predictor| SessionOptions {
        sparsity,
        predictor,
        ..SessionOptions::default()
    };
    refused(&model, &with(sparsity, Some(of_shape(9))), "found 576");
    refused(&model, &with(sparsity, None), "found none");
    let dense = Sparsity::default();
    refused(&model, &with(dense, Some(read.clone())), "found dense");
    let error = sparsity.rule().expect_err("no device runs it");
    assert!(error.to_string().contains("predict:8"), "{error}");
    // A plan needs the header alone, which tells no model from another of its shape.
    let outline = Model::outline(&at("models/lfm2-smol-Q4_0.gguf"), &LoadOptions::default());
    MemoryPlan::new(&outline.expect("a header"), &options, 300).expect("a plan");

    // What is no such file.
    let whole = std::fs::read(&path).expect("the file");
    let bad = |bytes: &[u8], what: &str| {
        std::fs::write(&path, bytes).expect("written");
        let error = chunks::read(&path).expect_err("refused");
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains("kinglet-chunks") && text.contains(what),
            "{text}"
        );
    };
    // The last number lies before 28 zeros that nobody reads.
    for n in [0, 3, 30, 200, whole.len() / 2, whole.len() - 30] {
        bad(&whole[..n], "expected");
    }
    let changed = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from);
        let mut bytes = whole.clone();
        bytes[at.expect("in the file")..][..to.len()].copy_from_slice(to);
        bytes
    };
    bad(
        &changed(b"dhsa-predictor", b"dhsa-predicted"),
        "found dhsa-predicted",
    );
    bad(&changed(b"dhsa.model", b"dhsa.m0del"), "dhsa.model");
    bad(
        &changed(b"norm.bias", b"n0rm.bias"),
        "norm.bias: expected one, found none",
    );
    // The number of heads follows its key and its type.
    let heads = |n: u8| {
        changed(
            b"dhsa.heads\x04\0\0\0\x04",
            &[b"dhsa.heads\x04\0\0\0", &[n][..]].concat(),
        )
    };
    bad(&heads(0), "found 0");
    bad(&heads(7), "found 7");
    bad(&heads(2), "attn_output.weight: expected shape");
    let end = whole.len() - 32;
    let nan = [&whole[..end], &f32::NAN.to_le_bytes(), &whole[end + 4..]].concat();
    bad(&nan, "found NaN");
    std::fs::remove_file(&path).expect("the file");
    let gone = chunks::read(&path).expect_err("no file");
    assert!(matches!(gone, Error::Io { .. }), "{gone}");
}

#[test]
fn what_cannot_be_learnt_from_is_refused() {
    let go = &mut |_, _| ControlFlow::Continue(());
    let error = chunks::train(&tiny(), &tokens(100), go).expect_err("refused");
    assert!(error.to_string().contains("found 100"), "{error}");
    // While it reads 300 tokens, and while it learns.
    for reads in [true, false] {
        let stop = &mut |_, of: usize| match (of == 300) == reads {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let error = chunks::train(&tiny(), &tokens(300), stop).expect_err("stopped");
        assert!(matches!(error, Error::Cancelled), "{error}");
    }
}

#[test]
fn cache_types_do_not_matter_to_who_chooses() {
    let model = small();
    let tokens = tokens(420);
    for kv in [KvType::F32, KvType::Q8_0, KvType::Q4_0] {
        for policy in [Policy::Blocks, dhsa(Chunking::Shift(16), Heads::Each)] {
            let run = |batch| {
                let options = SessionOptions {
                    n_ctx: 420,
                    kv: kv.into(),
                    sparsity: Sparsity {
                        local: 40,
                        ..Sparsity::new(policy, 256)
                    },
                    batch,
                    ..SessionOptions::default()
                };
                let mut session = Session::new(&model, &options).expect("a session");
                prefill(&mut session, &tokens[..400]);
                decode(&mut session, &tokens[400..]);
                assert!(session.logits().iter().all(|x| x.is_finite()));
                session.logits().to_vec()
            };
            assert!(run(400) == run(61), "{kv:?} {policy}");
        }
    }
}

#[test]
fn what_is_planned_for_sums_of_keys_is_what_they_hold() {
    let model = tiny();
    for sparsity in policies(256) {
        let options = SessionOptions {
            n_ctx: 700,
            batch: 128,
            ..options_for(sparsity)
        };
        let planned = MemoryPlan::new(&model, &options, 600)
            .expect("a plan")
            .memory
            .kv;
        let mut session = Session::new(&model, &options).expect("a session");
        prefill(&mut session, &tokens(700));
        assert_eq!(session.memory().kv, planned, "{sparsity}");
    }
}

#[test]
fn budgets_that_cannot_hold_what_is_always_read_are_refused() {
    let model = tiny();
    for sparsity in policies(40) {
        let options = options_for(Sparsity {
            sink: 40,
            ..sparsity
        });
        let error = Session::new(&model, &options).err().expect("refused");
        assert!(matches!(error, Error::Invalid(_)), "{error}");
        assert!(error.to_string().contains("found 40"), "{error}");
    }
    let share = |per_cent| Sparsity {
        per_cent,
        ..Sparsity::new(Policy::Window, 256)
    };
    let pooled = Sparsity {
        repair: Repair::Pooled,
        ..share(0)
    };
    let every = |n| Sparsity {
        repair: Repair::Delta(n),
        ..share(0)
    };
    for (sparsity, what) in [
        (share(101), "found 101"),
        (pooled, "found a window"),
        (every(7), "found 7"),
        (every(5000), "found 5000"),
    ] {
        let error = sparsity.selector().expect_err("refused");
        assert!(error.to_string().contains(what), "{error}");
    }
    let options = SessionOptions {
        sparsity: Sparsity {
            dense_layers: "0,99".parse().expect("layers"),
            ..share(20)
        },
        ..SessionOptions::default()
    };
    let error = Session::new(&model, &options).err().expect("refused");
    assert!(error.to_string().contains("found 99"), "{error}");
    for bad in ["", "1,,2", "128", "-1", "x"] {
        assert!(bad.parse::<Layers>().is_err(), "{bad}");
    }
    for n in [0, 1, 3, 257, usize::MAX] {
        for chunking in [
            Chunking::Fixed(n),
            Chunking::Shift(n),
            Chunking::Labels(n),
            Chunking::Predict(n),
        ] {
            let sparsity = Sparsity::new(dhsa(chunking, Heads::Each), 100_000);
            let options = options_for(sparsity);
            let error = Session::new(&model, &options).err().expect("refused");
            assert!(error.to_string().contains("chunk: expected"), "{error}");
        }
    }
}
