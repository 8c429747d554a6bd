//! What a second turn and a resumed session cost, in a chat of 4,000 tokens. Run it alone:
//! `cargo test --release --test session -- --ignored --nocapture speed`.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use kinglet::session::{Chat, Event, GenerateOptions, StateFile};
use kinglet::{Session, SessionOptions};

use crate::common::*;

fn median(mut measure: impl FnMut() -> Duration) -> Duration {
    let mut times: Vec<_> = (0..7).map(|_| measure()).collect();
    times.sort();
    times[times.len() / 2]
}

/// Sends a message; the time until the first token of the reply, with rendering and tokenizing.
fn first_token(chat: &mut Chat, text: &str, n: usize) -> Duration {
    let options = GenerateOptions {
        max_tokens: Some(n),
        ignore_end: true,
        ..GenerateOptions::default()
    };
    let begin = Instant::now();
    let mut first = None;
    let on = &mut |event: Event| {
        if let Event::Text(_) = event {
            first.get_or_insert_with(|| begin.elapsed());
        }
        ControlFlow::Continue(())
    };
    let reply = chat.send(text, &mut greedy(), &options, on);
    println!("    {:?}", reply.expect("a reply").stats);
    first.expect("a token")
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    let model = load("models/lfm2-smol-Q4_0.gguf");
    let options = SessionOptions {
        n_ctx: 8192,
        ..SessionOptions::default()
    };
    let read = |name: &str| std::fs::read_to_string(root().join(name)).expect("a text");
    let text = read("LICENSE-APACHE") + &read("LICENSE-MIT") + &read("README.md");
    let text: String = text.chars().take(17_500).collect();
    let question = "And what does the second paragraph of that mean for me?";
    let new = || Chat::new(Session::new(&model, &options).expect("a session")).expect("a template");

    let mut chat = new();
    let whole = first_token(&mut chat, &text, 64);
    let n = chat.session().tokens().len();
    println!("first turn: {n} tokens with its reply, first after {whole:?}");

    // The second turn, and the same tokens alone on a session that holds what comes before them.
    let held = chat.session().snapshot().expect("memory");
    let messages = chat.messages().to_vec();
    first_token(&mut chat, question, 1);
    let after = chat.session().tokens().to_vec();
    let pairs = after.iter().zip(held.tokens());
    let common = pairs.take_while(|(a, b)| a == b).count();
    let mut alone = Session::new(&model, &options).expect("a session");
    let alone = median(|| {
        alone.restore(&held).expect("the same model");
        alone.truncate(common).expect("no failure");
        let begin = Instant::now();
        prefill(&mut alone, &after[common..]);
        begin.elapsed()
    });
    let mut session = Some(chat.into_session());
    let second = median(|| {
        let mut one = session.take().expect("a session");
        one.restore(&held).expect("the same model");
        let mut chat = Chat::new(one).expect("a template");
        chat.set_messages(messages.clone());
        let time = first_token(&mut chat, question, 1);
        session = Some(chat.into_session());
        time
    });
    let ratio = second.as_secs_f64() / alone.as_secs_f64();
    println!("second turn: {second:?}; its new tokens alone {alone:?}: {ratio:.2} times");

    // From disk, and by reading again.
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("speed.state");
    let session = session.expect("a session");
    let save = median(|| {
        let begin = Instant::now();
        session.save(&path, &Default::default()).expect("room");
        begin.elapsed()
    });
    let bytes = std::fs::metadata(&path).expect("a file").len();
    let resume = median(|| {
        let begin = Instant::now();
        let loaded = StateFile::open(&path).and_then(|file| file.load(&model, &options));
        let time = begin.elapsed();
        drop(loaded.expect("a session"));
        time
    });
    let reread = median(|| {
        let mut fresh = Session::new(&model, &options).expect("a session");
        let begin = Instant::now();
        prefill(&mut fresh, session.tokens());
        begin.elapsed()
    });
    let ratio = reread.as_secs_f64() / resume.as_secs_f64();
    println!(
        "{bytes} bytes: saved in {save:?}, resumed in {resume:?}, read again in {reread:?}: {ratio:.1} times"
    );
    std::fs::remove_file(&path).expect("it was there");
}
