//! Logits to a token: a chain of samplers with llama.cpp's names, order and meaning.
//!
//! `penalties; top_k; typ_p; top_p; min_p; temperature`, then a seeded draw; at temperature 0 the likeliest token after
//! the penalties. A sampler at its neutral setting is not in the chain: it touches nothing. The working set stays one
//! plain array of logits until a sampler selects, and no sampler sorts a whole vocabulary.

mod candidates;
mod chain;
mod constraint;
mod dist;
mod greedy;
mod min_p;
mod penalties;
mod presets;
mod rng;
mod settings;
mod temperature;
mod top_k;
mod top_p;
mod typical;

pub use self::{
    candidates::{Candidate, Candidates},
    chain::Sampler,
    constraint::{Constraint, Follow},
    presets::{Preset, preset},
    rng::Rng,
    settings::{Order, Row, Settings, Source, Stage, Value},
};
