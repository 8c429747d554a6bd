//! Replies: what a session keeps of a prompt, what ends a reply, what cancelling leaves behind.

#[path = "common/models.rs"]
#[expect(dead_code, reason = "shared with tests that take SmolLM2 where it is")]
mod models;
#[path = "common/replies.rs"]
mod replies;

use std::ops::ControlFlow::{self, Break, Continue};
use std::path::Path;

use kinglet::sampler::{Sampler, Settings, Source};
use kinglet::session::{Chat, Event, Finish, GenerateOptions, Reply, generate};
use kinglet::{Error, LoadOptions, Model, Session, SessionOptions};

fn tiny() -> Model {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/lfm2-tiny-random.gguf");
    let options = LoadOptions {
        threads: 1,
        ..LoadOptions::default()
    };
    Model::load(&path, &options).unwrap()
}

fn session(model: &Model, n_ctx: usize) -> Session {
    let options = SessionOptions {
        n_ctx,
        batch: 4,
        ..SessionOptions::default()
    };
    Session::new(model, &options).unwrap()
}

fn greedy() -> Sampler {
    let mut settings = Settings::neutral();
    settings.set("temp", "0", Source::Flag).unwrap();
    Sampler::new(&settings)
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        max_tokens: Some(max_tokens),
        ignore_end: true,
        ..GenerateOptions::default()
    }
}

fn go(_: Event) -> ControlFlow<()> {
    Continue(())
}

fn reply(session: &mut Session, prompt: &[u32], n: usize) -> Reply {
    generate(session, prompt, &mut greedy(), &options(n), &mut go).unwrap()
}

#[test]
fn a_reply_is_the_same_whatever_the_session_held() {
    let model = tiny();
    let prompt: Vec<u32> = (3..23).collect();
    let fresh = reply(&mut session(&model, 64), &prompt, 12);
    assert_eq!(fresh.tokens.len(), 12);
    assert_eq!(fresh.stats.reused_tokens, 0);
    assert_eq!(fresh.stats.decode_tokens, 11);

    let mut held = session(&model, 64);
    for common in [0, 1, 3, 4, 9, 19] {
        let mut other = prompt.clone();
        other.truncate(common);
        other.extend([300, 301, 302, 303, 304]);
        reply(&mut held, &other, 3);
        let again = reply(&mut held, &prompt, 12);
        assert_eq!(again.stats.reused_tokens, common);
        assert_eq!(again.tokens, fresh.tokens, "{common} tokens in common");
    }

    // A prompt that goes on with the reply itself reads only what is new.
    let mut longer = prompt.clone();
    longer.extend(&fresh.tokens);
    longer.push(50);
    assert_eq!(reply(&mut held, &longer, 1).stats.reused_tokens, 20 + 11);
}

#[test]
fn the_same_prompt_again_is_not_read_again() {
    let model = tiny();
    let mut session = session(&model, 64);
    let prompt: Vec<u32> = (3..13).collect();
    let first = reply(&mut session, &prompt, 1);
    // The session holds the prompt and its logits: nothing to read.
    let second = reply(&mut session, &prompt, 1);
    assert_eq!(
        (second.stats.reused_tokens, &second.tokens),
        (10, &first.tokens)
    );
    // It holds more than the prompt: the logits after the prompt are recalled.
    reply(&mut session, &prompt, 5);
    let third = reply(&mut session, &prompt, 1);
    assert_eq!(
        (third.stats.reused_tokens, &third.tokens),
        (10, &first.tokens)
    );
}

#[test]
fn a_break_in_the_prefill_leaves_a_session_that_goes_on() {
    let model = tiny();
    let prompt: Vec<u32> = (3..33).collect();
    let fresh = reply(&mut session(&model, 64), &prompt, 6);
    let mut session = session(&model, 64);
    let mut steps = 0;
    let cancelled = generate(
        &mut session,
        &prompt,
        &mut greedy(),
        &options(6),
        &mut |event| {
            assert!(matches!(event, Event::Prefill { total: 30, .. }));
            steps += 1;
            if steps == 2 { Break(()) } else { Continue(()) }
        },
    );
    let cancelled = cancelled.unwrap();
    assert_eq!((cancelled.finish, steps), (Finish::Cancelled, 2));
    assert!(cancelled.tokens.is_empty());
    assert_eq!(session.tokens(), &prompt[..8]);
    let again = reply(&mut session, &prompt, 6);
    assert_eq!(
        (again.stats.reused_tokens, &again.tokens),
        (8, &fresh.tokens)
    );
}

#[test]
fn a_break_at_the_last_step_of_the_prefill_is_one_too() {
    let model = tiny();
    let prompt: Vec<u32> = (3..11).collect();
    let result = generate(
        &mut session(&model, 64),
        &prompt,
        &mut greedy(),
        &options(6),
        &mut |event| match event {
            Event::Prefill { done, total } if done == total => Break(()),
            Event::Prefill { .. } => Continue(()),
            Event::Text(_) | Event::Call(_) => panic!("a token after a break"),
        },
    );
    assert_eq!(result.unwrap().finish, Finish::Cancelled);
}

#[test]
fn a_break_between_tokens_keeps_them() {
    let model = tiny();
    let prompt: Vec<u32> = (3..13).collect();
    let fresh = reply(&mut session(&model, 64), &prompt, 9);
    let mut n = 0;
    let mut text = String::new();
    let cut = generate(
        &mut session(&model, 64),
        &prompt,
        &mut greedy(),
        &options(9),
        &mut |event| {
            if let Event::Text(piece) = event {
                text.push_str(piece);
                n += 1;
            }
            if n == 4 { Break(()) } else { Continue(()) }
        },
    );
    let cut = cut.unwrap();
    assert_eq!(cut.finish, Finish::Cancelled);
    assert_eq!(cut.tokens, fresh.tokens[..4]);
    assert_eq!(cut.text, text, "what was told is what is returned");
}

#[test]
fn a_full_context_ends_a_reply_and_refuses_a_prompt() {
    let model = tiny();
    let prompt: Vec<u32> = (3..13).collect();
    let mut session = session(&model, 16);
    let full = reply(&mut session, &prompt, 100);
    assert_eq!(full.finish, Finish::ContextFull);
    // Six fit, and the last logits give a seventh.
    assert_eq!(full.tokens.len(), 7);
    assert_eq!(session.tokens().len(), 16);

    let held = session.tokens().to_vec();
    let long: Vec<u32> = (3..20).collect();
    let refused = generate(&mut session, &long, &mut greedy(), &options(1), &mut go);
    assert!(
        matches!(
            refused,
            Err(Error::ContextFull {
                needed: 17,
                n_ctx: 16
            })
        ),
        "{refused:?}"
    );
    assert_eq!(
        session.tokens(),
        held,
        "refused before anything is taken away"
    );
}

#[test]
fn prompts_that_are_none_are_errors() {
    let model = tiny();
    let mut session = session(&model, 16);
    let mut send =
        |prompt: &[u32]| generate(&mut session, prompt, &mut greedy(), &options(1), &mut go);
    assert!(matches!(send(&[]), Err(Error::Invalid(_))));
    assert!(matches!(send(&[3, 320]), Err(Error::Invalid(_))));
    assert!(matches!(send(&[3, u32::MAX]), Err(Error::Invalid(_))));
    assert!(send(&[3, 319]).is_ok());
}

#[test]
fn end_tokens_end_unless_they_are_ignored() {
    let model = tiny();
    let tokenizer = model.tokenizer().unwrap();
    let end = tokenizer.ends()[0];
    let mut session = session(&model, 400);
    // A window of penalties so strong that every token comes in turn, the ends too.
    let mut settings = Settings::neutral();
    for (name, value) in [
        ("temp", "0"),
        ("presence-penalty", "100"),
        ("repeat-last-n", "-1"),
    ] {
        settings.set(name, value, Source::Flag).unwrap();
    }
    let mut sampler = Sampler::new(&settings);
    let mut options = options(350);
    let never = generate(&mut session, &[5], &mut sampler, &options, &mut go).unwrap();
    assert_eq!(never.finish, Finish::Length);
    assert!(
        !never.tokens.iter().any(|t| tokenizer.is_end(*t)),
        "token {end}"
    );
    options.ignore_end = false;
    let ended = generate(&mut session, &[5], &mut sampler, &options, &mut go).unwrap();
    assert_eq!(ended.finish, Finish::Stop);
    assert!(
        !ended.tokens.iter().any(|t| tokenizer.is_end(*t)),
        "the end is no part of the reply"
    );
}

#[test]
fn a_model_without_a_template_is_no_chat() {
    let error = Chat::new(session(&tiny(), 16)).err().unwrap();
    assert!(matches!(error, Error::Template(_)), "{error}");
}

#[test]
fn the_largest_logits_choose_the_tokens_that_all_of_them_would() {
    let model = Model::load(
        &models::at("models/lfm2-smol-Q4_0.gguf"),
        &LoadOptions::default(),
    )
    .unwrap();
    let prompt: Vec<u32> = (0..20).map(|i| (i * 3701 + 11) % 49_152).collect();
    replies::are_the_same(|| session(&model, 64), &prompt, 49_152);
}
