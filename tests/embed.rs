//! Embeddings against what can be computed without them: the head makes logits of hidden states.

use std::ops::ControlFlow;
use std::path::Path;

use kinglet::quant;
use kinglet::session::{Pooling, embed};
use kinglet::{Error, LoadOptions, Model, Session, SessionOptions};

fn load(path: &str) -> Model {
    let options = LoadOptions {
        threads: 2,
        ..LoadOptions::default()
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    Model::load(&root.join(path), &options).expect("a model")
}

fn session(model: &Model, batch: usize) -> Session {
    let options = SessionOptions {
        n_ctx: 128,
        batch,
        ..SessionOptions::default()
    };
    Session::new(model, &options).expect("room")
}

fn tokens(model: &Model, n: usize) -> Vec<u32> {
    let n_vocab = model.info().config.n_vocab;
    (0..n).map(|i| (i * 37 % n_vocab) as u32).collect()
}

fn states(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut states = Vec::new();
    let each = &mut |position, state: &[f32]| {
        assert_eq!(position, states.len());
        states.push(state.to_vec());
        ControlFlow::Continue(())
    };
    session.hidden_states(tokens, each).expect("it fits");
    states
}

#[test]
fn the_head_makes_logits_of_hidden_states() {
    // The head rounds its inputs to bytes where its weights are quantized; those of a real model have outliers.
    for (path, tolerance) in [
        ("tests/data/lfm2-tiny-random.gguf", 0.02),
        ("tests/data/smallthinker-tiny-random.gguf", 0.02),
        ("models/lfm2-smol-Q4_0.gguf", 0.05),
    ] {
        let model = load(path);
        let (hidden, n_vocab) = (model.info().config.hidden, model.info().config.n_vocab);
        let gguf = model.gguf();
        let head = ["output.weight", "token_embd.weight"];
        let head = head.into_iter().find(|name| gguf.tensor(name).is_some());
        let head = gguf.load(head.expect("a head")).expect("its weights");
        let mut weights = vec![0f32; hidden * n_vocab];
        quant::dequantize(head.dtype, &head.data, &mut weights);
        let tokens = tokens(&model, 40);
        let states = states(&mut session(&model, 16), &tokens);
        assert_eq!(states.len(), tokens.len());
        let mut scored = Vec::new();
        let mut scoring = session(&model, 16);
        let each = &mut |_, logits: &[f32]| {
            scored.push(logits.to_vec());
            ControlFlow::Continue(())
        };
        scoring.score(&tokens, each).expect("it fits");
        for (state, logits) in states.iter().zip(&scored) {
            assert_eq!(state.len(), hidden);
            let (mut error, mut size) = (0f64, 0f64);
            for (row, logit) in weights.chunks_exact(hidden).zip(logits) {
                let products = row
                    .iter()
                    .zip(state)
                    .map(|(w, x)| f64::from(*w) * f64::from(*x));
                let expected: f64 = products.sum();
                error += (expected - f64::from(*logit)).powi(2);
                size += expected * expected;
            }
            assert!(
                (error / size).sqrt() < tolerance,
                "{path}: {error} of {size}"
            );
        }
    }
}

#[test]
fn states_are_pooled_and_scaled() {
    let model = load("models/lfm2-smol-Q4_0.gguf");
    let tokens = tokens(&model, 50);
    let mut session = session(&model, 512);
    let states = states(&mut session, &tokens);
    let mut mean = vec![0f64; model.info().config.hidden];
    for state in &states {
        let pairs = mean.iter_mut().zip(state);
        pairs.for_each(|(sum, x)| *sum += f64::from(*x) / states.len() as f64);
    }
    let last: Vec<f64> = states[states.len() - 1]
        .iter()
        .map(|x| f64::from(*x))
        .collect();
    for raw in [true, false] {
        let all = embed(&mut session, &tokens, Pooling::None, !raw).expect("it fits");
        assert_eq!(all.len(), states.len() * mean.len());
        for (found, state) in all.chunks_exact(mean.len()).zip(&states) {
            let length = state.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let scale = if raw { 1.0 } else { length };
            for (x, y) in found.iter().zip(state) {
                assert!((f64::from(*x) - f64::from(*y) / scale).abs() < 1e-5 * length);
            }
        }
    }
    for (pooling, expected) in [(Pooling::Mean, &mean), (Pooling::Last, &last)] {
        let length = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((length - 1.0).abs() > 0.1, "else scaling would not show");
        for (normalize, scale) in [(false, 1.0), (true, length)] {
            // Whatever the session holds: here the same tokens, then others.
            let found = embed(&mut session, &tokens, pooling, normalize).expect("it fits");
            assert_eq!(session.tokens(), tokens);
            assert_eq!(found.len(), expected.len());
            for (x, y) in found.iter().zip(expected) {
                assert!(
                    (f64::from(*x) - y / scale).abs() < 1e-5 * length,
                    "{pooling:?}: {x} {y}"
                );
            }
            embed(&mut session, &tokens[7..20], pooling, normalize).expect("it fits");
        }
    }
    // Steps of any size see the same, as far as sums in another order do.
    let steps: Vec<Vec<f32>> = [7, 512]
        .map(|batch| {
            embed(
                &mut self::session(&model, batch),
                &tokens,
                Pooling::Mean,
                true,
            )
            .expect("it fits")
        })
        .into();
    let cosine: f64 = steps[0]
        .iter()
        .zip(&steps[1])
        .map(|(a, b)| f64::from(a * b))
        .sum();
    assert!(cosine > 0.9999, "{cosine}");
    // Logits are none after it, and come back.
    assert!(session.logits().is_empty());
    session.recall_logits().expect("one pass");
    assert_eq!(session.logits().len(), model.info().config.n_vocab);
}

#[test]
fn texts_alike_lie_near() {
    let model = load("models/lfm2-smol-Q4_0.gguf");
    let tokenizer = model.tokenizer().expect("a vocabulary");
    let mut session = session(&model, 512);
    let mut of = |text: &str| {
        let tokens = tokenizer.encode_with_bos(text, kinglet::tokenizer::Special::Text);
        embed(&mut session, &tokens, Pooling::Mean, true).expect("it fits")
    };
    let cosine = |a: &[f32], b: &[f32]| -> f32 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let [dog, puppy, tax] = [
        "The dog runs across the green meadow.",
        "A puppy is running over the grass.",
        "Invoices are due within thirty days of receipt.",
    ]
    .map(&mut of);
    assert!(cosine(&dog, &puppy) > cosine(&dog, &tax));
}

#[test]
fn what_cannot_be_embedded_is_said() {
    let model = load("tests/data/lfm2-tiny-random.gguf");
    let mut session = session(&model, 512);
    let empty = embed(&mut session, &[], Pooling::Mean, true);
    assert!(matches!(empty, Err(Error::Invalid(_))));
    let long = embed(&mut session, &tokens(&model, 129), Pooling::Mean, true);
    assert!(matches!(
        long,
        Err(Error::ContextFull {
            needed: 129,
            n_ctx: 128
        })
    ));
    let other = embed(&mut session, &[u32::MAX], Pooling::Mean, true);
    assert!(matches!(other, Err(Error::Invalid(_))));
    let cancel = kinglet::Cancel::default();
    cancel.cancel();
    session.set_cancel(&cancel);
    let cancelled = embed(&mut session, &tokens(&model, 9), Pooling::Mean, true);
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    session.set_cancel(&kinglet::Cancel::default());
    assert!(embed(&mut session, &tokens(&model, 9), Pooling::Mean, true).is_ok());
}
