//! A total for everything in memory: planned before it is taken, given up step by step where it does not suffice, and
//! measured while it is used.
//!
//! The total is over the whole process as the kernel counts it: weights in memory, keys and values, convolutions,
//! scratch, vocabulary, the program and what else the process holds.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::experts::{self, Found};
use super::plan::{ExpertPlan, Footprint, Plan};
use super::{LoadOptions, Model, SessionOptions, repack};
use crate::backend::cpu::residency::{Residency, window};
use crate::backend::cpu::stored::StoredExperts;
use crate::backend::{BackendKind, KvType, KvTypes};
use crate::error::{Error, Result};
use crate::experts::{Budget, LayerExperts};
use crate::gguf::{Advice, Gguf};
use crate::profile::machine::{Resident, statm};

/// What to do where a budget does not suffice for what was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnExceed {
    /// Say so.
    #[default]
    Refuse,
    /// Give up something, and say what.
    Degrade,
}

/// Something that was given up for a budget.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Concession {
    /// A prompt is read in smaller steps.
    Batch(usize, usize),
    /// Keys and values are kept in fewer bytes.
    Kv(KvTypes, KvTypes),
    /// The context is smaller.
    Context(usize, usize),
    /// So many bytes of so many of weights stay in memory; the others are read again for each step.
    Streaming(u64, u64),
    /// So many of so many experts are in memory at once; the others are read when they are used.
    Experts(usize, usize),
}

impl fmt::Display for Concession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
        match self {
            Self::Batch(from, to) => write!(f, "prompts are read in steps of {to}, not {from}"),
            Self::Kv(from, to) => write!(f, "keys and values are kept in {}, not {}", to, from),
            Self::Context(from, to) => write!(f, "the context holds {to} tokens, not {from}"),
            Self::Streaming(kept, all) => write!(
                f,
                "weights are streamed: {:.1} of {:.1} MiB stay in memory, which is slower",
                mib(kept),
                mib(all)
            ),
            Self::Experts(kept, all) => write!(
                f,
                "experts are read when they are used: {kept} of {all} are in memory at once"
            ),
        }
    }
}

/// The smallest step that a prompt is read in for the sake of a budget: below it weights are read too often.
const MIN_BATCH: usize = 32;

/// The smallest context that is given for the sake of a budget.
const MIN_CTX: usize = 512;

/// Contexts end with a page of keys and values.
const CTX_STEP: usize = 256;

/// What is asked for, and then less and less: first what costs least.
fn ladder(model: &Model, asked: &SessionOptions) -> Result<Vec<SessionOptions>> {
    let mut rungs = vec![asked.clone()];
    let mut last = asked.clone();
    while last.batch > MIN_BATCH {
        last.batch = (last.batch / 2).max(MIN_BATCH);
        rungs.push(last.clone());
    }
    let bytes = |kv: KvTypes| -> Result<usize> {
        let options = SessionOptions { kv, ..last.clone() };
        Ok(Plan::new(model, &options, 1)?.memory.kv)
    };
    // Those that the heads of the model can be cached in.
    let kinds = KvType::ALL.iter().map(|kv| KvTypes::from(*kv));
    let mut kinds: Vec<_> = kinds.filter_map(|kv| Some((bytes(kv).ok()?, kv))).collect();
    let least = bytes(asked.kv)?;
    kinds.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    for (_, kv) in kinds.into_iter().filter(|(bytes, _)| *bytes < least) {
        last.kv = kv;
        rungs.push(last.clone());
    }
    while last.n_ctx > MIN_CTX {
        let less = (last.n_ctx - last.n_ctx / 8) / CTX_STEP * CTX_STEP;
        last.n_ctx = less.min(last.n_ctx - 1).max(MIN_CTX);
        rungs.push(last.clone());
    }
    Ok(rungs)
}

/// The first rung of the ladder that `memory` suffices for; with streamed weights, if `may_stream`, where none does
/// without.
pub(super) fn fit(
    model: &Model,
    asked: &SessionOptions,
    n_prompt: usize,
    room: &Room,
) -> Result<Plan> {
    let plan = |options: &SessionOptions| -> Result<Plan> {
        let mut plan = Plan::new(model, options, n_prompt)?;
        plan.footprint.add_base(&room.base);
        Ok(plan)
    };
    let first = plan(asked)?;
    let needed = first.footprint.total();
    let keeps_all = |experts: &ExpertRoom| experts.cache.is_none();
    if needed <= room.memory && room.experts.as_ref().is_none_or(keeps_all) {
        return Ok(first);
    }
    if let Some(experts) = &room.experts {
        return fit_experts(model, asked, needed, plan, room, experts);
    }
    let weights = first.footprint.weights;
    let asked = &first.options.clone();
    let rungs = match room.on_exceed {
        OnExceed::Refuse => Vec::new(),
        OnExceed::Degrade => ladder(model, asked)?,
    };
    for streamed in [false, true] {
        if streamed && !room.may_stream {
            break;
        }
        for rung in &rungs {
            let mut plan = plan(rung)?;
            let others = plan.footprint.total() - weights;
            let least = if streamed { room.window } else { weights };
            if others + least > room.memory {
                continue;
            }
            if streamed {
                let kept = room.memory - others - room.window;
                let kept = kept.saturating_sub(spare_beside_stream(room.memory));
                let kept = kept.min(weights);
                plan.footprint.weights = kept + room.window;
                plan.kept_weights = kept;
            }
            plan.concessions = concessions(asked, &plan, weights);
            return Ok(plan);
        }
    }
    Err(Error::OverBudget {
        needed,
        memory: room.memory,
        advice: match room.on_exceed {
            OnExceed::Refuse => {
                "allow less context, smaller steps or streaming by degrading".into()
            }
            OnExceed::Degrade => format!(
                "even the smallest context, with weights streamed, needs {} bytes",
                rungs.last().map_or(Ok(needed), |rung| {
                    plan(rung).map(|p| p.footprint.total() - weights + room.window.min(weights))
                })?
            ),
        },
    })
}

/// The same for a model whose experts are read when they are used: the first rung that leaves room for what tokens use of
/// all layers, or else for the least that a store can work with.
fn fit_experts(
    model: &Model,
    asked: &SessionOptions,
    needed: u64,
    plan: impl Fn(&SessionOptions) -> Result<Plan>,
    room: &Room,
    experts: &ExpertRoom,
) -> Result<Plan> {
    let allowed = room.on_exceed == OnExceed::Degrade || experts.cache.is_some();
    let rungs = match room.on_exceed {
        _ if !allowed => Vec::new(),
        OnExceed::Refuse => vec![asked.clone()],
        OnExceed::Degrade => ladder(model, asked)?,
    };
    let mut least = needed;
    for n_least in [experts.cycle_slots, experts.min_slots] {
        for rung in &rungs {
            let mut plan = plan(rung)?;
            // A table that is no head stays in the file: rows of it are read.
            let kept = plan.weights - experts.bytes - experts.table;
            plan.footprint.own_weights = kept;
            plan.footprint.weights = 0;
            let others = plan.footprint.total() + spare_beside_experts(room.memory);
            let slots = |bytes: u64| usize::try_from(bytes / experts.slot_bytes).unwrap_or(0);
            least = least.min(others + experts.min_slots as u64 * experts.slot_bytes);
            let mut n_slots = slots(room.memory.saturating_sub(others)).min(experts.n_experts);
            if let Some(cache) = experts.cache {
                n_slots = n_slots.min(slots(cache));
            }
            if n_slots < n_least.min(experts.n_experts) {
                continue;
            }
            plan.footprint.experts = n_slots as u64 * experts.slot_bytes;
            plan.experts = Some(ExpertPlan {
                n_slots,
                n_experts: experts.n_experts,
                token_bytes: experts.token_bytes,
                bytes: experts.bytes,
            });
            plan.concessions = concessions(asked, &plan, plan.weights);
            plan.kept_weights = kept + experts.bytes;
            plan.concessions
                .push(Concession::Experts(n_slots, experts.n_experts));
            return Ok(plan);
        }
    }
    Err(Error::OverBudget {
        needed: if allowed { least } else { needed },
        memory: room.memory,
        advice: match allowed {
            false => "allow experts to be read when they are used by degrading".into(),
            true => format!(
                "with the smallest context and {} experts in memory, the least there may be, it needs {least} bytes",
                experts.min_slots
            ),
        },
    })
}

fn concessions(asked: &SessionOptions, plan: &Plan, weights: u64) -> Vec<Concession> {
    let given = &plan.options;
    let mut list = Vec::new();
    if given.batch != asked.batch {
        list.push(Concession::Batch(asked.batch, given.batch));
    }
    if given.kv != asked.kv {
        list.push(Concession::Kv(asked.kv, given.kv));
    }
    if given.n_ctx != asked.n_ctx {
        list.push(Concession::Context(asked.n_ctx, given.n_ctx));
    }
    if plan.kept_weights < weights {
        list.push(Concession::Streaming(plan.kept_weights, weights));
    }
    list
}

/// What there is for a session.
pub(super) struct Room {
    pub memory: u64,
    pub on_exceed: OnExceed,
    /// What the process holds without it, and without weights.
    pub base: Footprint,
    /// The least that streamed weights take.
    pub window: u64,
    pub may_stream: bool,
    /// Of a model whose experts are read when they are used.
    pub experts: Option<ExpertRoom>,
}

/// What a store of experts takes.
#[derive(Clone, Copy)]
pub(super) struct ExpertRoom {
    bytes: u64,
    n_experts: usize,
    slot_bytes: u64,
    min_slots: usize,
    /// What it takes to find again what a token has used.
    cycle_slots: usize,
    /// Bytes that a token uses.
    token_bytes: u64,
    /// The most that it may take.
    cache: Option<u64>,
    /// Bytes of the table of embeddings, where it is not the head too.
    table: u64,
}

impl ExpertRoom {
    fn new(gguf: &Gguf, found: &Found, options: &LoadOptions) -> Self {
        let table = experts::table(gguf);
        let layout = &found.layout;
        let used =
            |(i, layer): (usize, &LayerExperts)| layer.n_used as u64 * layout.expert_bytes(i);
        Self {
            bytes: found.bytes,
            n_experts: layout.n_experts(),
            slot_bytes: layout.slot_bytes() as u64,
            min_slots: layout.min_slots(),
            cycle_slots: layout.cycle_slots(),
            token_bytes: layout.layers().iter().enumerate().map(used).sum(),
            cache: options.experts.cache,
            table: table.map_or(0, |table| table.bytes as u64),
        }
    }
}

impl Room {
    /// Of an empty process that will load the model of `gguf`; `experts` are those that are read when they are used.
    pub fn new(
        gguf: &Gguf,
        options: &LoadOptions,
        n_threads: usize,
        base: Footprint,
        experts: Option<&Found>,
    ) -> Self {
        let rows = |t: &crate::gguf::TensorInfo| t.shape[1..].iter().product::<usize>().max(1);
        let row_bytes = gguf.tensors().map(|t| t.bytes / rows(t)).max();
        Self {
            memory: options.memory.unwrap_or(u64::MAX),
            on_exceed: options.on_exceed,
            base,
            window: window(n_threads, row_bytes.unwrap_or(0)) as u64,
            may_stream: options.backend == BackendKind::Cpu && cfg!(unix),
            experts: experts.map(|found| ExpertRoom::new(gguf, found, options)),
        }
    }
}

/// The account of a model and its sessions.
pub(super) struct Ledger {
    room: Room,
    residency: Arc<Residency>,
    experts: Option<Arc<StoredExperts>>,
    held: Mutex<Held>,
    overruns: AtomicU64,
}

/// Who has how many bytes.
struct Held {
    /// The budget.
    memory: u64,
    /// Promised to sessions and snapshots.
    sessions: u64,
    weights: u64,
    experts: u64,
    /// What weights or experts do without because the system was short of memory.
    withheld: u64,
}

impl Ledger {
    /// Of a model that has been loaded: what the process holds now is the base, but for weights, which are dropped.
    pub fn open(
        gguf: &Gguf,
        options: &LoadOptions,
        n_threads: usize,
        residency: Arc<Residency>,
        experts: Option<(&Found, Arc<StoredExperts>)>,
    ) -> Result<Option<Arc<Self>>> {
        let Some(memory) = options.memory else {
            return Ok(None);
        };
        gguf.advise_all(Advice::DontNeed)?;
        let mut base = Footprint::of_loaded_process(gguf);
        base.own_weights = repack::copied_bytes(gguf, options);
        base.runtime = (base.runtime).saturating_sub(residency.owned_bytes() + base.own_weights);
        Ok(Some(Arc::new(Self {
            room: Room::new(
                gguf,
                options,
                n_threads,
                base,
                experts.as_ref().map(|e| e.0),
            ),
            residency,
            experts: experts.map(|e| e.1),
            held: Mutex::new(Held {
                memory,
                sessions: 0,
                weights: 0,
                experts: 0,
                withheld: 0,
            }),
            overruns: AtomicU64::new(0),
        })))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What fits beside the sessions that there are, promised to a new one.
    pub fn admit(
        self: &Arc<Self>,
        model: &Model,
        asked: &SessionOptions,
    ) -> Result<(SessionOptions, Claim)> {
        let mut held = self.held();
        let room = Room {
            memory: held.memory.saturating_sub(held.sessions),
            ..self.room
        };
        let plan = fit(&model.outlined()?, asked, 1, &room)?;
        let bytes = (plan.memory.kv + plan.memory.conv + plan.memory.scratch) as u64;
        if held.sessions == 0 {
            held.withheld = 0;
        }
        let (memory, sessions) = (held.memory, held.sessions + bytes);
        self.share(&mut held, memory, sessions)?;
        Ok((
            plan.options,
            Claim {
                ledger: Arc::clone(self),
                bytes,
                concessions: plan.concessions,
            },
        ))
    }

    /// Another budget from now on. Sessions keep what they have; weights or experts get what that leaves.
    pub fn set_memory(&self, memory: u64) -> Result<()> {
        let mut held = self.held();
        let withheld = std::mem::take(&mut held.withheld);
        let sessions = held.sessions;
        let done = self.share(&mut held, memory, sessions);
        if done.is_err() {
            held.withheld = withheld;
        }
        done
    }

    /// Experts give up to `bytes` back, and do without until the budget is set again. What was given back.
    pub fn trim(&self, bytes: u64) -> u64 {
        let Some(experts) = &self.experts else {
            return 0;
        };
        let mut held = self.held();
        let given = experts.store().trim(bytes);
        held.experts = held.experts.saturating_sub(given);
        held.withheld += given;
        given
    }

    /// Shares `memory` out: `sessions` bytes to sessions, and what is left to experts or weights. Nothing changes if it
    /// does not suffice.
    fn share(&self, held: &mut Held, memory: u64, sessions: u64) -> Result<()> {
        let room = &self.room;
        let weights = room.base.weights;
        let others = room.base.total() - weights + sessions;
        let short = |needed| Error::OverBudget {
            needed,
            memory,
            advice: "it does not fit beside the sessions and snapshots that there are".into(),
        };
        if let (Some(experts), Some(sizes)) = (&self.experts, &room.experts) {
            let others =
                others + weights - sizes.bytes - sizes.table + spare_beside_experts(memory);
            let least = sizes.min_slots as u64 * sizes.slot_bytes;
            let left = memory.saturating_sub(others);
            if left < least {
                return Err(short(others + least));
            }
            let most = sizes.n_experts as u64 * sizes.slot_bytes;
            let most = most.min(sizes.cache.unwrap_or(u64::MAX));
            let bytes = left.min(most).saturating_sub(held.withheld).max(least);
            if bytes != held.experts {
                experts.store().set_budget(Budget::Bytes(bytes))?;
                held.experts = bytes;
            }
        } else {
            let kept = if others + weights <= memory {
                weights
            } else {
                let allowed = room.may_stream && room.on_exceed == OnExceed::Degrade;
                let least = others + if allowed { room.window } else { weights };
                let left = memory.checked_sub(least).ok_or(short(least))?;
                left.saturating_sub(spare_beside_stream(memory))
            };
            held.weights = kept.saturating_sub(held.withheld);
            self.limit(held.weights);
        }
        held.memory = memory;
        held.sessions = sessions;
        Ok(())
    }

    /// Lets `kept` bytes of weights stay.
    fn limit(&self, kept: u64) {
        let all = kept >= self.room.base.weights;
        let bytes = usize::try_from(kept).unwrap_or(usize::MAX);
        self.residency.limit(if all { usize::MAX } else { bytes });
    }
}

/// Bytes that are left alone where weights are streamed: faults of what stays bring along some of its neighbours. Of 279
/// runs without it, two were over, by 0.4 %.
fn spare_beside_stream(memory: u64) -> u64 {
    memory / 50
}

/// The same where experts are read.
fn spare_beside_experts(memory: u64) -> u64 {
    memory / 100
}

/// A session's or a snapshot's part of the budget, given back when it ends.
pub(super) struct Claim {
    ledger: Arc<Ledger>,
    bytes: u64,
    pub concessions: Vec<Concession>,
}

impl Claim {
    /// Looks at what the kernel counts, and drops weights from memory if it is too much.
    pub fn enforce(&self) {
        let ledger = &self.ledger;
        let Some(statm) = statm() else {
            return;
        };
        let memory = ledger.held().memory;
        let over = (statm.anonymous + statm.file).saturating_sub(memory);
        if over == 0 {
            return;
        }
        if ledger.experts.is_some() {
            ledger.trim(over);
        } else {
            let mut held = ledger.held();
            held.withheld += over.min(held.weights);
            held.weights = held.weights.saturating_sub(over);
            ledger.limit(held.weights);
        }
        ledger.overruns.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it was too much.
    pub fn overruns(&self) -> u64 {
        self.ledger.overruns.load(Ordering::Relaxed)
    }

    /// As much once more, for another session of the same kind.
    pub fn again(&self) -> Result<Self> {
        self.another(self.bytes)
    }

    /// `bytes` beside what has been promised, for what this session has and keeps.
    pub fn another(&self, bytes: u64) -> Result<Self> {
        let ledger = &self.ledger;
        let mut held = ledger.held();
        let (memory, sessions) = (held.memory, held.sessions + bytes);
        ledger.share(&mut held, memory, sessions)?;
        Ok(Self {
            ledger: Arc::clone(ledger),
            bytes,
            concessions: self.concessions.clone(),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.ledger.held();
        let (memory, sessions) = (held.memory, held.sessions - self.bytes);
        if self.ledger.share(&mut held, memory, sessions).is_err() {
            held.sessions = sessions; // what weights have stays as it is
        }
    }
}

/// Anonymous and file-resident bytes of this process now; what a small program has where the system does not tell.
pub(super) fn resident() -> (u64, u64) {
    Resident::now().map_or((2 << 20, 4 << 20), |r| (r.anonymous, r.file))
}
