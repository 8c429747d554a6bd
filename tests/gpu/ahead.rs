//! Greedy replies, whose next pass begins before its token is known to the host: what they say is what passes one after the
//! other do, to the bit, wherever their caller turns off.

use kinglet::backend::select::Chunking;
use kinglet::session::{Extra, StateFile};
use kinglet::sparsity::{Heads, Policy, Sparsity};
use kinglet::{BackendKind, Error, KvType, Session, SessionOptions};

use super::on_gpu::{adapter, argmax, load, prefill, sparse_session};

/// One session whose passes run ahead, and one that reads all logits of each token before the next.
struct Both {
    ahead: Session,
    plain: Session,
    what: String,
}

impl Both {
    /// Decodes `token`; the next one.
    fn decode(&mut self, token: u32) -> u32 {
        self.ahead.decode_top(token, 1).expect("decode");
        self.plain.decode(token).expect("decode");
        let next = argmax(self.plain.logits());
        let logit = self.plain.logits()[next as usize];
        let at = self.plain.tokens().len();
        assert_eq!(self.ahead.top(), [(next, logit)], "{}, {at}", self.what);
        next
    }

    /// Decodes `n` tokens from `token` on, each the largest of those before it.
    fn chain(&mut self, token: u32, n: usize) -> u32 {
        (0..n).fold(token, |token, _| self.decode(token))
    }

    /// Does the same to both.
    fn each(&mut self, change: impl Fn(&mut Session)) {
        change(&mut self.ahead);
        change(&mut self.plain);
    }
}

#[test]
fn passes_ahead_are_those_that_come() {
    if !adapter() {
        return;
    }
    let dense = Sparsity::default();
    let dhsa = Policy::Dhsa {
        chunking: Chunking::Fixed(8),
        heads: Heads::Best,
    };
    let dhsa = Sparsity {
        local: 16,
        ..Sparsity::new(dhsa, 40)
    };
    for (name, kv, sparsity) in [
        ("lfm2", KvType::F16, dense),
        ("lfm2", KvType::F16, dhsa),
        ("lfm2moe", KvType::F16, dense),
        ("smallthinker", KvType::F32, dense),
    ] {
        let file = format!("tests/data/{name}-tiny-random.gguf");
        let model = load(&file, BackendKind::Gpu);
        let new = || sparse_session(&model, kv, 64, sparsity);
        let mut both = Both {
            ahead: new(),
            plain: new(),
            what: format!("{name}, {sparsity}"),
        };
        // A cache grows at 256 positions.
        let prompt: Vec<u32> = (0..232).map(|i| (i * 37 + 11) % 300).collect();
        both.each(|session| prefill(session, &prompt));
        let next = both.chain(7, 30);
        both.chain((next + 1) % 300, 4); // another than was found
        both.each(|session| session.truncate(250).expect("truncate"));
        let next = both.chain(9, 5);
        both.each(|session| session.mark().expect("a mark"));
        let snapshot = both.ahead.snapshot().expect("a snapshot");
        let next = both.chain(next, 3);

        // A fork goes on as it likes, and what it came from as before.
        let mut fork = Both {
            ahead: both.ahead.fork().expect("a fork"),
            plain: both.plain.fork().expect("a fork"),
            what: format!("{}, a fork", both.what),
        };
        let next = both.chain(next, 3);
        fork.chain(11, 4);
        let file = format!("kinglet-ahead-{}-{name}.state", std::process::id());
        let file = std::env::temp_dir().join(file);
        both.ahead.save(&file, &Extra::default()).expect("room");
        let found = StateFile::open(&file).and_then(|f| f.load(&model, &both.ahead.options()));
        std::fs::remove_file(&file).expect("a file");
        both.chain(next, 2);
        fork.ahead = found.expect("what was saved").0;
        fork.plain = both.plain.fork().expect("a fork");
        let n = fork.ahead.tokens().len();
        fork.plain.truncate(n).expect("truncate");
        fork.chain(next, 3);

        // Back to a snapshot, to the mark, and to a prompt in place of another.
        both.ahead.restore(&snapshot).expect("restore");
        let n = both.ahead.tokens().len();
        both.plain.truncate(n).expect("truncate");
        both.chain(3, 3);
        both.each(|session| {
            session.truncate(100).expect("truncate");
            prefill(session, &[1, 2, 3]);
        });
        both.chain(5, 20);
        let read = |session: &Session| {
            let work = session.work();
            [work.weight_bytes, work.matmul_ops, work.pairs]
        };
        let before = [read(&both.ahead), read(&both.plain)];
        both.chain(6, 5);
        let after = [read(&both.ahead), read(&both.plain)];
        let since = |i: usize| [0, 1, 2].map(|j| after[i][j] - before[i][j]);
        assert_eq!(since(0), since(1), "{}: what was done", both.what);
    }
}

#[test]
fn a_context_ends_where_it_ends() {
    if !adapter() {
        return;
    }
    let model = load("tests/data/lfm2-tiny-random.gguf", BackendKind::Gpu);
    let options = SessionOptions {
        n_ctx: 12,
        ..SessionOptions::default()
    };
    let new = || Session::new(&model, &options).expect("a session");
    let mut both = Both {
        ahead: new(),
        plain: new(),
        what: "lfm2".to_owned(),
    };
    both.each(|session| prefill(session, &[1, 2, 3, 4]));
    let next = both.chain(5, 8);
    let full = both.ahead.decode_top(next, 1);
    assert!(matches!(full, Err(Error::ContextFull { .. })), "{full:?}");
    both.each(|session| session.truncate(8).expect("truncate"));
    both.chain(9, 4);
}
