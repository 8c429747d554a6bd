//! Follows a run from outside: its phases and tokens, what the system counted in each, and the memory it held.

use super::Work;
use super::counters::{Condition, Counters, Energy};
use super::machine::Resident;
use super::report::{About, Limits, MemorySample, Profile, Report};
use super::span::{Label, Operation, Span, Trace, now};

/// Memory is looked at this often, in nanoseconds: it costs as much as a small token.
const MEMORY_EVERY: u64 = 20_000_000;

/// Collects a run. What it takes for itself is in none of the times.
#[derive(Default)]
pub struct Recorder {
    pub(super) trace: Trace,
    pub(super) phases: Vec<PhaseRecord>,
    pub(super) tokens: Vec<TokenRecord>,
    memory: Vec<MemorySample>,
    /// Nanoseconds that it took for itself since the phase began.
    own: u64,
}

/// A part of a run.
pub(super) struct PhaseRecord {
    pub(super) name: &'static str,
    pub(super) start: u64,
    pub(super) end: u64,
    /// Nanoseconds of the recorder in between.
    pub(super) own: u64,
    pub(super) counters: Option<Counters>,
    pub(super) energy: Option<(&'static str, u64)>,
    pub(super) condition: Condition,
}

/// A token of the reply.
pub(super) struct TokenRecord {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Recorder {
    /// Runs a phase, with whose name lines of the report begin.
    pub fn phase<T>(&mut self, name: &'static str, run: impl FnOnce(&mut Self) -> T) -> T {
        self.look_at_memory(true);
        let (counters, energy) = (Counters::now(), Energy::now());
        self.own = 0;
        let start = now();
        let out = run(self);
        let end = now();
        let own = self.own;
        let since = |before: Option<Counters>| Some(Counters::now()?.since(&before?));
        let used = || {
            let (now, before) = (Energy::now()?, energy?);
            Some((now.source, now.since(&before)?))
        };
        self.phases.push(PhaseRecord {
            name,
            start,
            end,
            own,
            counters: since(counters),
            energy: used(),
            condition: Condition::now(),
        });
        self.look_at_memory(true);
        out
    }

    /// Runs what makes one token of the reply, from the logits before it to those after it.
    pub fn token<T>(&mut self, run: impl FnOnce(&mut Self) -> T) -> T {
        let start = now();
        let out = run(self);
        let end = now();
        self.tokens.push(TokenRecord { start, end });
        out
    }

    /// Runs something that is no operation of a backend.
    pub fn span<T>(&mut self, operation: Operation, name: &str, run: impl FnOnce() -> T) -> T {
        let start = now();
        let out = run();
        self.add_span(operation, name, start, now());
        out
    }

    /// Something that was timed elsewhere, on the clock of [`now`].
    pub fn add_span(&mut self, operation: Operation, name: &str, start: u64, end: u64) {
        let label = self.trace.intern(&Label::new(operation, name, ""));
        self.trace.spans.push(Span {
            label,
            layer: None,
            start,
            end,
            work: Work::default(),
            waited: 0,
        });
    }

    /// Between tokens: adds what `take` takes from a session, and now and then looks at the memory.
    pub fn add(&mut self, take: impl FnOnce() -> Option<Trace>) {
        let start = now();
        self.trace.append(take().unwrap_or_default());
        self.look_at_memory(false);
        self.own += now() - start;
    }

    fn look_at_memory(&mut self, always: bool) {
        let at = now();
        let due = |last: &MemorySample| at >= last.at + MEMORY_EVERY;
        if (always || self.memory.last().is_none_or(due))
            && let Some(resident) = Resident::now()
        {
            self.memory.push(MemorySample {
                at,
                anonymous: resident.anonymous,
                file: resident.file,
            });
        }
    }

    /// The end of the run.
    pub fn finish(mut self, about: About, limits: Limits) -> Profile {
        let memory = std::mem::take(&mut self.memory);
        let report = Report::new(&self, about, limits, memory);
        Profile {
            report,
            trace: self.trace,
        }
    }
}
