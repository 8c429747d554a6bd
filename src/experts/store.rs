//! The store: requests come in, reads go out, the most urgent first.
//!
//! One mutex guards all that decides ([`Core`]): it is held for some hundred instructions at a time, and never while a
//! thread reads. Whether a part has landed is an atomic of the arena, so asking again and again costs no lock.
//! The threads that compute call in; the threads that read take the next piece of the most urgent load whenever they
//! have time, or one thread keeps several under way: a piece has at most 512 KiB, so the more urgent waits for one piece
//! at most.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::arena::{Pin, Writer};
use super::disk::{Disk, Fault, Files, Job, Pace, Random, Ring};
use super::layout::{MAX_PARTS, Place};
use super::request::{Entry, Request, Waves};
use super::slots::Slots;
use super::trace::Recorder;
use super::{
    Budget, Class, Counters, Decayed, IoMode, Key, LayerCounters, Layout, Mode, Options,
    PolicyKind, Prefetch, Stats, UsageFile,
};
use crate::{Error, Result};

/// How long one who waits spins before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// Slots that are freed while the lock is held once: some milliseconds of the system's time.
const FREED_AT_ONCE: usize = 8;

/// Threads that read at most.
const MAX_IO_THREADS: usize = 64;

/// Experts in slots of a fixed size, read when needed. See the module.
pub struct ExpertStore {
    shared: Arc<Shared>,
    readers: Vec<JoinHandle<()>>,
}

/// What requests and readers share.
pub(super) struct Shared {
    pub layout: Arc<Layout>,
    disk: Box<dyn Disk>,
    policy: PolicyKind,
    prefetch: Prefetch,
    usage: Option<UsageFile>,
    n_readers: usize,
    core: Mutex<Core>,
    /// There is something to read.
    work: Condvar,
    /// A part has landed, or a slot may be had.
    landed: Condvar,
}

/// What a request does for which there is no room.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// It is an error.
    Now,
    /// It waits until others have ended. Only for who holds no other request, or two would wait for each other.
    InTurn,
}

/// The load of the expert in a slot.
#[derive(Clone, Copy, Default)]
struct Load {
    /// `None`: not to be read before somebody asks.
    class: Option<Class>,
    /// Why it cannot be had, and the file concerned.
    fault: Option<(Fault, usize)>,
}

pub(super) struct Core {
    layout: Arc<Layout>,
    slots: Slots,
    /// Slots that guesses may hold.
    most_guesses: usize,
    writer: Writer,
    loads: Vec<Load>,
    /// Slots to load, by class. An entry whose load has another class by now, or nothing left to read, is passed over.
    queues: [VecDeque<u32>; Class::ALL.len()],
    /// Guesses that have no slot so far.
    hints: VecDeque<Key>,
    /// What fills free slots when nothing else is to be read.
    warm: VecDeque<Key>,
    /// Lists of requests that have ended, for the next.
    spare: Vec<Vec<Entry>>,
    time: Time,
    /// Reads that are out, and since when there are any.
    n_out: usize,
    reading_since: Duration,
    n_idle: usize,
    n_waiting: usize,
    token: u64,
    n_requests: u64,
    total: Counters,
    /// The sums when the token began.
    before: Counters,
    layers: Vec<LayerCounters>,
    n_pinned: usize,
    most_pinned: usize,
    trace: Option<Recorder>,
    closed: bool,
}

/// Whose clock counts.
enum Time {
    Real(Instant),
    Imagined(Imagined),
}

struct Imagined {
    pace: Pace,
    now: Duration,
    lanes: Vec<Option<(Duration, Job)>>,
    /// When the pipe has carried all that was sent.
    pipe_free: Duration,
    random: Random,
}

impl ExpertStore {
    /// A store of the experts that `layout` finds in the files `paths`, which it opens for itself.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::BadFile`] if a file cannot be opened, not in this way, or has another length than the
    /// layout says; otherwise as [`ExpertStore::with_disk`].
    pub fn open(paths: &[PathBuf], layout: Layout, options: &Options) -> Result<Self> {
        let files = Arc::new(Files::open(paths, layout.file_bytes(), options.io)?);
        let ring = (options.io == IoMode::Uring).then(|| {
            let depth = options.io_threads.clamp(1, MAX_IO_THREADS);
            let ring = Ring::new(Arc::clone(&files), depth);
            ring.map_err(|e| Error::io("io_uring", e))
        });
        Self::start(Box::new(files), ring.transpose()?, layout, options)
    }

    /// The same in one file that is open, where what the layout describes begins at byte `start`; errors call it `name`.
    ///
    /// # Errors
    /// As [`ExpertStore::open`], and [`Error::Unsupported`] for [`IoMode::Direct`](super::IoMode::Direct): a file must be
    /// opened for that, and what lies in another begins in the middle of a block.
    pub fn open_in(
        file: File,
        start: u64,
        name: &Path,
        layout: Layout,
        options: &Options,
    ) -> Result<Self> {
        let files = Files::open_in(file, start, name, layout.file_bytes(), options.io)?;
        Self::with_disk(Box::new(files), layout, options)
    }

    /// The same, read by `disk`.
    ///
    /// # Errors
    /// [`Error::OverBudget`] if the budget does not hold [`Layout::min_slots`] experts, [`Error::OutOfMemory`],
    /// [`Error::Io`] if the trace cannot be written or the system refuses a thread.
    pub fn with_disk(disk: Box<dyn Disk>, layout: Layout, options: &Options) -> Result<Self> {
        Self::start(disk, None, layout, options)
    }

    fn start(
        disk: Box<dyn Disk>,
        mut ring: Option<Ring>,
        layout: Layout,
        options: &Options,
    ) -> Result<Self> {
        let n_slots = slots_of(options.budget, &layout)?;
        let all = layout.n_experts();
        let mut used = Decayed::new(all, options.policy.is_weighted());
        if let Some(usage) = &options.usage {
            usage.load(&layout, &mut used);
        }
        let trace = options.trace.as_ref();
        let trace = trace.map(|path| Recorder::create(path, &layout));
        let trace = trace.transpose()?;
        let writer = Writer::new(layout.slot_bytes(), all, n_slots)?;
        let policy =
            options
                .policy
                .build(&used, 0, n_slots, layout.min_slots(), layout.cycle_slots());
        let capacity = writer.n_slots();
        let pace = disk.pace();
        let n_readers = match &pace {
            Some(_) => 0,
            None if ring.is_some() => 1,
            None => options.io_threads.clamp(1, MAX_IO_THREADS),
        };
        let layout = Arc::new(layout);
        let core = Core {
            layout: Arc::clone(&layout),
            most_guesses: options.guesses.unwrap_or(layout.n_used()),
            slots: Slots::new(used, policy, n_slots, capacity),
            writer,
            loads: vec![Load::default(); capacity],
            queues: Class::ALL.map(|_| VecDeque::with_capacity(2 * capacity)),
            hints: VecDeque::new(),
            warm: VecDeque::new(),
            spare: Vec::new(),
            time: pace.map_or_else(|| Time::Real(Instant::now()), Time::imagined),
            n_out: 0,
            reading_since: Duration::ZERO,
            n_idle: 0,
            n_waiting: 0,
            token: 0,
            n_requests: 0,
            total: Counters::default(),
            before: Counters::default(),
            layers: vec![LayerCounters::default(); layout.layers().len()],
            n_pinned: 0,
            most_pinned: 0,
            trace,
            closed: false,
        };
        let shared = Arc::new(Shared {
            layout,
            disk,
            policy: options.policy,
            prefetch: options.prefetch,
            usage: options.usage.clone(),
            n_readers,
            core: Mutex::new(core),
            work: Condvar::new(),
            landed: Condvar::new(),
        });
        let mut store = Self {
            shared,
            readers: Vec::with_capacity(n_readers),
        };
        for idx in 0..n_readers {
            let shared = Arc::clone(&store.shared);
            let thread = std::thread::Builder::new().name(format!("kinglet-io-{idx}"));
            let ring = ring.take();
            let reader = thread.spawn(move || match ring {
                Some(ring) => shared.read_many(ring),
                None => shared.read(),
            });
            let reader = reader.map_err(|e| {
                let path = store.shared.disk.path(0);
                Error::io(path, e)
            })?;
            store.readers.push(reader);
        }
        let mut core = store.shared.lock();
        core.plan_warmup(&store.shared.layout);
        store.shared.kick(&mut core);
        drop(core);
        Ok(store)
    }

    /// Where the experts lie.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// How far ahead experts are read.
    pub fn prefetch(&self) -> Prefetch {
        self.shared.prefetch
    }

    /// A token, or the pass over a part of a prompt, begins. What the one before has added.
    pub fn next_token(&self) -> Counters {
        let mut core = self.shared.lock();
        core.token += 1;
        let total = core.total();
        let before = std::mem::replace(&mut core.before, total);
        total - before
    }

    /// Holds the experts `ids` of `layer`, which the router has chosen with `weights`, and reads those that are not
    /// there: now, or, where nothing is read ahead and the class is [`Class::Exact`], when they are first asked for.
    /// A weight of zero: this use says nothing about the next tokens.
    ///
    /// Several requests may be open at once; together they hold at most as many experts as there are slots. One who
    /// asks for more gets an error unless reads that are under way make room; then it waits for them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is no such layer or expert, an expert is named twice, the lists differ in length,
    /// or requests that are open hold too many experts.
    pub fn begin(
        &self,
        layer: usize,
        ids: &[u32],
        weights: &[f32],
        class: Class,
    ) -> Result<Request> {
        Shared::begin(&self.shared, layer, ids, weights, class, Room::Now)
    }

    /// The same for one of several sessions, which holds no other request: waits while those of others hold the slots.
    ///
    /// # Errors
    /// As [`ExpertStore::begin`], but too many experts are more than there are slots.
    pub fn begin_in_turn(
        &self,
        layer: usize,
        ids: &[u32],
        weights: &[f32],
        class: Class,
    ) -> Result<Request> {
        Shared::begin(&self.shared, layer, ids, weights, class, Room::InTurn)
    }

    /// The experts `ids` of `layer` will be needed if a guess is right. Nothing happens unless guesses are read. They
    /// are given up when the layer is begun with other experts.
    pub fn hint(&self, layer: usize, ids: &[u32]) {
        let shared = &*self.shared;
        if shared.prefetch != Prefetch::Speculative || shared.check_ids(layer, ids).is_err() {
            return;
        }
        let mut core = shared.lock();
        for id in ids {
            let key = shared.layout.key(layer, *id);
            if core.slots.find(key).is_none() && !core.hints.contains(&key) {
                core.hints.push_back(key);
            }
        }
        shared.kick(&mut core);
    }

    /// Gives up every load that was not begun and for which nobody waits: after a stop, or a change of the position.
    pub fn cancel(&self) {
        let shared = &*self.shared;
        let mut core = shared.lock();
        core.hints.clear();
        core.warm.clear();
        core.give_up_all(|_, _| true);
        shared.notify_landed(&core);
    }

    /// Groups `ids`, those that are there first, so that a group can be computed while the next is read. See
    /// [`Waves`].
    ///
    /// # Errors
    /// As [`ExpertStore::begin`].
    pub fn waves(&self, layer: usize, ids: &[u32], weights: &[f32]) -> Result<Waves> {
        let shared = &self.shared;
        shared.check(layer, ids, weights)?;
        let core = shared.lock();
        let there = |id: u32| core.slots.find(shared.layout.key(layer, id)).is_some();
        let mut order: Vec<(u32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
        order.sort_by_key(|(id, _)| !there(*id));
        drop(core);
        Ok(Waves::new(Arc::clone(shared), layer, order))
    }

    /// Changes the memory of the experts, at any time. Experts that are too many and not in use go at once, those in
    /// use when they are let go of. How many experts may be in memory from now on.
    ///
    /// # Errors
    /// [`Error::OverBudget`] if the budget does not hold [`Layout::min_slots`] experts: nothing changes then.
    pub fn set_budget(&self, budget: Budget) -> Result<usize> {
        let n_slots = slots_of(budget, &self.shared.layout)?;
        Ok(self.resize(n_slots).0)
    }

    /// The system is short of memory: gives up to `bytes` back, and does with as much less from now on, until the
    /// budget is set again. What was given back at once; what is in use follows when it is let go of.
    pub fn trim(&self, bytes: u64) -> u64 {
        let shared = &self.shared;
        let slot_bytes = shared.layout.slot_bytes() as u64;
        let fewer = usize::try_from(bytes.div_ceil(slot_bytes)).unwrap_or(usize::MAX);
        let limit = shared.lock().slots.limit();
        let n_slots = limit.saturating_sub(fewer);
        let n_slots = n_slots.max(shared.layout.min_slots().min(limit));
        self.resize(n_slots).1 as u64 * slot_bytes
    }

    /// The new number of slots, and how many gave their memory back.
    fn resize(&self, n_slots: usize) -> (usize, usize) {
        let shared = &*self.shared;
        let layout = &shared.layout;
        let mut core = shared.lock();
        let n_slots = n_slots.min(core.writer.n_slots());
        let (min, cycle) = (layout.min_slots(), layout.cycle_slots());
        let (token, before) = (core.token, core.slots.n_backed());
        let used = core.slots.used();
        let policy = shared.policy.build(used, token, n_slots, min, cycle);
        core.slots.set_limit(n_slots, policy, token);
        core.plan_warmup(layout);
        shared.kick(&mut core);
        loop {
            let Core { slots, writer, .. } = &mut *core;
            let n = slots.shrink(FREED_AT_ONCE, &mut |slot| writer.discard(slot));
            shared.notify_landed(&core);
            if n == 0 {
                // Requests that end meanwhile give slots back too.
                return (n_slots, before.saturating_sub(core.slots.n_backed()));
            }
            drop(core); // others get their turn
            core = shared.lock();
        }
    }

    /// Sums of what was done so far.
    pub fn totals(&self) -> Counters {
        self.shared.lock().total()
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let shared = &*self.shared;
        let layout = &shared.layout;
        let core = shared.lock();
        let n_slots = core.slots.limit();
        let mode = if n_slots >= layout.n_experts() {
            Mode::Resident
        } else if n_slots >= layout.cycle_slots() {
            Mode::Cached
        } else {
            Mode::Admission
        };
        Stats {
            tokens: core.token,
            total: core.total(),
            layers: core.layers.clone(),
            n_slots,
            n_held: core.slots.n_backed() - core.slots.n_free(),
            slot_bytes: layout.slot_bytes(),
            most_pinned: core.most_pinned,
            mode,
            policy: core.slots.policy_name(),
            disk: shared.disk.name(),
            io_threads: shared.n_readers,
        }
    }

    /// Keeps what was used where [`Options::usage`] says, for the next start. Where it was written; `None` if it is
    /// not to be kept, or nothing was used. The end of the store does the same, without telling of errors.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save_usage(&self) -> Result<Option<PathBuf>> {
        let shared = &*self.shared;
        let Some(usage) = &shared.usage else {
            return Ok(None);
        };
        let (used, token) = {
            let core = shared.lock();
            if core.total.used == 0 {
                return Ok(None);
            }
            (core.slots.used().clone(), core.token)
        };
        usage.save(&shared.layout, &used, token).map(Some)
    }

    /// Waits until everything that is to be read has been read.
    pub fn settle(&self) {
        let shared = &*self.shared;
        let mut core = shared.lock();
        while core.n_out > 0 || core.has_work() {
            core = shared.wait_landed(core);
        }
    }

    /// The imagined time, if the disk has one.
    pub fn now(&self) -> Option<Duration> {
        match &self.shared.lock().time {
            Time::Real(_) => None,
            Time::Imagined(time) => Some(time.now),
        }
    }

    /// Imagined time passes: somebody computes, and reads go on. Real time does as it likes.
    pub fn advance(&self, time: Duration) {
        self.shared.lock().pass(time, &*self.shared.disk);
    }

    /// Panics unless all that must hold between two calls holds; for tests.
    #[doc(hidden)]
    pub fn check(&self) {
        self.shared.lock().slots.check();
    }
}

impl Drop for ExpertStore {
    fn drop(&mut self) {
        let _ = self.save_usage(); // the next start is slower without
        let shared = &*self.shared;
        shared.lock().closed = true;
        shared.work.notify_all();
        for reader in self.readers.drain(..) {
            let _ = reader.join(); // a panic was reported where it happened
        }
        let mut core = shared.lock();
        core.close();
        shared.landed.notify_all();
    }
}

/// The slots that `budget` holds.
fn slots_of(budget: Budget, layout: &Layout) -> Result<usize> {
    let slot_bytes = layout.slot_bytes() as u64;
    let n = match budget {
        Budget::Slots(n) => n,
        Budget::Bytes(bytes) => usize::try_from(bytes / slot_bytes).unwrap_or(usize::MAX),
    };
    let least = layout.min_slots();
    if n < least {
        let bytes = |n: usize| slot_bytes.saturating_mul(n as u64);
        return Err(Error::OverBudget {
            needed: bytes(least),
            memory: match budget {
                Budget::Slots(n) => bytes(n),
                Budget::Bytes(bytes) => bytes,
            },
            advice: format!(
                "the experts need at least {least} slots of {slot_bytes} bytes: those of three layers"
            ),
        });
    }
    Ok(n.min(layout.n_experts()))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        // Nothing that can panic leaves the state half changed, but for broken invariants, which panic again.
        let core = self.core.lock();
        core.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn check_ids(&self, layer: usize, ids: &[u32]) -> Result<()> {
        let n_layers = self.layout.layers().len();
        let Some(known) = self.layout.layers().get(layer) else {
            return Err(Error::Invalid(format!(
                "layer: expected one below {n_layers}, found {layer}"
            )));
        };
        let n = known.n_experts;
        match ids.iter().find(|id| **id as usize >= n) {
            Some(id) => Err(Error::Invalid(format!(
                "layer {layer}: expected an expert below {n}, found {id}"
            ))),
            None => Ok(()),
        }
    }

    fn check(&self, layer: usize, ids: &[u32], weights: &[f32]) -> Result<()> {
        self.check_ids(layer, ids)?;
        if ids.len() != weights.len() {
            let (n, found) = (ids.len(), weights.len());
            return Err(Error::Invalid(format!(
                "layer {layer}: expected {n} weights, found {found}"
            )));
        }
        let twice = ids.iter().enumerate();
        let mut twice = twice.filter(|(j, id)| ids[..*j].contains(id));
        match twice.next() {
            Some((_, id)) => Err(Error::Invalid(format!("layer {layer}: expert {id} twice"))),
            None => Ok(()),
        }
    }

    /// Experts in a group of [`Waves`]: two groups at once, and room for what one more token needs.
    pub fn wave(&self) -> usize {
        let limit = self.lock().slots.limit();
        (limit.saturating_sub(self.layout.n_used()) / 2).max(1)
    }

    /// See [`ExpertStore::begin`].
    pub fn begin(
        this: &Arc<Self>,
        layer: usize,
        ids: &[u32],
        weights: &[f32],
        class: Class,
        room: Room,
    ) -> Result<Request> {
        this.check(layer, ids, weights)?;
        // Its end gives back what it holds, on every way out.
        let mut request = Request::new(Arc::clone(this), layer);
        let mut core = this.lock();
        core.tick(&*this.disk);
        core.drop_guesses(&this.layout, layer, ids);
        let token = core.token;
        for (id, weight) in ids.iter().zip(weights) {
            let key = this.layout.key(layer, *id);
            core.slots.on_use(key, *weight, token);
        }
        // Those that are there are held before any other comes: it must not push them out.
        let mut entries = core.spare.pop().unwrap_or_default();
        for id in ids {
            let slot = core.slots.find(this.layout.key(layer, *id));
            let late = slot.is_some_and(|slot| !core.slots.is_ready(slot));
            core.total.late += u64::from(late);
            entries.push(Entry {
                expert: *id,
                hit: slot.is_some(),
                pin: slot.map(|slot| core.pin(slot)),
            });
        }
        core.count(layer, weights, &entries);
        let held = this.prefetch == Prefetch::Off && class == Class::Exact;
        request.opened(core.n_requests, entries, held);
        core.n_requests += 1;
        let class = (!held).then_some(class);
        let mut j = 0;
        while j < ids.len() {
            let entry = &mut request.entries_mut()[j];
            if entry.pin.is_none() {
                let key = this.layout.key(layer, entry.expert);
                let (again, slot) = this.slot_for(core, key);
                core = again;
                entry.pin = slot.map(|slot| core.pin(slot));
            }
            if let Some(pin) = &entry.pin {
                core.issue(pin.slot(), class);
                j += 1;
                continue;
            }
            this.kick(&mut core); // those that have got a slot are read all the same
            let n_slots = core.slots.limit();
            let is_imagined = matches!(core.time, Time::Imagined(_));
            if room == Room::Now || ids.len() > n_slots || core.closed || is_imagined {
                return Err(Error::Invalid(format!(
                    "layer {layer}: open requests hold too many of the {n_slots} slots"
                )));
            }
            // Who waits holds nothing, so that the others come to their end.
            let entries = request.entries_mut();
            entries
                .iter_mut()
                .filter_map(|entry| entry.pin.take())
                .for_each(|pin| core.unpin(pin));
            this.notify_landed(&core);
            core = this.wait_landed(core);
            for entry in entries {
                let slot = core.slots.find(this.layout.key(layer, entry.expert));
                entry.pin = slot.map(|slot| core.pin(slot));
            }
            j = 0;
        }
        this.kick(&mut core);
        drop(core);
        Ok(request)
    }

    /// The slot of `key`, or one for it; waits for reads if they make room. `None` if nothing does.
    fn slot_for<'a>(
        &'a self,
        mut core: MutexGuard<'a, Core>,
        key: Key,
    ) -> (MutexGuard<'a, Core>, Option<u32>) {
        loop {
            // While this one waited, another request may have brought it.
            if let Some(slot) = core.slots.find(key) {
                return (core, Some(slot));
            }
            if let Some(slot) = core.slots.admit(key) {
                core.open(&self.layout, slot, key);
                return (core, Some(slot));
            }
            if core.give_up_one() {
                continue;
            }
            if core.closed || !core.slots.will_change() {
                return (core, None);
            }
            self.kick(&mut core);
            core = self.wait_landed(core);
        }
    }

    /// Gives back what a request holds.
    pub fn end(&self, number: Option<u64>, mut entries: Vec<Entry>) {
        let mut core = self.lock();
        for entry in entries.drain(..) {
            if let Some(pin) = entry.pin {
                core.unpin(pin);
            }
        }
        core.spare.push(entries);
        if let (Some(trace), Some(number)) = (&mut core.trace, number) {
            trace.end(number);
        }
        self.notify_landed(&core);
    }

    /// Loads what a request has held back until now.
    pub fn start(&self, entries: &[Entry]) {
        let mut core = self.lock();
        for pin in entries.iter().filter_map(|entry| entry.pin.as_ref()) {
            core.issue(pin.slot(), Some(Class::Demand));
        }
        self.kick(&mut core);
    }

    /// Lets the clock of an imagined drive go on, where there is one: somebody looks whether a part has landed.
    pub fn look(&self) {
        if self.n_readers == 0 {
            self.lock().tick(&*self.disk);
        }
    }

    /// Waits until `part` of the expert of `pin` has landed.
    pub fn wait(&self, pin: &Pin, part: usize) -> Result<()> {
        let slot = pin.slot();
        let mut core = self.lock();
        if pin.is_full(part) {
            return Ok(());
        }
        core.issue(slot, Some(Class::Demand));
        self.kick(&mut core);
        let started = core.now();
        if self.n_readers > 0 {
            drop(core);
            let began = Instant::now();
            while began.elapsed() < SPIN && !pin.is_full(part) {
                std::hint::spin_loop();
            }
            core = self.lock();
        }
        let outcome = loop {
            if pin.is_full(part) {
                break Ok(());
            }
            if let Some((fault, file)) = core.loads[slot as usize].fault {
                break Err(fault.error(self.disk.path(file)));
            }
            core = self.wait_landed(core);
        };
        let waited = core.now() - started;
        core.total.waited += waited;
        core.total.waits += 1;
        outcome
    }

    /// Sends readers to work.
    fn kick(&self, core: &mut Core) {
        match core.time {
            Time::Real(_) if core.n_idle > 0 => self.work.notify_all(),
            Time::Real(_) => {}
            Time::Imagined(_) => core.fill_lanes(),
        }
    }

    fn notify_landed(&self, core: &Core) {
        if core.n_waiting > 0 {
            self.landed.notify_all();
        }
    }

    /// Returns when a read has ended, or for no reason.
    fn wait_landed<'a>(&'a self, mut core: MutexGuard<'a, Core>) -> MutexGuard<'a, Core> {
        if let Time::Imagined(_) = core.time {
            let ended = core.end_next(Duration::MAX, &*self.disk);
            assert!(ended, "what is waited for is being read");
            return core;
        }
        core.n_waiting += 1;
        let core = self.landed.wait(core);
        let mut core = core.unwrap_or_else(|poisoned| poisoned.into_inner());
        core.n_waiting -= 1;
        core
    }

    /// The life of a thread that reads.
    fn read(&self) {
        let mut core = self.lock();
        while !core.closed {
            let Some(mut job) = core.take() else {
                core.n_idle += 1;
                let again = self.work.wait(core);
                core = again.unwrap_or_else(|poisoned| poisoned.into_inner());
                core.n_idle -= 1;
                continue;
            };
            drop(core);
            let outcome = job.read(&*self.disk);
            core = self.lock();
            if core.landed(job, outcome) {
                self.notify_landed(&core);
            }
        }
    }

    /// The same with several reads under way.
    fn read_many(&self, mut ring: Ring) {
        let mut core = self.lock();
        loop {
            while ring.has_room()
                && !core.closed
                && let Some(job) = core.take()
            {
                ring.push(job);
            }
            if ring.is_empty() {
                if core.closed {
                    return;
                }
                core.n_idle += 1;
                let again = self.work.wait(core);
                core = again.unwrap_or_else(|poisoned| poisoned.into_inner());
                core.n_idle -= 1;
                continue;
            }
            drop(core);
            let (job, outcome) = ring.next();
            core = self.lock();
            if core.landed(job, outcome) {
                self.notify_landed(&core);
            }
        }
    }
}

impl Core {
    fn now(&self) -> Duration {
        match &self.time {
            Time::Real(start) => start.elapsed(),
            Time::Imagined(time) => time.now,
        }
    }

    /// The sums up to now.
    fn total(&self) -> Counters {
        let mut total = self.total;
        total.evictions = self.slots.evictions;
        total.guesses_used = self.slots.guesses.used;
        total.guesses_wasted = self.slots.guesses.wasted;
        if self.n_out > 0 {
            total.reading += self.now() - self.reading_since;
        }
        total
    }

    /// Enters a request in the sums and in the trace.
    fn count(&mut self, layer: usize, weights: &[f32], entries: &[Entry]) {
        let hits = entries.iter().filter(|entry| entry.hit).count() as u64;
        let used = entries.len() as u64;
        self.total.used += used;
        self.total.hits += hits;
        self.layers[layer].used += used;
        self.layers[layer].hits += hits;
        if let Some(trace) = &mut self.trace {
            let uses = entries.iter().zip(weights);
            let uses = uses.map(|(entry, weight)| (entry.expert, *weight, entry.hit));
            trace.begin(self.token, layer, uses);
        }
    }

    fn pin(&mut self, slot: u32) -> Pin {
        self.slots.pin(slot);
        self.n_pinned += 1;
        self.most_pinned = self.most_pinned.max(self.n_pinned);
        self.writer.pin(slot)
    }

    fn unpin(&mut self, pin: Pin) {
        let slot = pin.slot();
        drop(pin); // before the slot may go to another expert
        self.n_pinned -= 1;
        let Self { slots, writer, .. } = self;
        slots.unpin(slot, &mut |slot| writer.discard(slot));
        let held_back = self.loads[slot as usize].class.is_none();
        if held_back && self.slots.is_loading(slot) && !self.slots.is_pinned(slot) {
            self.give_up(slot);
        }
    }

    /// Prepares `slot` for `key`, which was admitted to it.
    fn open(&mut self, layout: &Layout, slot: u32, key: Key) {
        self.loads[slot as usize] = Load::default();
        let mut parts = [Place::default(); MAX_PARTS];
        let places = layout.places(key);
        let n_parts = places.len();
        parts.iter_mut().zip(places).for_each(|(a, b)| *a = b);
        self.writer.open(slot, &parts[..n_parts]);
    }

    /// Loads what is in `slot`, at least as urgently as `class` says. What is there already, or cannot be had, stays
    /// as it is.
    fn issue(&mut self, slot: u32, class: Option<Class>) {
        let load = &mut self.loads[slot as usize];
        if load.class < class && self.slots.is_loading(slot) {
            load.class = class;
            if let Some(class) = class
                && !self.writer.is_cut(slot)
            {
                self.queues[class as usize].push_back(slot);
            }
        }
    }

    /// Gives up the load of `slot`.
    fn give_up(&mut self, slot: u32) {
        let Self { slots, writer, .. } = self;
        slots.doom(slot, &mut |slot| writer.discard(slot));
    }

    /// Gives up the loads that nobody waits for, that have something left to read, and of which `which` is true.
    fn give_up_all(&mut self, which: impl Fn(Key, Option<Class>) -> bool) {
        for slot in 0..self.loads.len() as u32 {
            if self.slots.is_loading(slot)
                && !self.slots.is_pinned(slot)
                && !self.writer.is_cut(slot)
                && which(
                    self.slots.key(slot).expect("a load has a key"),
                    self.loads[slot as usize].class,
                )
            {
                self.give_up(slot);
            }
        }
    }

    /// Gives up one load that was only a guess and of which no read is out, to have its slot.
    fn give_up_one(&mut self) -> bool {
        let slot = self.slots.loading_unpinned().find(|slot| {
            let guess = self.loads[*slot as usize].class <= Some(Class::Speculative);
            guess && self.slots.reads(*slot) == 0
        });
        slot.inspect(|slot| self.give_up(*slot)).is_some()
    }

    /// The router has chosen `ids` of `layer`: other guesses of this layer are wrong.
    fn drop_guesses(&mut self, layout: &Layout, layer: usize, ids: &[u32]) {
        let keys = layout.keys(layer);
        if !self.hints.is_empty() {
            self.hints.retain(|key| !keys.contains(key));
        }
        if self.slots.n_guesses() > 0 {
            self.give_up_all(|key, class| {
                class == Some(Class::Speculative)
                    && keys.contains(&key)
                    && !ids.contains(&(key - keys.start))
            });
        }
    }

    /// What fills free slots: what was used most, all of it if there is room.
    fn plan_warmup(&mut self, layout: &Layout) {
        self.warm.clear();
        let (all, used) = (layout.n_experts(), self.slots.used());
        let mut keys: Vec<Key> = (0..all as Key).collect();
        keys.retain(|key| self.slots.find(*key).is_none());
        if self.slots.limit() < all {
            keys.retain(|key| used.used(*key, self.token) > 0.0);
            keys.sort_by(|a, b| used.order(*b, *a).then(a.cmp(b)));
        }
        self.warm.extend(keys);
    }

    /// Whether a reader would find something to read.
    fn has_work(&mut self) -> bool {
        let Self {
            slots,
            writer,
            loads,
            queues,
            warm,
            hints,
            ..
        } = self;
        let open = |slot: &u32| slots.is_loading(*slot) && !writer.is_cut(*slot);
        let classed = |slot: &u32| loads[*slot as usize].class.is_some();
        let queued = queues
            .iter()
            .flatten()
            .any(|slot| open(slot) && classed(slot));
        queued || !hints.is_empty() || (!warm.is_empty() && slots.n_free() > 0)
    }

    /// The next read.
    fn take(&mut self) -> Option<Job> {
        for class in [Class::Demand, Class::Exact, Class::Speculative] {
            if let Some(job) = self.take_of(class) {
                return Some(job);
            }
        }
        while let Some(key) = self.hints.pop_front() {
            if self.slots.find(key).is_none()
                && let Some(slot) = self.slots.admit_guess(key, self.most_guesses)
            {
                self.total.guesses += 1;
                self.begin_load(slot, key, Class::Speculative);
                return self.take_of(Class::Speculative);
            }
        }
        if let Some(job) = self.take_of(Class::Warmup) {
            return Some(job);
        }
        while let Some(key) = self.warm.pop_front() {
            if self.slots.find(key).is_none() {
                let Some(slot) = self.slots.admit_free(key) else {
                    self.warm.clear(); // all slots are taken: what is there now is wanted more
                    return None;
                };
                self.begin_load(slot, key, Class::Warmup);
                return self.take_of(Class::Warmup);
            }
        }
        None
    }

    fn begin_load(&mut self, slot: u32, key: Key, class: Class) {
        let layout = Arc::clone(&self.layout);
        self.open(&layout, slot, key);
        self.issue(slot, Some(class));
    }

    /// The next read of the loads of `class`.
    fn take_of(&mut self, class: Class) -> Option<Job> {
        loop {
            let slot = *self.queues[class as usize].front()?;
            let wanted =
                self.slots.is_loading(slot) && self.loads[slot as usize].class == Some(class);
            let patch = wanted.then(|| self.writer.cut(slot)).flatten();
            let Some(patch) = patch else {
                self.queues[class as usize].pop_front();
                continue;
            };
            let key = self.slots.key(slot).expect("a load has a key");
            let place = self.layout.place(key, patch.part());
            let end = place.skip() + place.bytes;
            if self.n_out == 0 {
                self.reading_since = self.now();
            }
            self.n_out += 1;
            self.slots.read_out(slot);
            self.total.reads += 1;
            self.total.bytes[class as usize] += patch.len() as u64;
            return Some(Job {
                file: place.file,
                offset: place.start() + patch.at() as u64,
                needed: patch.len().min(end - patch.at()),
                patch,
            });
        }
    }

    /// A read has ended. Whether that may matter to one who waits.
    fn landed(&mut self, job: Job, outcome: Result<(), Fault>) -> bool {
        let slot = job.patch.slot();
        self.n_out -= 1;
        if self.n_out == 0 {
            self.total.reading += self.now() - self.reading_since;
        }
        let matters = match outcome {
            Ok(()) => job.patch.land(),
            Err(fault) => {
                drop(job.patch);
                self.total.errors += 1;
                let first = &mut self.loads[slot as usize].fault;
                first.get_or_insert((fault, job.file));
                if self.slots.is_loading(slot) {
                    self.give_up(slot);
                }
                true
            }
        };
        let last = self.slots.reads(slot) == 1 && self.writer.is_cut(slot);
        if last && self.slots.is_loading(slot) {
            self.slots.complete(slot);
        }
        let doomed = self.slots.is_doomed(slot);
        let Self { slots, writer, .. } = self;
        slots.read_back(slot, &mut |slot| writer.discard(slot));
        matters || doomed
    }

    /// Nothing is read any more: who waits is told so.
    fn close(&mut self) {
        for slot in 0..self.loads.len() as u32 {
            if self.slots.is_loading(slot) {
                self.loads[slot as usize]
                    .fault
                    .get_or_insert((Fault::Closed, 0));
                self.give_up(slot);
            }
        }
        if let Some(trace) = &mut self.trace {
            trace.flush();
        }
    }

    /// Lanes that are free take reads.
    fn fill_lanes(&mut self) {
        loop {
            let Time::Imagined(time) = &self.time else {
                return;
            };
            let Some(lane) = time.lanes.iter().position(Option::is_none) else {
                return;
            };
            let Some(job) = self.take() else {
                return;
            };
            let Time::Imagined(time) = &mut self.time else {
                return;
            };
            let end = time.end_of(job.patch.len());
            time.lanes[lane] = Some((end, job));
        }
    }

    /// Lets the clock go on to the end of the next read, if that is not after `until`.
    fn end_next(&mut self, until: Duration, disk: &dyn Disk) -> bool {
        let Time::Imagined(time) = &mut self.time else {
            return false;
        };
        let lanes = time.lanes.iter().enumerate();
        let ends = lanes.filter_map(|(lane, job)| Some((job.as_ref()?.0, lane)));
        let Some((end, lane)) = ends.min().filter(|(end, _)| *end <= until) else {
            return false;
        };
        let (_, mut job) = time.lanes[lane].take().expect("a read is out");
        time.now = time.now.max(end);
        let outcome = job.read(disk);
        self.landed(job, outcome);
        self.fill_lanes();
        true
    }

    /// Lets the clock go on by `by`.
    fn pass(&mut self, by: Duration, disk: &dyn Disk) {
        let Time::Imagined(time) = &self.time else {
            return;
        };
        let until = time.now + by;
        self.fill_lanes();
        while self.end_next(until, disk) {}
        if let Time::Imagined(time) = &mut self.time {
            time.now = until;
        }
    }

    /// Lets the clock go on by what a call takes.
    fn tick(&mut self, disk: &dyn Disk) {
        if let Time::Imagined(time) = &self.time {
            self.pass(time.pace.tick, disk);
        }
    }
}

impl Time {
    fn imagined(pace: Pace) -> Self {
        Time::Imagined(Imagined {
            now: Duration::ZERO,
            lanes: (0..pace.lanes.max(1)).map(|_| None).collect(),
            pipe_free: Duration::ZERO,
            random: Random(pace.seed),
            pace,
        })
    }
}

impl Imagined {
    /// When a read of `bytes` that begins now will end.
    fn end_of(&mut self, bytes: usize) -> Duration {
        let sent = self.pipe_free.max(self.now + self.pace.latency);
        let carried = Duration::from_secs_f64(bytes as f64 / self.pace.bytes_per_second);
        self.pipe_free = sent + carried;
        self.pipe_free + self.pace.jitter.mul_f64(self.random.unit())
    }
}
