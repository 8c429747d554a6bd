//! A flag set from another thread at some instant: work ends soon, inside a step too, and what follows is bit for bit
//! what would have been.

use std::ops::ControlFlow;
use std::thread;
use std::time::{Duration, Instant};

use kinglet::session::{Finish, GenerateOptions, Reply, generate};
use kinglet::{Cancel, Error, LoadOptions, Model, Session};

use crate::common::{Random, bits, greedy, load, prefill, root, session, tiny};

/// The longest that anyone waits for a pass to end. It takes an operation; the rest is for a busy machine.
const BOUND: Duration = Duration::from_millis(250);

fn reply(session: &mut Session, prompt: &[u32], max_tokens: usize) -> Reply {
    let options = GenerateOptions {
        max_tokens: Some(max_tokens),
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let on = &mut |_: kinglet::session::Event| ControlFlow::Continue(());
    generate(session, prompt, &mut greedy(), &options, on).expect("room and memory")
}

/// Cancels `n` replies to `n_prompt` tokens at random instants of the first `span`; the number of those that were.
fn cancel_replies(model: &Model, n: u64, n_prompt: usize, span: Duration) -> usize {
    let n_vocab = model.info().config.n_vocab;
    let mut random = Random::new(9);
    let first = random.tokens(40, n_vocab);
    let mut prompt = first.clone();
    prompt.extend(random.tokens(n_prompt - 40, n_vocab));
    let expected = reply(&mut session(model, 512), &prompt, 8);

    let mut line = session(model, 512);
    prefill(&mut line, &first);
    let mut n_cancelled = 0;
    for _ in 0..n {
        let after = span.mul_f64(random.below(1000) as f64 / 1000.0);
        let cancel = Cancel::default();
        line.set_cancel(&cancel);
        let stopper = thread::spawn(move || {
            thread::sleep(after);
            cancel.cancel();
            Instant::now()
        });
        let cut = reply(&mut line, &prompt, 200);
        let ended = Instant::now();
        let asked = stopper.join().expect("no panic there");
        if cut.finish == Finish::Cancelled {
            n_cancelled += 1;
            let waited = ended.saturating_duration_since(asked);
            assert!(waited < BOUND, "{waited:?} after {after:?}");
        }
        line.set_cancel(&Cancel::default());
        let again = reply(&mut line, &prompt, 8);
        assert_eq!(again.tokens, expected.tokens, "cancelled after {after:?}");
    }
    // And the numbers themselves.
    let mut fresh = session(model, 512);
    reply(&mut fresh, &prompt, 8);
    assert_eq!(bits(line.logits()), bits(fresh.logits()));
    n_cancelled
}

#[test]
fn replies_are_cancelled_at_any_instant() {
    let n = cancel_replies(&tiny(), 100, 700, Duration::from_millis(12));
    assert!(n > 20, "{n} were cancelled");
    let model = load("models/lfm2-smol-Q4_0.gguf");
    let n = cancel_replies(&model, 8, 700, Duration::from_millis(200));
    assert!(n > 2, "{n} were cancelled");
}

#[test]
fn a_flag_that_is_set_stops_everything_at_once() {
    let cancel = Cancel::default();
    cancel.cancel();
    let options = LoadOptions {
        cancel: cancel.clone(),
        ..LoadOptions::default()
    };
    let path = root().join("tests/data/lfm2-tiny-random.gguf");
    assert!(matches!(
        Model::load(&path, &options),
        Err(Error::Cancelled)
    ));
    let mut line = session(&tiny(), 512);
    prefill(&mut line, &[1, 2, 3]);
    let before = bits(line.logits());
    line.set_cancel(&cancel);
    assert!(matches!(line.decode(4), Err(Error::Cancelled)));
    assert_eq!(line.tokens(), [1, 2, 3]);
    assert_eq!(bits(line.logits()), before);
    let cut = reply(&mut line, &[1, 2, 5], 4);
    assert_eq!((cut.finish, cut.tokens.len()), (Finish::Cancelled, 0));
}
