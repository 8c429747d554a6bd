//! The expert store: bytes, time, faults, policies. What depends on time runs on a drive in imagined time, so that it
//! comes out the same everywhere; what depends on the system runs on real files and threads.

#[path = "experts/budget.rs"]
mod budget;
#[path = "experts/common.rs"]
mod common;
#[path = "experts/files.rs"]
mod files;
#[path = "experts/layout.rs"]
mod layout;
#[path = "experts/replay.rs"]
mod replay;
#[path = "experts/schedule.rs"]
mod schedule;
#[path = "experts/time.rs"]
mod time;
#[path = "experts/usage.rs"]
mod usage;
