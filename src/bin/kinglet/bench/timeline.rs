//! One sequence of tokens on some engine, as a test drives it, and the test.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use kinglet::profile::Work;
use kinglet::{Error, Model, Session};

use crate::bench::plan::Test;
use crate::failure::{Failure, Outcome};
use crate::interrupt;

/// What a test needs of an engine.
pub trait Timeline {
    /// Keeps the first `n` tokens.
    fn truncate(&mut self, n: usize) -> Outcome;
    /// Appends tokens and computes the logits after the last.
    fn prefill(&mut self, tokens: &[u32]) -> Outcome;
    /// Appends a token and computes the logits after it.
    fn decode(&mut self, token: u32) -> Outcome;
    /// Appends a token and finds the one that is the most likely after it.
    fn decode_greedy(&mut self, token: u32) -> Outcome<u32>;
    /// What was done so far, if the engine counts it.
    fn work(&self) -> Work;
}

impl Timeline for Session {
    fn truncate(&mut self, n: usize) -> Outcome {
        Ok(Session::truncate(self, n)?)
    }

    fn prefill(&mut self, tokens: &[u32]) -> Outcome {
        Session::prefill(self, tokens, &mut |_, _| flow())?;
        on_its_device(self)
    }

    fn decode(&mut self, token: u32) -> Outcome {
        Session::decode(self, token)?;
        on_its_device(self)
    }

    fn decode_greedy(&mut self, token: u32) -> Outcome<u32> {
        self.decode_top(token, 1)?;
        on_its_device(self)?;
        if let [(token, _), ..] = self.top() {
            return Ok(*token);
        }
        let logits = self.logits().iter().zip(0..);
        let largest = logits.max_by(|(a, i), (b, j)| a.total_cmp(b).then(j.cmp(i)));
        Ok(largest.map_or(0, |(_, token)| token))
    }

    fn work(&self) -> Work {
        Session::work(self)
    }
}

/// A session whose GPU fails goes on on the CPU: its times are none of what was asked for.
fn on_its_device(session: &Session) -> Outcome {
    match session.device_fault() {
        None => Ok(()),
        Some(fault) => Err(Error::Backend(fault.to_owned()).into()),
    }
}

fn flow() -> ControlFlow<()> {
    if interrupt::hit() {
        ControlFlow::Break(())
    } else {
        ControlFlow::Continue(())
    }
}

/// Tokens without a meaning: the first is BOS where the model wants it, the others come from a generator with a fixed
/// seed (Knuth's linear congruential one, upper bits), so that every run reads the same.
pub struct Tokens {
    bos: Option<u32>,
    n_vocab: u64,
    state: u64,
    stretches: Option<Stretches>,
}

/// Tokens in stretches of so many out of a few neighbouring numbers: what a text that keeps to a topic is for experts.
struct Stretches {
    len: usize,
    /// The first number of the neighbours, and how many tokens are still of them.
    now: (u32, usize),
}

/// Numbers that are neighbours.
const NEIGHBOURS: u64 = 64;

impl Tokens {
    fn new(bos: Option<u32>, n_vocab: usize) -> Self {
        Self {
            bos,
            n_vocab: n_vocab as u64,
            state: 42,
            stretches: None,
        }
    }

    /// Those of the vocabulary of `model`, in stretches of `stretch` if that is given.
    pub fn of(model: &Model, stretch: Option<usize>) -> Self {
        let tokenizer = model.tokenizer().ok();
        let bos = tokenizer.and_then(|t| t.bos().filter(|_| t.add_bos()));
        let n_vocab = model.info().config.n_vocab;
        // A vocabulary of a few neighbours has no others.
        let stretch = stretch.filter(|_| n_vocab as u64 >= NEIGHBOURS);
        Self {
            stretches: stretch.map(|len| Stretches { len, now: (0, 0) }),
            ..Self::new(bos, n_vocab)
        }
    }

    fn below(&mut self, n: u64) -> u32 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.state >> 33) % n) as u32
    }

    fn next(&mut self) -> u32 {
        let Some(mut stretches) = self.stretches.take() else {
            return self.below(self.n_vocab);
        };
        if stretches.now.1 == 0 {
            let first = self.below(self.n_vocab / NEIGHBOURS) * NEIGHBOURS as u32;
            stretches.now = (first, stretches.len);
        }
        stretches.now.1 -= 1;
        let token = stretches.now.0 + self.below(NEIGHBOURS);
        self.stretches = Some(stretches);
        token
    }

    /// The first token of a run.
    fn first(&mut self) -> u32 {
        let next = self.next();
        self.bos.unwrap_or(next)
    }

    /// `n` tokens, the first as that of a run.
    pub fn run(&mut self, n: usize) -> Vec<u32> {
        let first = self.first();
        let rest = (1..n).map(|_| self.next());
        std::iter::once(first).chain(rest).take(n).collect()
    }
}

/// The times of one repetition.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// All of it.
    pub total: Duration,
    /// From the start to the logits after the prompt, if there is one.
    pub prompt: Option<Duration>,
    /// What that took.
    pub prompt_work: Work,
    /// Each decoded token.
    pub tokens: Vec<Duration>,
    /// What they took.
    pub reply_work: Work,
}

/// Runs a test on a timeline, repetition by repetition. The past is read once and kept.
pub struct Runner<'a> {
    timeline: &'a mut dyn Timeline,
    tokens: Tokens,
    n_batch: usize,
    /// The depth of the past that the timeline holds.
    depth: usize,
    /// Whether the tokens of a reply are the most likely ones.
    greedy: bool,
}

impl<'a> Runner<'a> {
    /// Runs tests of `model` on `timeline`, which is empty.
    pub fn new(
        timeline: &'a mut dyn Timeline,
        model: &Model,
        n_batch: usize,
        stretch: Option<usize>,
    ) -> Self {
        Self {
            timeline,
            tokens: Tokens::of(model, stretch),
            n_batch,
            depth: 0,
            greedy: false,
        }
    }

    /// The same; the tokens of a reply are each the most likely one after those before, where `greedy` says so.
    pub fn greedy(self, greedy: bool) -> Self {
        Self { greedy, ..self }
    }

    /// What is timed later, once, with one decoded token.
    pub fn warm_up(&mut self, test: &Test) -> Outcome {
        let warm = Test {
            n_gen: test.n_gen.min(1),
            ..*test
        };
        self.repeat(&warm).map(drop)
    }

    /// One repetition.
    pub fn repeat(&mut self, test: &Test) -> Outcome<Sample> {
        self.past(test.n_depth)?;
        let prompt = self.tokens.run(test.n_prompt);
        let reply = self.tokens.run(test.n_gen);
        let mut sample = Sample::default();
        let idle = self.timeline.work();
        let start = Instant::now();
        if test.n_prompt > 0 {
            self.read(&prompt)?;
            sample.prompt = Some(start.elapsed());
        }
        let read = self.timeline.work();
        let mut before = start.elapsed();
        let mut likely = None;
        for token in reply {
            match self.greedy {
                true => likely = Some(self.timeline.decode_greedy(likely.unwrap_or(token))?),
                false => self.timeline.decode(token)?,
            }
            let now = start.elapsed();
            sample.tokens.push(now - before);
            before = now;
            check()?;
        }
        sample.total = start.elapsed();
        sample.prompt_work = read.since(&idle);
        sample.reply_work = self.timeline.work().since(&read);
        Ok(sample)
    }

    /// Leaves the timeline with `n` tokens.
    fn past(&mut self, n: usize) -> Outcome {
        if self.depth != n {
            self.timeline.truncate(0)?;
            self.depth = 0;
            let past = self.tokens.run(n);
            self.read(&past)?;
            self.depth = n;
        }
        self.timeline.truncate(n)
    }

    fn read(&mut self, tokens: &[u32]) -> Outcome {
        for batch in tokens.chunks(self.n_batch) {
            self.timeline.prefill(batch)?;
            check()?;
        }
        Ok(())
    }
}

fn check() -> Outcome {
    if interrupt::hit() {
        Err(Failure::Interrupted)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts instead of computing.
    #[derive(Default)]
    struct Counted {
        held: usize,
        calls: Vec<String>,
    }

    impl Timeline for Counted {
        fn truncate(&mut self, n: usize) -> Outcome {
            assert!(n <= self.held);
            self.held = n;
            Ok(())
        }
        fn prefill(&mut self, tokens: &[u32]) -> Outcome {
            assert!(tokens.iter().all(|t| *t < 50));
            self.calls.push(format!("{}+{}", self.held, tokens.len()));
            self.held += tokens.len();
            Ok(())
        }
        fn decode(&mut self, token: u32) -> Outcome {
            assert!(token < 50);
            self.calls.push(format!("{}", self.held));
            self.held += 1;
            Ok(())
        }
        fn decode_greedy(&mut self, token: u32) -> Outcome<u32> {
            self.calls.push(format!("{}:{token}", self.held));
            self.held += 1;
            Ok(token + 1)
        }
        fn work(&self) -> Work {
            Work {
                regions: self.calls.len() as u64,
                ..Work::default()
            }
        }
    }

    #[test]
    fn a_past_is_read_once_and_prompts_in_batches() {
        let mut timeline = Counted::default();
        let mut runner = Runner {
            timeline: &mut timeline,
            tokens: Tokens::new(None, 50),
            n_batch: 4,
            depth: 0,
            greedy: false,
        };
        let test = Test {
            n_prompt: 6,
            n_gen: 2,
            n_depth: 5,
        };
        runner.warm_up(&test).expect("no error");
        let sample = runner.repeat(&test).expect("no error");
        assert_eq!(sample.tokens.len(), 2);
        assert_eq!(sample.prompt_work.regions, 2);
        assert_eq!(sample.reply_work.regions, 2);
        assert!(sample.prompt.is_some_and(|prompt| prompt <= sample.total));
        assert_eq!(timeline.calls.join(" "), "0+4 4+1 5+4 9+2 11 5+4 9+2 11 12");
    }

    #[test]
    fn greedy_replies_go_on_with_what_was_found() {
        let mut timeline = Counted::default();
        let mut runner = Runner {
            timeline: &mut timeline,
            tokens: Tokens::new(Some(7), 50),
            n_batch: 4,
            depth: 0,
            greedy: true,
        };
        let test = Test {
            n_prompt: 0,
            n_gen: 3,
            n_depth: 2,
        };
        runner.repeat(&test).expect("no error");
        assert_eq!(timeline.calls.join(" "), "0+2 2:7 3:8 4:9");
    }

    #[test]
    fn tokens_are_the_same_every_time() {
        let mut a = Tokens::new(Some(1), 1000);
        let mut b = Tokens::new(Some(1), 1000);
        let run = a.run(100);
        assert_eq!(run, b.run(100));
        assert_eq!(run[0], 1);
        assert_ne!(run, a.run(100));
        let distinct: std::collections::HashSet<_> = run.iter().collect();
        assert!(distinct.len() > 80);
    }
}
