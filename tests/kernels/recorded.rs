//! Queries and keys of a model that reads a text, and what DHSA chooses for them.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use kinglet::backend::cpu::Cpu;
use kinglet::backend::cpu::pool::Pool;
use kinglet::backend::select::{Ask, Chunking, KvOptions, Plan, Select};
use kinglet::backend::{Backend, Step};
use kinglet::gguf::Gguf;
use kinglet::model::{self, Pass};
use kinglet::sparsity::{Heads, Policy, Sparsity};
use kinglet::tokenizer::{Special, Tokenizer};

use crate::models::{at, real_model};

/// One head of keys of a layer.
#[derive(Clone, Default)]
pub struct Recorded {
    pub head_dim: usize,
    pub group: usize,
    pub scale: f32,
    /// `(n, group, head_dim)`
    pub q: Vec<f32>,
    /// `(n, head_dim)`
    pub keys: Vec<f32>,
    /// For each position the keys that DHSA reads.
    pub chosen: Vec<Vec<usize>>,
}

/// Looks at some layers: every query reads everything.
struct Recorder {
    n: usize,
    /// Chooses, but nobody follows.
    sparsity: Option<Sparsity>,
    of: Mutex<Vec<((usize, usize), Recorded)>>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recorder")
    }
}

impl Select for Recorder {
    /// A sum of one key is a key.
    fn chunking(&self) -> Option<Chunking> {
        match &self.sparsity {
            Some(sparsity) => sparsity.chunking(),
            None => Some(Chunking::Fixed(1)),
        }
    }

    fn sees_all(&self, _: usize, _: &Range<usize>) -> bool {
        false
    }

    fn budget(&self, _n_seen: usize) -> usize {
        self.n
    }

    fn sums_queries(&self) -> bool {
        self.sparsity
            .is_some_and(|sparsity| sparsity.sums_queries())
    }

    fn select(&self, ask: &Ask, plan: &mut Plan) {
        let shape = ask.attention;
        let (n, group) = (shape.head_dim, shape.n_heads / shape.n_kv_heads);
        let which = (ask.layer, ask.kv_head);
        if ask.kv_head == ask.layer % shape.n_kv_heads {
            let mut of = self.of.lock().expect("no panic before");
            let known = of.iter().position(|(layer, _)| *layer == which);
            let at = known.unwrap_or(of.len());
            if at == of.len() {
                of.push((which, Recorded::default()));
            }
            let recorded = &mut of[at].1;
            recorded.head_dim = n;
            recorded.group = group;
            recorded.scale = shape.scale;
            // Positions come in any order.
            recorded.chosen.resize(self.n, Vec::new());
            recorded.q.resize(self.n * group * n, 0.0);
            match &self.sparsity {
                Some(sparsity) => {
                    match sparsity.sees_all(ask.position, &ask.seen) {
                        true => plan.push(ask.seen.clone()),
                        false => sparsity.select(ask, plan),
                    }
                    let keys = plan.spans.drain(..).flatten();
                    recorded.chosen[ask.position] = keys.collect();
                }
                None => {
                    let own = &ask.q[ask.kv_head * group * n..][..group * n];
                    recorded.q[ask.position * group * n..][..group * n].copy_from_slice(own);
                    if ask.position + 1 == self.n {
                        recorded.keys = ask.chunks.sums(ask.kv_head).to_vec();
                    }
                }
            }
        }
        plan.push(ask.seen.clone());
    }
}

/// A head of keys of every fourth layer that has some, over `n` tokens of a text.
pub fn record(n: usize) -> Vec<Recorded> {
    let gguf = Gguf::open(&real_model()).expect("a model");
    let mut cpu = Cpu::new(Arc::new(Pool::new(2).expect("threads")));
    let network = model::load(&gguf, &cpu, &kinglet::Cancel::default()).expect("a network");
    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a tokenizer");
    let text = std::fs::read_to_string(at("LICENSE-APACHE")).expect("a text");
    let mut tokens = tokenizer.encode(&text, Special::Text);
    assert!(tokens.len() >= n, "{} tokens", tokens.len());
    tokens.truncate(n);
    let dhsa = Policy::Dhsa {
        chunking: Chunking::Fixed(8),
        heads: Heads::Best,
    };
    let mut read = |sparsity| {
        let recorder = Arc::new(Recorder {
            n,
            sparsity,
            of: Mutex::default(),
        });
        let options = KvOptions {
            select: Some(recorder.clone()),
            ..KvOptions::default()
        };
        let mut state = network.state(&cpu, &options);
        state.reserve(&cpu, 0..n).expect("room");
        let pass = Pass {
            tokens: &tokens,
            input: None,
            start: 0,
            output: model::Output::Logits,
            output_from: n,
            step: Step::Prefill,
            write_kv: true,
            follows: false,
        };
        cpu.begin(Step::Prefill);
        network.forward(&mut cpu, &mut state, &pass);
        cpu.flush().expect("computed");
        let mut of = std::mem::take(&mut *recorder.of.lock().expect("no panic before"));
        // Heads of a layer may come in any order, layers do not.
        of.sort_by_key(|(which, _)| *which);
        of.into_iter().step_by(4).map(|(_, recorded)| recorded)
    };
    let chosen = read(Some(Sparsity::new(dhsa, n / 2)));
    read(None)
        .zip(chosen)
        .map(|(keys, chosen)| Recorded {
            chosen: chosen.chosen,
            ..keys
        })
        .collect()
}
