//! Random histories of a session against fresh runs.

use std::ops::ControlFlow;

use kinglet::session::{GenerateOptions, Snapshot, generate};
use kinglet::{KvType, KvTypes, Model, Session};

use crate::common::*;

/// What a session should hold: each token, and whether it was decoded.
type Line = Vec<(u32, bool)>;

/// Tokens of a line, at most, so that what follows still fits.
const MOST: usize = N_CTX - 160;

/// One history: a few random steps, after each of which the session must hold `line`.
struct Case {
    random: Random,
    session: Session,
    line: Line,
    kept: Option<(Snapshot, Line)>,
    /// What was done, for the message of a failure.
    did: Vec<String>,
}

impl Case {
    fn new(model: &Model, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let batch = [1, 7, 64, 512][random.below(4)];
        // Half of them with what everybody uses.
        let whole = model.info().config.head_dim.is_multiple_of(32);
        let kinds = if whole { KvType::ALL.len() } else { 2 }; // blocks, or floats alone
        let [keys, values] = match random.below(2) {
            0 => [KvType::F16; 2],
            _ => [(); 2].map(|()| KvType::ALL[random.below(kinds)]),
        };
        Self {
            random,
            session: session_with(model, batch, KvTypes { keys, values }),
            line: Line::new(),
            kept: None,
            did: vec![format!("batch {batch}, {keys:?} and {values:?}")],
        }
    }

    fn n_vocab(&self) -> usize {
        self.session.model().info().config.n_vocab
    }

    /// A length: often short, sometimes at the end of a page or of several.
    fn length(&mut self) -> usize {
        match self.random.below(8) {
            0..4 => 1 + self.random.below(20),
            4..6 => 1 + self.random.below(120),
            6 => 250 + self.random.below(12),
            _ => 1 + self.random.below(400),
        }
    }

    fn read(&mut self) {
        let n = self.length().min(MOST.saturating_sub(self.line.len()));
        if n > 0 {
            let tokens = self.random.tokens(n, self.n_vocab());
            prefill(&mut self.session, &tokens);
            self.line.extend(tokens.iter().map(|t| (*t, false)));
        }
        self.did.push(format!("read {n}"));
    }

    fn decode(&mut self) {
        let n = (1 + self.random.below(24)).min(MOST.saturating_sub(self.line.len()));
        for token in self.random.tokens(n, self.n_vocab()) {
            self.session.decode(token).expect("room and memory");
            self.line.push((token, true));
        }
        self.did.push(format!("decode {n}"));
    }

    /// Back by a few tokens, or anywhere.
    fn cut(&mut self) {
        let len = self.line.len();
        let n = match self.random.below(2) {
            0 => len.saturating_sub(self.random.below(20)),
            _ => self.random.below(len + 1),
        };
        let before = self.session.n_replayed();
        self.session.truncate(n).expect("no failure");
        self.line.truncate(n);
        let replayed = self.session.n_replayed() - before;
        let reach = self.session.model().info().config.conv_reach;
        assert!(replayed <= reach.min(n), "{replayed} replayed");
        self.did.push(format!("cut at {n}: {replayed} replayed"));
    }

    /// A prompt that parts from the line somewhere, and a reply to it.
    fn reuse(&mut self) {
        let common = self.random.below(self.line.len() + 1);
        let n = self.length().min(MOST.saturating_sub(common));
        let mut prompt: Vec<u32> = self.line[..common].iter().map(|(t, _)| *t).collect();
        prompt.extend(self.random.tokens(n, self.n_vocab()));
        if prompt.is_empty() {
            return;
        }
        let pairs = self.line.iter().zip(&prompt);
        let common = pairs.take_while(|((a, _), b)| a == *b).count();
        let options = GenerateOptions {
            max_tokens: Some(1 + self.random.below(12)),
            ignore_end: true,
            ..GenerateOptions::default()
        };
        let go = &mut |_: kinglet::session::Event| ControlFlow::Continue(());
        let reply = generate(&mut self.session, &prompt, &mut greedy(), &options, go);
        let reply = reply.expect("a reply");
        assert_eq!(reply.stats.prompt_tokens, prompt.len());
        assert_eq!(reply.stats.reused_tokens, common);
        let reach = self.session.model().info().config.conv_reach;
        assert!(reply.stats.replayed_tokens <= reach, "{:?}", reply.stats);
        self.line.truncate(common);
        self.line
            .extend(prompt[common..].iter().map(|t| (*t, false)));
        let decoded = &reply.tokens[..reply.stats.decode_tokens];
        self.line.extend(decoded.iter().map(|t| (*t, true)));
        self.did.push(format!(
            "reuse {common} of {}, decode {}",
            prompt.len(),
            decoded.len()
        ));
    }

    /// Goes on with a fork, while the session it came from does something else.
    fn fork(&mut self) {
        let mut fork = self.session.fork().expect("memory");
        std::mem::swap(&mut self.session, &mut fork);
        let n = self.random.below(self.line.len() + 1);
        fork.truncate(n).expect("no failure");
        let other = self.random.tokens(1 + n % 3, self.n_vocab());
        prefill(&mut fork, &other);
        assert_eq!(fork.tokens().len(), n + other.len());
        self.did.push(format!(
            "fork; the other cuts at {n}, reads {}",
            other.len()
        ));
    }

    fn snapshot(&mut self) {
        let snapshot = self.session.snapshot().expect("memory");
        self.kept = Some((snapshot, self.line.clone()));
        self.did.push("snapshot".into());
    }

    fn restore(&mut self) {
        if let Some((snapshot, line)) = &self.kept {
            self.session.restore(snapshot).expect("memory");
            self.line = line.clone();
            self.did.push(format!("restore {}", line.len()));
        }
    }

    fn save_and_load(&mut self) {
        let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
        let file = folder.join(format!("{:?}.state", std::thread::current().id()));
        let extra = kinglet::session::Extra::default();
        self.session.save(&file, &extra).expect("room on the disk");
        let model = self.session.model().clone();
        let options = self.session.options();
        self.session = Session::load(&model, &file, &options).expect("sound");
        std::fs::remove_file(&file).expect("it was there");
        self.did.push("save and load".into());
    }

    fn step(&mut self) {
        match self.random.below(17) {
            0..3 => self.read(),
            3..6 => self.decode(),
            6..9 => self.cut(),
            9..11 => self.reuse(),
            11..13 => self.fork(),
            13 => self.snapshot(),
            14 => self.restore(),
            15 => self.save_and_load(),
            _ => {
                self.session.mark().expect("no failure");
                self.did.push("mark".into());
            }
        }
    }

    /// Compares with a session that has computed the same tokens in the same steps: now, and as both go on.
    fn check(mut self, seed: u64) {
        let what = format!("seed {seed}: {}", self.did.join("; "));
        let tokens: Vec<u32> = self.line.iter().map(|(t, _)| *t).collect();
        assert_eq!(self.session.tokens(), tokens, "{what}");
        let mut fresh = session_with(self.session.model(), 512, self.session.kv_types());
        for same in self.line.chunk_by(|a, b| a.1 == b.1) {
            let tokens: Vec<u32> = same.iter().map(|(t, _)| *t).collect();
            if same[0].1 {
                tokens.iter().for_each(|t| fresh.decode(*t).expect("room"));
            } else {
                prefill(&mut fresh, &tokens);
            }
        }
        self.session.recall_logits().expect("no failure");
        let same = |a: &Session, b: &Session, when: &str| {
            assert!(bits(a.logits()) == bits(b.logits()), "{when}; {what}");
        };
        same(&self.session, &fresh, "logits differ at the end");
        for decodes in [false, true, false] {
            let tail = self.random.tokens(3, self.n_vocab());
            for session in [&mut self.session, &mut fresh] {
                match decodes {
                    true => tail.iter().for_each(|t| session.decode(*t).expect("room")),
                    false => prefill(session, &tail),
                }
            }
            same(
                &self.session,
                &fresh,
                &format!("logits differ as both go on, decodes {decodes}"),
            );
        }
    }
}

/// Runs cases from `first` on.
fn run(model: &Model, first: u64, n: usize) {
    let given = std::env::var("KINGLET_SESSION_CASES").ok();
    let n = given.map_or(n, |n| n.parse().expect("a number of cases"));
    let begin = std::time::Instant::now();
    let mut replayed = 0;
    for seed in first..first + n as u64 {
        let mut case = Case::new(model, seed);
        case.read();
        for _ in 0..1 + case.random.below(8) {
            case.step();
        }
        replayed += case.session.n_replayed();
        case.check(seed);
    }
    let name = &model.info().name;
    let time = begin.elapsed().as_secs_f64();
    println!("{name}: {n} cases in {time:.1} s, {replayed} tokens replayed");
}

#[test]
fn a_random_model_with_convolutions() {
    run(&tiny(), 0, 120);
}

#[test]
fn the_chat_model() {
    run(&load("models/lfm2-smol-Q4_0.gguf"), 10_000, 8);
}

#[test]
fn a_decoder_without_convolutions() {
    if let Some(model) = smollm2() {
        run(&model, 20_000, 4);
    }
}

#[test]
fn a_model_that_was_named() {
    if let Some(path) = std::env::var_os("KINGLET_SESSION_MODEL") {
        run(&load(path), 30_000, 8);
    }
}
