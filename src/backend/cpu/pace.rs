//! How a worker shares its core with other processes: it naps between regions, lest it loses the core inside one.
//!
//! The caller of a region waits for a worker whose core was taken in the middle of a task until the other process has
//! had its turn: a tick of the scheduler, longer than a token of a small model takes. So a worker that has lost its
//! core ends each short burst of work with a nap, at a place where nobody waits for it. There the scheduler gives the
//! core to others; from a nap a thread comes back with the right to run that is left of its share, and where none is
//! left, it waits outside of a region, and the caller works alone meanwhile. A worker that finds itself on the core of
//! the caller, where it can only be in the way, moves off. Alone on its core a worker never naps.
#![allow(
    unsafe_code,
    reason = "processor time and affinity of a thread are calls into the operating system"
)]

use std::time::{Duration, Instant};

/// Between two looks at whether the core was taken: such a look costs half a microsecond.
const LOOK: Duration = Duration::from_millis(1);

/// Work between two naps, below the slice of any scheduler.
const BURST: Duration = Duration::from_micros(250);

/// A nap as it is asked for; timers of Linux add some 50 µs.
const NAP: Duration = Duration::from_micros(50);

/// Time without the core that is no interrupt and no short service of the system, but another process.
const TAKEN: Duration = Duration::from_micros(500);

/// How long others are expected to come back: they have their turns every few ticks, of 1 to 10 ms.
const MEMORY: Duration = Duration::from_millis(25);

/// What one worker knows about its core.
pub(super) struct Pace {
    /// When the stretch of work began that is looked at.
    since: Instant,
    /// What the thread had used then, or earlier.
    used: Used,
    /// When somebody else had the core last, if that is not long ago.
    taken: Option<Instant>,
    /// Where the worker may run when it keeps off no core.
    home: Option<os::Cores>,
}

/// What the system has counted for a thread.
#[derive(Clone, Copy, Default)]
struct Used {
    time: Duration,
    /// Times that its core was taken.
    n_taken: i64,
}

impl Pace {
    /// Of the thread that calls this.
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            used: os::used(),
            taken: None,
            home: None,
        }
    }

    /// Whether others want this core.
    pub(super) fn is_crowded(&self) -> bool {
        self.taken.is_some()
    }

    /// Between two regions: looks whether the core was taken, and naps if it was lately. Returns the time after that.
    pub(super) fn between_regions(&mut self) -> Instant {
        let now = Instant::now();
        let worked = now - self.since;
        if worked < if self.is_crowded() { BURST } else { LOOK } {
            return now;
        }
        let used = os::used();
        let ran = used.time.saturating_sub(self.used.time);
        // A hypervisor that takes the core is none of the processes that a nap is good for.
        if used.n_taken > self.used.n_taken && worked.saturating_sub(ran) > TAKEN {
            self.taken = Some(now);
        }
        self.used = used;
        self.since = match self.taken {
            None => now,
            Some(_) => self.nap(now),
        };
        self.since
    }

    /// The worker has slept, of its own accord.
    pub(super) fn slept(&mut self) {
        self.since = Instant::now();
    }

    /// Gets the worker off its core, which is that of the caller.
    pub(super) fn leave(&mut self) {
        if self.home.is_none() {
            self.home = os::Cores::of_this_thread();
        }
        let home = self.home.as_ref();
        let rest = home.zip(core()).and_then(|(home, core)| home.without(core));
        if !rest.is_some_and(|rest| rest.keep_to()) {
            // There is no other: the caller gets more done alone.
            std::thread::sleep(NAP);
            self.slept();
        }
    }

    /// Returns when it is over.
    fn nap(&mut self, begin: Instant) -> Instant {
        std::thread::sleep(NAP);
        let end = Instant::now();
        if end - begin > NAP + TAKEN {
            self.taken = Some(end); // others went first
        }
        if self.taken.is_none_or(|taken| end - taken > MEMORY) {
            self.forget();
        }
        end
    }

    /// Works as if nobody else had ever wanted the core.
    fn forget(&mut self) {
        self.taken = None;
        // Where this fails, the worker stays where it is.
        let _ = self.home.take().is_some_and(|home| home.keep_to());
    }
}

/// The core that the caller runs on, if the system tells.
pub(super) fn core() -> Option<usize> {
    os::core()
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod os {
    use std::time::Duration;

    use super::Used;

    /// As Linux has it; `libc` does not name it for Android.
    const RUSAGE_THREAD: libc::c_int = 1;

    pub(super) fn used() -> Used {
        // SAFETY: all fields are integers, for which zeros are valid.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a `rusage` of ours.
        if unsafe { libc::getrusage(RUSAGE_THREAD, &mut usage) } != 0 {
            return Used::default();
        }
        let time = |t: libc::timeval| {
            Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
        };
        Used {
            time: time(usage.ru_utime) + time(usage.ru_stime),
            n_taken: usage.ru_nivcsw as i64,
        }
    }

    pub(super) fn core() -> Option<usize> {
        // SAFETY: the call has no arguments and no effect.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }

    /// A set of cores.
    pub(super) struct Cores(libc::cpu_set_t);

    impl Cores {
        /// Those that the calling thread may use.
        pub(super) fn of_this_thread() -> Option<Self> {
            // SAFETY: the set is bits, for which zeros are valid.
            let mut set = unsafe { std::mem::zeroed() };
            // SAFETY: the size is that of the set behind the pointer; 0 is the calling thread.
            let got = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) };
            (got == 0).then_some(Self(set))
        }

        /// These but `core`, if any are left.
        pub(super) fn without(&self, core: usize) -> Option<Self> {
            let mut set = self.0;
            if core >= libc::CPU_SETSIZE as usize {
                return None;
            }
            // SAFETY: `core` is a bit of the set.
            unsafe { libc::CPU_CLR(core, &mut set) };
            // SAFETY: the call only counts bits.
            (unsafe { libc::CPU_COUNT(&set) } > 0).then_some(Self(set))
        }

        /// How many they are.
        #[cfg(test)]
        pub(super) fn len(&self) -> usize {
            // SAFETY: the call only counts bits.
            usize::try_from(unsafe { libc::CPU_COUNT(&self.0) }).expect("a count")
        }

        /// Lets the calling thread run on these alone; whether the system agreed.
        pub(super) fn keep_to(&self) -> bool {
            // SAFETY: the size is that of the set behind the pointer; 0 is the calling thread.
            unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) == 0 }
        }
    }
}

/// Elsewhere nothing is known, and no worker ever finds its core taken.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod os {
    use super::Used;

    pub(super) fn used() -> Used {
        Used::default()
    }

    pub(super) fn core() -> Option<usize> {
        None
    }

    pub(super) struct Cores;

    impl Cores {
        pub(super) fn of_this_thread() -> Option<Self> {
            None
        }

        pub(super) fn without(&self, _core: usize) -> Option<Self> {
            None
        }

        pub(super) fn keep_to(&self) -> bool {
            false
        }
    }
}

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    #[test]
    fn a_worker_leaves_the_callers_core_and_comes_home() {
        let allowed = || os::Cores::of_this_thread().expect("fewer cores than a set holds");
        let worker = move || {
            let n = allowed().len();
            let mut pace = Pace::new();
            pace.taken = Some(Instant::now());
            pace.leave();
            assert_eq!(allowed().len(), (n - 1).max(1));
            pace.forget();
            assert!(!pace.is_crowded());
            assert_eq!(allowed().len(), n);
        };
        std::thread::spawn(worker).join().expect("no panic");
    }
}
