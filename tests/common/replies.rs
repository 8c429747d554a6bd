//! Replies by the largest logits alone, beside those by all of them.

use std::ops::ControlFlow;

use kinglet::Session;
use kinglet::sampler::{Sampler, Settings, Source};

/// Samplers choose the same tokens after `prompt` either way, in sessions of a vocabulary of `n_vocab`.
pub fn are_the_same(session: impl Fn() -> Session, prompt: &[u32], n_vocab: usize) {
    let chain: &[&[(&str, &str)]] = &[
        &[("temp", "0")],
        &[("temp", "0"), ("repeat-penalty", "1.3")],
        &[("temp", "1.5"), ("top-k", "40")],
        &[
            ("temp", "1.5"),
            ("top-k", "200"),
            ("top-p", "0.95"),
            ("min-p", "0.01"),
        ],
        &[
            ("temp", "2"),
            ("top-k", "7"),
            ("repeat-penalty", "1.5"),
            ("presence-penalty", "0.5"),
        ],
        // There is no number of tokens that would do.
        &[("temp", "2"), ("top-k", "7"), ("presence-penalty", "-0.5")],
        &[("temp", "1.5"), ("top-k", "0")],
    ];
    for (i, values) in chain.iter().enumerate() {
        let mut settings = Settings::neutral();
        for (name, value) in values.iter().chain(&[("seed", "5")]) {
            settings.set(name, value, Source::Flag).expect("a setting");
        }
        let reply = |reach: bool| {
            let mut session = session();
            let mut sampler = Sampler::new(&settings);
            sampler.forbid(&[3, 40]);
            session
                .prefill(prompt, &mut |_, _| ControlFlow::Continue(()))
                .expect("a prompt");
            let mut reply = Vec::new();
            let mut n_top = 0;
            for _ in 0..40 {
                let token = match session.top() {
                    [] => sampler.sample(session.logits()),
                    top => sampler.sample_top(top, n_vocab),
                };
                n_top += usize::from(!session.top().is_empty());
                reply.push(token.expect("finite logits"));
                sampler.accept(reply[reply.len() - 1]);
                let k = sampler.reach().filter(|_| reach).unwrap_or(0);
                session
                    .decode_top(reply[reply.len() - 1], k)
                    .expect("decode");
                assert_eq!(session.logits().is_empty(), !session.top().is_empty());
            }
            session.recall_logits().expect("logits");
            assert_eq!(session.logits().len(), n_vocab);
            (reply, n_top)
        };
        let (expected, none) = reply(false);
        let (found, n_top) = reply(true);
        assert_eq!(found, expected, "{values:?}");
        assert_eq!(none, 0);
        assert_eq!(n_top, if i < 5 { 39 } else { 0 }, "{values:?}");
    }
}
