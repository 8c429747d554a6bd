//! Threads of the token loop: the caller works, workers wait spinning for some tens of microseconds, then parked.
//!
//! A region gives each thread a share of the indices `0..n_tasks`, taken one by one; a thread that is done helps with the
//! shares of the others, so a slow or stolen core holds nobody longer than a task. A share is counted on a cache line of
//! its own: on a large machine a line that goes from core to core costs as much as a small task.
//! A model has some hundred regions a token: entering one costs a store and, if a worker sleeps, a wake-up.
#![allow(
    unsafe_code,
    reason = "a region's closure borrows the caller's stack; disjoint parts of one output"
)]

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pace::{self, Pace};

/// How long a worker spins for the next region before it parks. The gap between two regions of a token is shorter.
const SPIN: Duration = Duration::from_micros(50);

/// A team of threads: the caller of [`Pool::run`] and `n_threads - 1` workers.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One region at a time; sessions on several threads take turns.
    region: Mutex<()>,
    /// Nanoseconds that callers waited for the last worker.
    waited: AtomicU64,
}

/// The body of the running region: a borrowed closure, its lifetime erased.
#[derive(Clone, Copy)]
struct Body(*const (dyn Fn(usize) + Sync));

// SAFETY: the closure is `Sync`, and `Pool::run` keeps it alive until no worker can touch it.
unsafe impl Send for Body {}

struct Shared {
    /// Number of the region, whether it is open, workers inside: see [`State`].
    state: AtomicU64,
    /// Of the region that is open: written before it opens, when no worker is inside.
    body: UnsafeCell<Option<Body>>,
    n_tasks: AtomicUsize,
    /// One for each thread, the caller's first.
    shares: Box<[Share]>,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Workers whose cores others want.
    n_crowded: AtomicUsize,
    /// The core of the caller, while there are such workers or it has just moved there.
    caller_core: AtomicUsize,
    sleepers: AtomicUsize,
    /// Whether waits and work are timed: two looks at the clock for each thread and region.
    timed: AtomicBool,
    worked: Box<[Worked]>,
    gate: Mutex<()>,
    wake: Condvar,
}

// SAFETY: all other fields are `Sync`; `body` is written while no region is open and no worker inside, by the one thread
// that holds `Pool::region`, and read by workers inside a region alone.
unsafe impl Sync for Shared {}

/// The next index of a thread's share, alone on two cache lines: the hardware fetches them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Share {
    next: AtomicUsize,
}

/// Nanoseconds that a worker was inside of regions, away from what others write when the next one opens.
#[derive(Default)]
#[repr(align(128))]
struct Worked(AtomicU64);

/// Adds to nanoseconds to which no other thread adds meanwhile.
fn count(to: &AtomicU64, time: Option<Duration>) {
    if let Some(time) = time {
        let before = to.load(Ordering::Relaxed);
        to.store(before + time.as_nanos() as u64, Ordering::Relaxed);
    }
}

fn nanos(of: &AtomicU64) -> Duration {
    Duration::from_nanos(of.load(Ordering::Relaxed))
}

/// The word that opens and closes a region. A worker enters by adding one while the region is open; the caller closes
/// it when no task is left and then waits for those inside alone. So a worker that sleeps, or whose core was taken,
/// delays nobody.
struct State;

impl State {
    const INSIDE: u64 = (1 << 16) - 1;
    const OPEN: u64 = 1 << 16;
    const REGION: u64 = 1 << 32;

    fn region(state: u64) -> u64 {
        state / Self::REGION
    }
}

impl Pool {
    /// A pool of `n_threads` in all, at least one.
    ///
    /// # Errors
    /// If the operating system refuses a thread.
    pub fn new(n_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            body: UnsafeCell::new(None),
            n_tasks: AtomicUsize::new(0),
            shares: (0..n_threads.max(1)).map(|_| Share::default()).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            n_crowded: AtomicUsize::new(0),
            caller_core: AtomicUsize::new(usize::MAX),
            sleepers: AtomicUsize::new(0),
            timed: AtomicBool::new(false),
            worked: (0..n_threads.max(1)).map(|_| Worked::default()).collect(),
            gate: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
            region: Mutex::new(()),
            waited: AtomicU64::new(0),
        };
        for i in 1..n_threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let worker = std::thread::Builder::new()
                .name(format!("kinglet-{i}"))
                .spawn(move || shared.work(i))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that work in a region.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Regions that were entered by more than one thread so far, modulo `2^32`: barriers.
    pub fn n_regions(&self) -> u64 {
        State::region(self.shared.state.load(Ordering::Relaxed))
    }

    /// From now on measures how long threads wait for each other.
    pub fn time_waits(&self) {
        self.shared.timed.store(true, Ordering::Relaxed);
    }

    /// How long callers have waited for workers to leave a region, since [`Pool::time_waits`].
    pub fn waited(&self) -> Duration {
        nanos(&self.waited)
    }

    /// How long workers were inside of regions, all together.
    pub fn worked(&self) -> Duration {
        let workers = self.shared.worked.iter();
        workers.map(|worked| nanos(&worked.0)).sum()
    }

    /// Calls `body` once for each of `0..n_tasks`, spread over the threads, and returns when all are done.
    ///
    /// # Panics
    /// If `body` panics, after every thread has left the region.
    pub fn run(&self, n_tasks: usize, body: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() {
            return (0..n_tasks).for_each(body);
        }
        let _turn = self
            .region
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers run the body while they are inside the region, and this function
        // neither returns nor unwinds before the region is closed and empty.
        let erased: Body = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Body>(
                body as *const (dyn Fn(usize) + Sync),
            )
        };
        // SAFETY: the last region is closed and empty, and this thread holds `region`: nobody else looks.
        unsafe { *shared.body.get() = Some(erased) };
        shared.n_tasks.store(n_tasks, Ordering::Relaxed);
        for (i, share) in shared.shares.iter().enumerate() {
            share
                .next
                .store(shared.first(i, n_tasks), Ordering::Relaxed);
        }
        let moved = pace::before_region(self.n_threads());
        let crowded = moved || shared.n_crowded.load(Ordering::Relaxed) > 0;
        let core = if crowded { pace::core() } else { None };
        let core = core.unwrap_or(usize::MAX);
        shared.caller_core.store(core, Ordering::Relaxed);
        // SeqCst here and in `enter`: either the sleeper sees the open region, or this thread sees the sleeper.
        shared
            .state
            .fetch_add(State::REGION | State::OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _gate = shared
                .gate
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.claim(0, body)));
        if own.is_err() {
            // A count beyond any share: no task is left.
            let shares = shared.shares.iter();
            shares.for_each(|share| share.next.store(n_tasks, Ordering::Relaxed));
        }
        shared.state.fetch_and(!State::OPEN, Ordering::AcqRel);
        let inside = || shared.state.load(Ordering::Acquire) & State::INSIDE > 0;
        if inside() {
            let clock = shared.clock();
            let mut spins = 0u32;
            while inside() {
                spins = spins.wrapping_add(1);
                // On a crowded machine the last worker may have lost its core: give it ours.
                if spins.is_multiple_of(1 << 12) {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
            }
            count(&self.waited, clock.map(|clock| clock.elapsed()));
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        match own {
            Err(payload) => resume_unwind(payload),
            Ok(()) => assert!(!panicked, "a worker panicked in a region"),
        }
    }

    /// Cuts the row-major matrices `ys` into tiles of `grain` rows and columns and calls `body` with each.
    ///
    /// # Panics
    /// If a `y` is no whole number of rows.
    pub fn run_tiles<T: Send>(
        &self,
        ys: &mut [Output<T>],
        grain: (usize, usize),
        body: &(dyn Fn(Tile<T>) + Sync),
    ) {
        let (row_grain, col_grain) = (grain.0.max(1), grain.1.max(1));
        let count = |y: &Output<T>| y.n_rows().div_ceil(row_grain) * y.n_cols.div_ceil(col_grain);
        let n_tasks = ys.iter().map(count).sum();
        let ys: &[Output<T>] = ys;
        self.run(n_tasks, &|i| {
            // The last first: later tokens attend to more keys, and the longest task should not be the one waited for.
            let mut i = n_tasks - 1 - i;
            let mut which = 0;
            while i >= count(&ys[which]) {
                i -= count(&ys[which]);
                which += 1;
            }
            let y = &ys[which];
            let across = y.n_cols.div_ceil(col_grain);
            let (first_row, first_col) = (i / across * row_grain, i % across * col_grain);
            let rows = first_row..y.n_rows().min(first_row + row_grain);
            let out = y.part(rows, first_col..y.n_cols.min(first_col + col_grain));
            body(Tile {
                which,
                first_row,
                first_col,
                out,
            });
        });
    }

    /// Cuts the columns of the matrices `ys`, as if they lay side by side, into pieces of `grain` and calls `body` with
    /// each; of a piece that lies in several matrices with one part after the other. So tasks are even, however narrow
    /// some of the matrices are.
    pub fn run_columns<T: Send>(
        &self,
        ys: &mut [Output<T>],
        grain: usize,
        body: &(dyn Fn(Tile<T>) + Sync),
    ) {
        let grain = grain.max(1);
        let ys: &[Output<T>] = ys;
        let n_cols: usize = ys.iter().map(|y| y.n_cols).sum();
        self.run(n_cols.div_ceil(grain), &|i| {
            let mut before = 0;
            for (which, y) in ys.iter().enumerate() {
                let own = |col: usize| col.clamp(before, before + y.n_cols) - before;
                let cols = own(i * grain)..own((i + 1) * grain);
                before += y.n_cols;
                if !cols.is_empty() {
                    body(Tile {
                        which,
                        first_row: 0,
                        first_col: cols.start,
                        out: y.part(0..y.n_rows(), cols),
                    });
                }
            }
        });
    }

    /// Cuts `y` into pieces of `len` and calls `body` with the index of each piece and the piece itself.
    pub fn run_pieces<T: Send>(
        &self,
        y: &mut [T],
        len: usize,
        body: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let (total, len) = (y.len(), len.max(1));
        let base = Base(y.as_mut_ptr());
        self.run(total.div_ceil(len), &|i| {
            let start = i * len;
            // SAFETY: each `i` is run once, and `start..start + len` lies in `y` and overlaps no other piece.
            let piece =
                unsafe { std::slice::from_raw_parts_mut(base.at(start), len.min(total - start)) };
            body(i, piece);
        });
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.state.fetch_add(State::REGION, Ordering::SeqCst);
        {
            let _gate = self
                .shared
                .gate
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches panics of a region; its own end cannot fail.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Where share `i` of `n_tasks` begins.
    fn first(&self, i: usize, n_tasks: usize) -> usize {
        i * n_tasks / self.shares.len()
    }

    /// Runs the tasks of share `own`, then what is left of the others.
    fn claim(&self, own: usize, body: &(dyn Fn(usize) + Sync)) {
        let n_tasks = self.n_tasks.load(Ordering::Relaxed);
        let n_shares = self.shares.len();
        for i in (own..n_shares).chain(0..own) {
            let end = self.first(i + 1, n_tasks);
            let next = &self.shares[i].next;
            // Looking first keeps the line of a share that is done where it is.
            while next.load(Ordering::Relaxed) < end {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= end {
                    break;
                }
                body(task);
            }
        }
    }

    /// The time, if it is wanted.
    fn clock(&self) -> Option<Instant> {
        self.timed.load(Ordering::Relaxed).then(Instant::now)
    }

    fn work(&self, own: usize) {
        let (mut seen, mut entered) = (0, None::<Instant>);
        let mut pace = Pace::new();
        loop {
            // After leaving: the caller does not wait for it.
            let worked = entered.map(|entered| entered.elapsed());
            count(&self.worked[own].0, worked);
            let Some(region) = self.enter(seen, &mut pace) else {
                break;
            };
            seen = region;
            // SAFETY: this thread is inside the region, which keeps the caller from writing the next body.
            let body = unsafe { *self.body.get() };
            let body = body.expect("stored before the region opened");
            // SAFETY: `Pool::run` keeps the closure alive until this thread has left the region, below.
            let body = unsafe { &*body.0 };
            entered = self.clock();
            if catch_unwind(AssertUnwindSafe(|| self.claim(own, body))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// Does something with what a worker knows of its core, and counts whether that core is wanted by others.
    fn counted<T>(&self, pace: &mut Pace, act: fn(&mut Pace) -> T) -> T {
        let was_crowded = pace.is_crowded();
        let result = act(pace);
        match (was_crowded, pace.is_crowded()) {
            (false, true) => self.n_crowded.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.n_crowded.fetch_sub(1, Ordering::Relaxed),
            _ => 0,
        };
        result
    }

    /// Waits for an open region after number `seen`, enters it and returns its number; `None` at the end of the pool.
    fn enter(&self, mut seen: u64, pace: &mut Pace) -> Option<u64> {
        let since = self.counted(pace, Pace::between_regions);
        let mut spins = 0u32;
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            let state = self.state.load(Ordering::SeqCst);
            let region = State::region(state);
            if region != seen && state & State::OPEN != 0 {
                let caller = self.caller_core.load(Ordering::Relaxed);
                if caller != usize::MAX && pace::core() == Some(caller) {
                    self.counted(pace, Pace::leave);
                    seen = region;
                    continue;
                }
                let entered = self.state.compare_exchange_weak(
                    state,
                    state + 1,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                if entered.is_ok() {
                    return Some(region);
                }
                continue;
            }
            seen = region;
            spins += 1;
            // Reading the clock costs more than a spin.
            if spins.is_multiple_of(64) && since.elapsed() > SPIN {
                let gate = self
                    .gate
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner());
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                if State::region(self.state.load(Ordering::SeqCst)) == seen {
                    drop(self.wake.wait(gate));
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
                pace.slept();
                spins = 0;
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

struct Base<T>(*mut T);

// SAFETY: used in `run_pieces` alone, where threads make disjoint pieces of one exclusively borrowed slice from it.
unsafe impl<T: Send> Sync for Base<T> {}

impl<T> Base<T> {
    fn at(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

/// A row-major matrix to be written in tiles.
pub struct Output<'a, T = f32> {
    base: *mut T,
    len: usize,
    n_cols: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: shared between the threads of `run_tiles` and `run_columns` alone, where each makes its own disjoint tiles of it.
unsafe impl<T: Send> Sync for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    /// The matrix `y` with rows of `n_cols`.
    ///
    /// # Panics
    /// If `y` is no whole number of rows.
    pub fn new(y: &'a mut [T], n_cols: usize) -> Self {
        assert!(
            n_cols > 0 && y.len().is_multiple_of(n_cols),
            "{} elements in rows of {n_cols}",
            y.len()
        );
        Self {
            base: y.as_mut_ptr(),
            len: y.len(),
            n_cols,
            borrow: PhantomData,
        }
    }

    fn n_rows(&self) -> usize {
        self.len / self.n_cols
    }

    /// Some rows and columns. Whoever makes parts sees to it that none is made twice.
    fn part(&self, rows: Range<usize>, cols: Range<usize>) -> OutCols<'_, T> {
        OutCols {
            base: self
                .base
                .wrapping_add(rows.start * self.n_cols + cols.start),
            n_tokens: rows.len(),
            stride: self.n_cols,
            n_cols: cols.len(),
            borrow: PhantomData,
        }
    }
}

/// A part of one of the outputs of a region.
pub struct Tile<'a, T = f32> {
    /// Index of the output.
    pub which: usize,
    /// Its first row.
    pub first_row: usize,
    /// Its first column.
    pub first_col: usize,
    /// Its elements.
    pub out: OutCols<'a, T>,
}

/// Some adjacent columns of a row-major matrix, held exclusively: where a kernel writes `(n_tokens, n_cols)`.
pub struct OutCols<'a, T = f32> {
    base: *mut T,
    n_tokens: usize,
    stride: usize,
    n_cols: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> OutCols<'a, T> {
    /// All columns of `y`, whose rows have `n_cols` elements.
    ///
    /// # Panics
    /// If `y` is no whole number of rows.
    pub fn whole(y: &'a mut [T], n_cols: usize) -> Self {
        assert!(
            n_cols > 0 && y.len().is_multiple_of(n_cols),
            "{} elements in rows of {n_cols}",
            y.len()
        );
        let n_tokens = y.len() / n_cols;
        Self {
            base: y.as_mut_ptr(),
            n_tokens,
            stride: n_cols,
            n_cols,
            borrow: PhantomData,
        }
    }

    /// Columns held.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Rows.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// These columns of row `token`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline]
    pub fn row(&mut self, token: usize) -> &mut [T] {
        assert!(token < self.n_tokens, "row {token} of {}", self.n_tokens);
        // SAFETY: `whole`, `run_tiles` or `run_columns` made sure that this run of columns lies in the borrowed matrix and is ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(token * self.stride), self.n_cols) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for n_threads in [1, 2, 3, 8] {
            let pool = Pool::new(n_threads).expect("threads");
            for n_tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                for _ in 0..20 {
                    pool.run(n_tasks, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                }
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 20));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(4).expect("threads");
        for _ in 0..50 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                pool.run(64, &|i| assert!(i != 40, "task 40"));
            }));
            assert!(caught.is_err());
            let mut y = vec![0.0; 64];
            pool.run_pieces(&mut y, 3, &|i, piece| piece.fill(i as f32));
            assert!(y.iter().enumerate().all(|(i, y)| *y == (i / 3) as f32));
        }
    }

    #[test]
    fn tiles_are_disjoint_and_complete() {
        let pool = Pool::new(3).expect("threads");
        let mut y = vec![0.0; 5 * 37];
        let mut z = vec![0.0; 3 * 5];
        let mut outputs = [Output::new(&mut y, 37), Output::new(&mut z, 3)];
        pool.run_tiles(&mut outputs, (2, 4), &|mut tile| {
            for t in 0..tile.out.n_tokens() {
                for (i, y) in tile.out.row(t).iter_mut().enumerate() {
                    *y += (100 * (tile.first_row + t) + tile.first_col + i) as f32;
                }
            }
        });
        assert!(
            z.iter()
                .enumerate()
                .all(|(i, z)| *z == (100 * (i / 3) + i % 3) as f32)
        );
        assert!(
            y.iter()
                .enumerate()
                .all(|(i, y)| *y == (100 * (i / 37) + i % 37) as f32)
        );
    }

    #[test]
    fn columns_side_by_side_are_even_and_complete() {
        let pool = Pool::new(2).expect("threads");
        for grain in [1, 8, 13, 100] {
            let (mut y, mut z) = (vec![0.0; 2 * 37], vec![0.0; 2 * 3]);
            let mut outputs = [Output::new(&mut y, 37), Output::new(&mut z, 3)];
            pool.run_columns(&mut outputs, grain, &|mut tile| {
                for t in 0..tile.out.n_tokens() {
                    for (i, y) in tile.out.row(t).iter_mut().enumerate() {
                        *y += (1000 * tile.which + 100 * t + tile.first_col + i + 1) as f32;
                    }
                }
            });
            for (which, y, n_cols) in [(0, &y, 37), (1, &z, 3)] {
                let wanted = |i: usize| (1000 * which + 100 * (i / n_cols) + i % n_cols + 1) as f32;
                assert!(
                    y.iter().enumerate().all(|(i, y)| *y == wanted(i)),
                    "{grain}"
                );
            }
        }
    }

    #[test]
    fn waits_are_timed_when_asked_for() {
        let pool = Pool::new(2).expect("threads");
        let caller = std::thread::current().id();
        // The worker takes longer, so the caller waits, unless it had to do all itself.
        let region = || {
            pool.run(2, &|_| {
                let own = std::thread::current().id() == caller;
                std::thread::sleep(Duration::from_micros(if own { 300 } else { 2000 }));
            });
        };
        region();
        assert_eq!(
            (pool.waited(), pool.worked()),
            (Duration::ZERO, Duration::ZERO)
        );
        pool.time_waits();
        let timed = (0..1000).any(|_| {
            region();
            pool.waited() > Duration::ZERO && pool.worked() > Duration::ZERO
        });
        assert!(timed);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2).expect("threads");
        let total = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        pool.run(10, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 8000);
    }
}
