//! How threads share their cores with other processes: a worker naps between regions, lest it loses the core inside one;
//! the caller goes where nobody takes the core.
//!
//! The caller of a region waits for a worker whose core was taken in the middle of a task until the other process has
//! had its turn: a tick of the scheduler, longer than a token of a small model takes. So a worker that has lost its
//! core ends each short burst of work with a nap, at a place where nobody waits for it. There the scheduler gives the
//! core to others; from a nap a thread comes back with the right to run that is left of its share, and where none is
//! left, it waits outside of a region, and the caller works alone meanwhile. A worker that finds itself on the core of
//! the caller, where it can only be in the way, moves off. Alone on its core a worker never naps.
//!
//! While the caller has lost its core nobody works, and a worker on the same core looks like work in need of no other. Where
//! there are as many threads as cores the system sees no reason to move them: each core has something to do. So the
//! caller moves by itself, and workers make room.
#![allow(
    unsafe_code,
    reason = "processor time and affinity of a thread are calls into the operating system"
)]

use std::cell::RefCell;
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

/// The longest time that a caller stays where it is because moving has not helped.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the system has counted for a thread.
#[derive(Clone, Copy, Default)]
struct Used {
    time: Duration,
    /// Times that its core was taken.
    n_taken: i64,
    /// Times that it slept of its own accord.
    n_slept: i64,
}

/// A stretch of a thread's work.
struct Stretch {
    since: Instant,
    /// What the thread had used then, or earlier.
    used: Used,
}

impl Stretch {
    /// Of the thread that calls this, from now on.
    fn begin() -> Self {
        Self {
            since: Instant::now(),
            used: os::used(),
        }
    }

    /// Whether another process had the core in this stretch, which ends `now`, and whether the thread slept in it, which
    /// may have been all. The next one begins.
    fn end(&mut self, now: Instant) -> (bool, bool) {
        let (worked, used) = (now - self.since, os::used());
        let ran = used.time.saturating_sub(self.used.time);
        // A hypervisor that takes the core is none of the processes that a nap is good for.
        let taken = used.n_taken > self.used.n_taken && worked.saturating_sub(ran) > TAKEN;
        let slept = used.n_slept > self.used.n_slept;
        *self = Self { since: now, used };
        (taken, slept)
    }
}

/// What one worker knows about its core.
pub(super) struct Pace {
    /// What is looked at.
    stretch: Stretch,
    /// When somebody else had the core last, if that is not long ago.
    taken: Option<Instant>,
    /// Where the worker may run when it keeps off no core.
    home: Option<os::Cores>,
}

impl Pace {
    /// Of the thread that calls this.
    pub(super) fn new() -> Self {
        Self {
            stretch: Stretch::begin(),
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
        let look = if self.is_crowded() { BURST } else { LOOK };
        if now - self.stretch.since < look {
            return now;
        }
        if self.stretch.end(now).0 {
            self.taken = Some(now);
        }
        if self.is_crowded() {
            self.stretch.since = self.nap(now);
        }
        self.stretch.since
    }

    /// The worker has slept, of its own accord.
    pub(super) fn slept(&mut self) {
        self.stretch.since = Instant::now();
    }

    /// Gets the worker off its core, which is that of the caller, until others no longer want cores.
    pub(super) fn leave(&mut self) {
        if self.home.is_none() {
            self.home = os::Cores::of_this_thread();
        }
        self.taken = Some(Instant::now());
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

/// What a thread that calls regions knows about its core.
pub(super) struct Caller {
    stretch: Stretch,
    /// When it moved last.
    moved: Option<Instant>,
    /// How long it stays after that.
    patience: Duration,
}

impl Caller {
    fn new() -> Self {
        Self {
            stretch: Stretch::begin(),
            moved: None,
            patience: MEMORY,
        }
    }

    /// Before a region of `n_threads`: moves to another core if another process had this one lately, and all cores are in
    /// use. Returns whether it did so not long ago, so that workers make room.
    fn before_region(&mut self, n_threads: usize) -> bool {
        let now = Instant::now();
        let since_move = |moved: Option<Instant>| moved.map(|moved| now - moved);
        if now - self.stretch.since >= LOOK && self.stretch.end(now) == (true, false) {
            let soon = |of: u32| since_move(self.moved).is_some_and(|t| t < self.patience * of);
            if !soon(1) {
                // It was no better elsewhere if this is soon after the last time: every core is wanted.
                self.patience = if soon(4) {
                    (2 * self.patience).min(PATIENCE)
                } else {
                    MEMORY
                };
                if os::change_core(n_threads) {
                    self.moved = Some(now);
                }
            }
        }
        since_move(self.moved).is_some_and(|t| t < MEMORY)
    }
}

/// See [`Caller::before_region`]; of the thread that calls this.
pub(super) fn before_region(n_threads: usize) -> bool {
    thread_local! {
        static CALLER: RefCell<Caller> = RefCell::new(Caller::new());
    }
    CALLER.with_borrow_mut(|caller| caller.before_region(n_threads))
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
            n_slept: usage.ru_nvcsw as i64,
        }
    }

    pub(super) fn core() -> Option<usize> {
        // SAFETY: the call has no arguments and no effect.
        usize::try_from(unsafe { libc::sched_getcpu() }).ok()
    }

    /// Moves the calling thread to another of its cores if it has no more than `n_cores`; whether it did. Afterwards it
    /// may run on all of them as before.
    pub(super) fn change_core(n_cores: usize) -> bool {
        let Some(all) = Cores::of_this_thread().filter(|all| all.len() <= n_cores) else {
            return false;
        };
        let rest = core().and_then(|core| all.without(core));
        rest.is_some_and(|rest| rest.keep_to() && all.keep_to())
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

    pub(super) fn change_core(_n_cores: usize) -> bool {
        false
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

    #[test]
    fn a_caller_changes_cores_and_stays_free() {
        let caller = || {
            let n = || {
                os::Cores::of_this_thread()
                    .expect("fewer cores than a set holds")
                    .len()
            };
            let before = n();
            assert!(!os::change_core(before - 1), "there is a core to spare");
            assert_eq!(os::change_core(before), before > 1);
            assert_eq!(n(), before);
        };
        std::thread::spawn(caller).join().expect("no panic");
    }

    #[test]
    fn a_caller_that_slept_stays() {
        let mut caller = Caller::new();
        std::thread::sleep(2 * LOOK);
        assert!(!caller.before_region(usize::MAX));
        assert!(caller.moved.is_none());
    }
}
