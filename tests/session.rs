//! Sessions as values: whatever was cut, forked, marked, put back or reused, what remains is what a session would hold
//! that had computed the same tokens in the same steps and nothing else. Bit for bit: on our backend a token's keys,
//! values and logits depend on the tokens before it and on its step (prefill or decode), not on what else was in the
//! batch.
//!
//! `KINGLET_SESSION_CASES=2000` runs that many cases on each model, `KINGLET_SESSION_MODEL=FILE` adds a model,
//! `KINGLET_SESSION_KILLS=500` kills a saving process that often.

#[path = "session/cancel.rs"]
mod cancel;
#[path = "session/cases.rs"]
mod cases;
#[path = "session/common.rs"]
mod common;
#[path = "session/files.rs"]
mod files;
#[path = "session/speed.rs"]
mod speed;
