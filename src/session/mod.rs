//! One timeline: tokens, what the layers remember of them, the logits after the last.
//!
//! The one place where file, tokenizer, network and backend are put together.

mod budget;
pub mod calibration;
mod chat;
pub mod chunks;
mod embed;
mod engine;
mod experts;
mod fallback;
mod file;
mod generate;
#[cfg(feature = "gpu")]
mod gpu_plan;
mod plan;
mod profiled;
mod record;
mod repack;
mod replace;
#[cfg(feature = "gpu")]
mod split;
mod timeline;

pub use self::budget::{Concession, OnExceed};
pub use self::chat::{Chat, Resumed};
pub use self::embed::{Pooling, embed};
pub use self::experts::ExpertOptions;
pub use self::file::{Extra, MAX_NOTE_BYTES, StateFile};
pub use self::generate::{Event, Finish, GenerateOptions, Reply, Stats, generate};
#[cfg(feature = "gpu")]
pub use self::gpu_plan::GpuPlan;
pub use self::plan::{ExpertPlan, Footprint, Plan, Rates, Speed, UNCERTAINTY};
pub use self::profiled::{load_profiled, run_profiled};
pub use self::repack::Repack;
pub use self::timeline::Snapshot;

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use self::budget::{Claim, Ledger};
use self::engine::{Engine, Loaded};
use self::file::Hashes;
use self::timeline::Timeline;
use crate::backend::cpu::residency::Residency;
use crate::backend::cpu::stored::StoredExperts;
use crate::backend::delta::Delta;
use crate::backend::planner::Tally;
use crate::backend::predictor::Predictor;
use crate::backend::select::{Chunking, KvOptions};
use crate::backend::{BackendKind, KvTypes, Step};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::experts::ExpertStore;
use crate::experts::disk::Disk;
use crate::gguf::{Gguf, ReadAhead, TensorInfo};
#[cfg(feature = "grammar")]
use crate::grammar::Lexicon;
use crate::grammar::ReplyFormat;
use crate::model::config::Config;
use crate::model::{Output, Pass};
use crate::profile::span::now;
use crate::profile::topology::Topology;
use crate::profile::{Trace, Work, machine};
use crate::sampler::{Constraint, Settings, preset};
use crate::sparsity::{Policy, Sparsity};
use crate::tokenizer::Tokenizer;

/// Context where neither caller nor file gives a smaller one: metadata often states more than models were trained on.
const MAX_DEFAULT_CTX: usize = 32_768;

/// Tokens of a prefill step unless the caller says otherwise.
const DEFAULT_BATCH: usize = 512;

/// Logits that [`Session::score`] holds at once.
const SCORE_FLOATS: usize = 8 << 20;

/// How a model is loaded.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Threads of the token loop; 0: what [`Topology::threads`](crate::profile::topology::Topology::threads) says.
    pub threads: usize,
    /// Threads that read a prompt; 0: as `threads`.
    pub threads_batch: usize,
    /// Who runs the operations.
    pub backend: BackendKind,
    /// Which GPU, where it is one: its number among [`adapters`](crate::backend::gpu::adapters); `None`: the first.
    pub device: Option<usize>,
    /// Layers of the model on the GPU, the last ones, with the head; the others run on the CPU before them. `None`: all.
    pub gpu_layers: Option<usize>,
    /// Whether experts, and the routers that choose them, stay on the CPU where the rest runs on a GPU.
    pub cpu_moe: bool,
    /// Bytes of the GPU's memory that may be used, by all models of the process. `None`: as many as its driver gives.
    pub gpu_memory: Option<u64>,
    /// A folder where the shaders of a GPU are kept as its driver has compiled them, so that the next process need not wait for
    /// that. `None`: nothing is written.
    pub gpu_cache: Option<PathBuf>,
    /// Whether sessions keep an account of their time: see [`Session::take_trace`].
    pub trace: bool,
    /// Bytes that the process may have in memory, all together: the model, its sessions, the program and what else the
    /// process holds. `None`: as many as the system gives.
    pub memory: Option<u64>,
    /// What to do where they do not suffice for a session.
    pub on_exceed: OnExceed,
    /// How experts are kept that do not all fit.
    pub experts: ExpertOptions,
    /// Whether matrices are copied for decoding.
    pub repack: Repack,
    /// Ends the loading from another thread.
    pub cancel: Cancel,
}

/// How a session is made.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Tokens that it can hold; 0: what the model was made for, at most 32768.
    pub n_ctx: usize,
    /// Types of cached keys and values.
    pub kv: KvTypes,
    /// Which keys queries attend to.
    pub sparsity: Sparsity,
    /// Tells where chunks of keys end, if `sparsity` is [`Chunking::Predict`].
    pub predictor: Option<Arc<Predictor>>,
    /// How scores with all keys are computed, where not as whole products.
    pub delta: Option<Arc<Delta>>,
    /// Tokens of a prefill step; 0: 512.
    pub batch: usize,
}

impl SessionOptions {
    /// How attention is not dense and exact: `dense` if it is.
    pub fn attention(&self) -> String {
        let mut sparsity = self.sparsity.to_string();
        if let Some(predictor) = &self.predictor {
            sparsity += &format!(", predictor {:016x}", predictor.hash);
        }
        match (&self.delta, self.sparsity.is_dense()) {
            (None, _) => sparsity,
            (Some(delta), true) => delta.to_string(),
            (Some(delta), false) => format!("{sparsity}; {delta}"),
        }
    }

    /// That a backend can do its attention.
    fn check_backend(&self, backend: BackendKind) -> Result<()> {
        if backend == BackendKind::Cpu || (self.sparsity.is_dense() && self.delta.is_none()) {
            return Ok(());
        }
        #[cfg(feature = "gpu")]
        if backend == BackendKind::Gpu {
            use crate::backend::select::{Rule, Select};
            return match &self.delta {
                None => self.sparsity.rule().map(drop),
                Some(delta) => Err(Error::Unsupported {
                    kind: "sparse attention on the GPU",
                    found: format!("DeltaLLM, {delta}"),
                    supported: Rule::SUPPORTED.into(),
                }),
            };
        }
        Err(Error::Unsupported {
            kind: "sparse attention of this backend",
            found: self.attention(),
            supported: "dense".into(),
        })
    }

    /// How caches are made.
    fn kv_options(&self) -> Result<KvOptions> {
        Ok(KvOptions {
            kinds: self.kv,
            select: self.sparsity.selector()?,
            predictor: self.predictor.clone(),
            delta: self.delta.clone(),
            ..KvOptions::default()
        })
    }
}

/// A model, ready to run. Clones share it.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    gguf: Gguf,
    /// A file without a vocabulary that we read can still be run on tokens.
    tokenizer: Result<Tokenizer>,
    network: Box<dyn Loaded>,
    backend: BackendKind,
    threads: Threads,
    /// What is being read; held so that it goes on.
    ahead: Option<ReadAhead>,
    is_outline: bool,
    /// Of an outline, where a plan starts from.
    base: OnceLock<Footprint>,
    /// How it was loaded.
    options: LoadOptions,
    /// Which weights are in memory.
    residency: Arc<Residency>,
    /// The network on the CPU, for sessions whose GPU fails.
    cpu: OnceLock<Box<dyn Loaded>>,
    /// Bytes of matrices that are copied for decoding.
    copied: u64,
    /// Where a budget is kept.
    ledger: Option<Arc<Ledger>>,
    /// Experts that are read when they are used.
    experts: Option<Arc<StoredExperts>>,
    info: ModelInfo,
    /// For state files: computed when the first is written or read.
    hashes: OnceLock<Hashes>,
    loading: Vec<(&'static str, Range<u64>)>,
    /// For constraints: made with the first.
    #[cfg(feature = "grammar")]
    lexicon: OnceLock<Lexicon>,
}

/// What a model is.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// `general.name`, or the file's name.
    pub name: String,
    /// Weights.
    pub n_params: u64,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Sizes.
    pub config: Config,
}

/// Bytes that a session holds beside the weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryReport {
    /// Keys and values.
    pub kv: usize,
    /// Memory of convolutions.
    pub conv: usize,
    /// Activations, logits, and what was [marked](Session::mark).
    pub scratch: usize,
}

impl Model {
    /// Maps the file at `path` and builds its network; weights are not read yet.
    ///
    /// # Errors
    /// If the file cannot be read, is no GGUF file, or holds a model that is not supported.
    pub fn load(path: &Path, options: &LoadOptions) -> Result<Self> {
        Self::load_from(|| Gguf::open(path), options, None)
    }

    /// The model in `bytes` of an open file, see [`Gguf::open_file`].
    ///
    /// # Errors
    /// As [`Model::load`], and [`Error::Invalid`] for a range that the file does not have or that begins at no multiple
    /// of 4.
    pub fn load_file(file: File, bytes: Range<u64>, options: &LoadOptions) -> Result<Self> {
        Self::load_from(|| Gguf::open_file(file, bytes), options, None)
    }

    /// The same, whose experts `disk` reads wherever the options have them read when they are used. Its files are the
    /// parts of the model.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn load_with_disk(path: &Path, options: &LoadOptions, disk: Box<dyn Disk>) -> Result<Self> {
        Self::load_from(|| Gguf::open(path), options, Some(disk))
    }

    fn load_from(
        open: impl FnOnce() -> Result<Gguf>,
        options: &LoadOptions,
        disk: Option<Box<dyn Disk>>,
    ) -> Result<Self> {
        let start = now();
        let gguf = open()?;
        let mapped = now();
        options.cancel.check()?;
        let found = experts::to_store(&gguf, options)?;
        // A budget decides itself which weights are in memory.
        let ahead = match options.memory {
            None if found.is_none() => read_ahead(&gguf),
            _ => None,
        };
        let threads = Threads::of(options);
        let residency = Arc::new(match found.is_some() {
            true => Residency::owned(experts::file_table(&gguf)?),
            false => Residency::unlimited(),
        });
        let open = |found| experts::open(&gguf, found, options, disk);
        let stored = found.as_ref().map(open).transpose()?;
        let (tokenizer, network) = rayon::join(
            || Tokenizer::from_gguf_unless(&gguf, &options.cancel),
            || engine::load(&gguf, options, threads, &residency, stored.clone()),
        );
        let network = network?;
        options.cancel.check()?;
        // Both at once.
        let loading = vec![
            ("file", start..mapped),
            ("network, tokenizer", mapped..now()),
        ];
        let experts = found.as_ref().zip(stored.clone());
        let kept = Arc::clone(&residency);
        let ledger = Ledger::open(&gguf, options, threads.most(), residency, experts)?;
        let mut model = Self::assemble(gguf, tokenizer, network, options, threads)?;
        let inner = model.inner();
        (inner.ahead, inner.loading, inner.ledger) = (ahead, loading, ledger);
        (inner.experts, inner.residency) = (stored, kept);
        Ok(model)
    }

    /// The model as the header of the file at `path` describes it; the weights may be missing. A session on it counts
    /// what the CPU would do, read and hold, and computes nothing.
    ///
    /// # Errors
    /// As [`Model::load`].
    pub fn outline(path: &Path, options: &LoadOptions) -> Result<Self> {
        Self::outline_of(Gguf::open_header(path)?, options)
    }

    /// The same of a model in `bytes` of an open file.
    ///
    /// # Errors
    /// As [`Model::load_file`].
    pub fn outline_file(file: File, bytes: Range<u64>, options: &LoadOptions) -> Result<Self> {
        Self::outline_of(Gguf::open_file_header(file, bytes)?, options)
    }

    fn outline_of(gguf: Gguf, options: &LoadOptions) -> Result<Self> {
        let threads = Threads::of(options);
        let network = engine::outline(&gguf, threads)?;
        let tokenizer = Err(Error::BadModel("an outline has no vocabulary".into()));
        let mut outline = Self::assemble(gguf, tokenizer, network, options, threads)?;
        outline.inner().is_outline = true;
        Ok(outline)
    }

    /// The parts of a model that was just made.
    fn inner(&mut self) -> &mut Inner {
        Arc::get_mut(&mut self.0).expect("nobody else has it yet")
    }

    /// The outline of the same file.
    fn outlined(&self) -> Result<Self> {
        if self.0.is_outline {
            return Ok(self.clone());
        }
        let options = LoadOptions {
            threads: self.n_threads(),
            threads_batch: self.n_threads_batch(),
            ..LoadOptions::default()
        };
        let mut outline = Self::outline_of(self.gguf().reopen_header()?, &options)?;
        outline.inner().copied = self.0.copied;
        Ok(outline)
    }

    fn assemble(
        gguf: Gguf,
        tokenizer: Result<Tokenizer>,
        network: Box<dyn Loaded>,
        options: &LoadOptions,
        threads: Threads,
    ) -> Result<Self> {
        let copied = repack::copied_bytes(&gguf, options);
        let path = gguf.path();
        let file_name = || {
            path.file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
        };
        let info = ModelInfo {
            name: gguf
                .metadata()
                .opt_str("general.name")?
                .map_or_else(file_name, str::to_owned),
            n_params: gguf.tensors().map(|t| t.n_elements() as u64).sum(),
            weight_bytes: gguf.tensors().map(|t| t.bytes as u64).sum(),
            config: network.config().clone(),
        };
        Ok(Self(Arc::new(Inner {
            gguf,
            tokenizer,
            network,
            backend: options.backend,
            threads,
            ahead: None,
            is_outline: false,
            base: OnceLock::new(),
            options: options.clone(),
            residency: Arc::new(Residency::unlimited()),
            cpu: OnceLock::new(),
            copied,
            ledger: None,
            experts: None,
            info,
            hashes: OnceLock::new(),
            loading: Vec::new(),
            #[cfg(feature = "grammar")]
            lexicon: OnceLock::new(),
        })))
    }

    /// The file.
    pub fn gguf(&self) -> &Gguf {
        &self.0.gguf
    }

    /// The vocabulary.
    ///
    /// # Errors
    /// If the file has none that is supported.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.0
            .tokenizer
            .as_ref()
            .map_err(|e| Error::BadModel(e.to_string()))
    }

    /// What replies of this model must be, for [`GenerateOptions::constraint`]. The first takes the time to make a tree of
    /// the vocabulary, and its memory, some tens of bytes a token; it stays with the model.
    ///
    /// # Errors
    /// [`Error::Grammar`], which says where; [`Error::Unsupported`] without the feature `grammar`; if the model has no
    /// vocabulary.
    pub fn constraint(&self, format: &ReplyFormat) -> Result<Arc<dyn Constraint>> {
        let tokenizer = self.tokenizer()?;
        #[cfg(feature = "grammar")]
        {
            let lexicon = match self.0.lexicon.get() {
                Some(lexicon) => lexicon,
                None => {
                    let new = Lexicon::new(tokenizer)?;
                    self.0.lexicon.get_or_init(|| new)
                }
            };
            lexicon.compile(format)
        }
        #[cfg(not(feature = "grammar"))]
        {
            let _ = tokenizer;
            Err(Error::Unsupported {
                kind: "form of replies",
                found: format.name().into(),
                supported: "any text (this library was built without the feature `grammar`)".into(),
            })
        }
    }

    /// What it is.
    pub fn info(&self) -> &ModelInfo {
        &self.0.info
    }

    /// Bytes of matrices that were copied for decoding, beside those in the file.
    pub fn copied_bytes(&self) -> u64 {
        self.0.copied
    }

    /// Sampling as the table of models and the file recommend it.
    pub fn recommended(&self) -> Settings {
        let info = self.info();
        let preset = preset(&info.config.architecture, &info.name);
        let mut settings = preset.map_or_else(Settings::default, Settings::for_model);
        settings.read_file(|key| {
            let key = format!("general.sampling.{key}");
            let value = self.gguf().metadata().get(&key)?;
            let integer = value.as_integer().map(|x| x.to_string());
            let float = || value.as_float().map(|x| x.to_string());
            integer
                .or_else(float)
                .or_else(|| value.as_str().map(str::to_owned))
        });
        settings
    }

    /// Who runs the operations.
    pub fn backend(&self) -> BackendKind {
        self.0.backend
    }

    /// The store of its experts, where they are read when they are used.
    pub fn experts(&self) -> Option<&ExpertStore> {
        self.0.experts.as_ref().map(|experts| experts.store())
    }

    /// The system is short of memory: gives up to `bytes` of experts back, whatever runs, and does with as much less until
    /// [`Model::set_memory`] or [`ExpertStore::set_budget`] says otherwise. What was given back.
    pub fn trim(&self, bytes: u64) -> u64 {
        match (&self.0.ledger, self.experts()) {
            (Some(ledger), _) => ledger.trim(bytes),
            (None, Some(experts)) => experts.trim(bytes),
            (None, None) => 0,
        }
    }

    /// Changes [`LoadOptions::memory`], at any time. Sessions keep what they have; weights or experts get what that
    /// leaves, and less of them stays in memory from the next pass on. No bit of a result depends on it.
    ///
    /// # Errors
    /// [`Error::OverBudget`] if the sessions and the least of weights or experts do not fit: nothing changes then.
    /// [`Error::Invalid`] if the model was loaded without a budget.
    pub fn set_memory(&self, memory: u64) -> Result<()> {
        let ledger = self.0.ledger.as_ref().ok_or_else(|| {
            Error::Invalid(
                "memory: the model was loaded without a budget, so it has none to change".into(),
            )
        })?;
        ledger.set_memory(memory)
    }

    /// That its caches can do what `delta` says.
    fn check_delta(&self, delta: &Delta) -> Result<()> {
        delta.check()?;
        let Some(factors) = &delta.factors else {
            return Ok(());
        };
        // An outline has no weights to tell its model by, and what is planned does not depend on it.
        if !self.0.is_outline && factors.model != self.hashes()?.model {
            return Err(Error::Invalid(
                "thresholds: expected some that were calibrated for this model, found those of another".into(),
            ));
        }
        let config = &self.0.info.config;
        let of_layer = |i: usize| config.n_kv_heads[i] * config.head_dim;
        let expected = (0..config.n_layers).map(of_layer);
        let found = factors.layers.iter().map(Vec::len);
        if !found.eq(expected) {
            return Err(Error::Invalid(
                "thresholds: expected one for each channel of this model's keys, found others"
                    .into(),
            ));
        }
        Ok(())
    }

    /// That chunks end as a predictor of this model says, if that was asked for.
    fn check_predictor(&self, options: &SessionOptions) -> Result<()> {
        let wanted = matches!(
            options.sparsity.policy,
            Policy::Dhsa {
                chunking: Chunking::Predict(_),
                ..
            }
        );
        let predictor = match (&options.predictor, wanted) {
            (None, false) => return Ok(()),
            (Some(predictor), true) => predictor,
            (None, true) => {
                return Err(Error::Invalid(
                    "chunks that end as predicted: expected a predictor, found none".into(),
                ));
            }
            (Some(_), false) => {
                return Err(Error::Invalid(format!(
                    "predictor: expected DHSA with chunks that end as predicted, found {}",
                    options.sparsity
                )));
            }
        };
        // See `check_delta`.
        if !self.0.is_outline && predictor.model != self.hashes()?.model {
            return Err(Error::Invalid(format!(
                "predictor: expected one that was trained for this model ({:032x}), found one for another ({:032x})",
                self.hashes()?.model,
                predictor.model
            )));
        }
        let config = &self.0.info.config;
        let widths = config.n_kv_heads.iter().map(|n| n * config.head_dim);
        let found = predictor.shape().width;
        match widths.filter(|n| *n > 0).find(|n| *n != found) {
            None => Ok(()),
            Some(width) => Err(Error::Invalid(format!(
                "predictor: expected one of keys of {width} floats, found {found}"
            ))),
        }
    }

    fn hashes(&self) -> Result<&Hashes> {
        if let Some(hashes) = self.0.hashes.get() {
            return Ok(hashes);
        }
        let hashes = Hashes::of(&self.0.gguf)?;
        Ok(self.0.hashes.get_or_init(|| hashes))
    }

    /// Threads of the token loop.
    pub fn n_threads(&self) -> usize {
        self.0.threads.decode
    }

    /// Threads that read a prompt.
    pub fn n_threads_batch(&self) -> usize {
        self.0.threads.prefill
    }

    /// The parts of loading, and when they ran on the clock of [`profile::span::now`](crate::profile::span::now).
    pub fn loading(&self) -> &[(&'static str, Range<u64>)] {
        &self.0.loading
    }
}

/// How many threads run a pass, by its step.
#[derive(Clone, Copy)]
struct Threads {
    decode: usize,
    prefill: usize,
}

impl Threads {
    /// Those that `options` ask for.
    fn of(options: &LoadOptions) -> Self {
        let decode = match options.threads {
            0 => Topology::of_this_machine().threads(),
            n => n,
        };
        let prefill = match options.threads_batch {
            0 => decode,
            n => n,
        };
        Self { decode, prefill }
    }

    /// The larger number.
    fn most(self) -> usize {
        self.decode.max(self.prefill)
    }
}

/// Begins to read what every token needs, the layers first, while the vocabulary is being built. Not if that is much
/// of the memory there is: pages that come when they are used do not push each other out.
fn read_ahead(gguf: &Gguf) -> Option<ReadAhead> {
    let is_expert = |t: &&TensorInfo| t.name.contains("_exps.");
    let needed: Vec<_> = gguf.tensors().filter(|t| !is_expert(t)).collect();
    let bytes: u64 = needed.iter().map(|t| t.bytes as u64).sum();
    if machine::memory_available().is_none_or(|free| bytes > free / 2) {
        return None;
    }
    let is_layer = |t: &&TensorInfo| t.name.starts_with("blk.");
    let (layers, rest): (Vec<_>, Vec<_>) = needed.into_iter().partition(is_layer);
    let names = layers.into_iter().chain(rest).map(|t| t.name.as_str());
    Some(gguf.read_ahead(names))
}

/// One timeline of tokens on a model.
pub struct Session {
    model: Model,
    engine: Box<dyn Engine>,
    line: Timeline,
    n_ctx: usize,
    batch: usize,
    kv: KvTypes,
    sparsity: Sparsity,
    predictor: Option<Arc<Predictor>>,
    delta: Option<Arc<Delta>>,
    n_replayed: usize,
    /// Why it left its GPU.
    fault: Option<String>,
    /// Whether its engine has not read the tokens yet.
    is_behind: bool,
    cancel: Cancel,
    /// Its part of the model's budget.
    claim: Option<Claim>,
}

impl Session {
    /// An empty timeline.
    ///
    /// # Errors
    /// If the options are out of range, the backend cannot be had, or the model's budget does not suffice.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Self> {
        let admitted = model.0.ledger.as_ref();
        let admitted = admitted.map(|ledger| ledger.admit(model, options));
        let (options, claim) = match admitted.transpose()? {
            Some((options, claim)) => (&options.clone(), Some(claim)),
            None => (options, None),
        };
        let n_ctx_train = model.info().config.n_ctx_train;
        let n_ctx = if options.n_ctx == 0 {
            n_ctx_train.min(MAX_DEFAULT_CTX)
        } else {
            options.n_ctx
        };
        let batch = if options.batch == 0 {
            DEFAULT_BATCH
        } else {
            options.batch
        };
        // Positions are rotated by f32 angles and counted in u32 by files; beyond this nothing is meant.
        if n_ctx > 1 << 24 {
            return Err(Error::Invalid(format!(
                "context: expected at most {} tokens, found {n_ctx}",
                1 << 24
            )));
        }
        let head_dim = model.info().config.head_dim;
        if options.kv.is_quantized() {
            let block = 32; // of both formats
            if !head_dim.is_multiple_of(block) {
                return Err(Error::Invalid(format!(
                    "cache type: expected f16 or f32, since heads of {head_dim} are no whole blocks of {block}; found {} \
                     keys and {} values",
                    options.kv.keys.name(),
                    options.kv.values.name()
                )));
            }
            if !model.backend().caches(options.kv) {
                return Err(Error::Unsupported {
                    kind: "cache type of this backend",
                    found: format!("{}, {}", options.kv.keys.name(), options.kv.values.name()),
                    supported: "f32, f16, on a GPU q8_0".into(),
                });
            }
        }
        options.check_backend(model.backend())?;
        if let Some(delta) = &options.delta {
            model.check_delta(delta)?;
        }
        model.check_predictor(options)?;
        options
            .sparsity
            .check_layers(model.info().config.n_layers)?;
        let (mut engine, fault) = model.engine(&options.kv_options()?)?;
        // What may be used of a GPU was shared out for a full context.
        if model.0.options.gpu_memory.is_some() && fault.is_none() {
            engine.reserve(0..n_ctx)?;
        }
        Ok(Self {
            model: model.clone(),
            engine,
            fault,
            is_behind: false,
            line: Timeline::default(),
            n_ctx,
            batch,
            kv: options.kv,
            sparsity: options.sparsity,
            predictor: options.predictor.clone(),
            delta: options.delta.clone(),
            n_replayed: 0,
            cancel: Cancel::default(),
            claim,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// From now on work ends with [`Error::Cancelled`] where `cancel` says so, in the middle of a pass too. The session
    /// then holds what was complete, and with a flag that is not set goes on as if nothing had been stopped.
    pub fn set_cancel(&mut self, cancel: &Cancel) {
        self.cancel = cancel.clone();
        self.engine.set_cancel(cancel);
    }

    /// The tokens so far.
    pub fn tokens(&self) -> &[u32] {
        &self.line.tokens
    }

    /// How another one like this is made.
    pub fn options(&self) -> SessionOptions {
        SessionOptions {
            n_ctx: self.n_ctx,
            kv: self.kv,
            sparsity: self.sparsity,
            predictor: self.predictor.clone(),
            delta: self.delta.clone(),
            batch: self.batch,
        }
    }

    /// Which keys queries attend to.
    pub fn sparsity(&self) -> &Sparsity {
        &self.sparsity
    }

    /// Types of cached keys and values.
    pub fn kv_types(&self) -> KvTypes {
        self.kv
    }

    /// Tokens that the session can hold.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// What was given up for the model's budget.
    pub fn concessions(&self) -> &[Concession] {
        self.claim.as_ref().map_or(&[], |claim| &claim.concessions)
    }

    /// How often more than the model's budget was in memory after a step, so that weights were dropped.
    pub fn overruns(&self) -> u64 {
        self.claim.as_ref().map_or(0, Claim::overruns)
    }

    /// The logits after the last token, `(n_vocab)`. Empty if there is none, and after [`Session::truncate`], unless
    /// the position was [marked](Session::mark), and where the [largest](Session::top) alone are known, until
    /// [`Session::recall_logits`].
    pub fn logits(&self) -> &[f32] {
        &self.line.logits
    }

    /// The largest logits after the last token and their tokens, the largest first and of equals the lower token: as many
    /// as [`Session::decode_top`] was asked for, where that spared reading them all; else none, and all are there.
    pub fn top(&self) -> &[(u32, f32)] {
        &self.line.top
    }

    /// Appends `tokens`, in steps of the batch size. `progress` is told the tokens done and their total after each
    /// step; if it breaks, the session holds what was done.
    ///
    /// # Errors
    /// If the tokens do not fit, are none of the vocabulary, memory is missing, weights cannot be read, or `progress`
    /// breaks. The session then holds what the steps before did.
    pub fn prefill(
        &mut self,
        tokens: &[u32],
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<()> {
        self.check(tokens)?;
        let mut done = 0;
        for chunk in tokens.chunks(self.batch) {
            done += chunk.len();
            let last = done == tokens.len();
            self.forward(
                Step::Prefill,
                chunk,
                if last { chunk.len() - 1 } else { chunk.len() },
            )?;
            if progress(done, tokens.len()).is_break() && !last {
                return Err(Error::Cancelled);
            }
        }
        Ok(())
    }

    /// Appends one token.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode(&mut self, token: u32) -> Result<()> {
        self.decode_top(token, 0)
    }

    /// Appends one token, after which the `k` largest logits are all that is wanted; 0: all of them. Unless `k` is too
    /// large for that to be faster, [`Session::top`] has those, and the others stay where they were computed.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn decode_top(&mut self, token: u32, k: usize) -> Result<()> {
        self.check(&[token])?;
        self.forward_to(Output::Logits, Step::Decode, &[token], 0, k)
    }

    /// Appends `tokens` and calls `each` with the position and the logits after every one of them, until it breaks.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn score(
        &mut self,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]) -> ControlFlow<()>,
    ) -> Result<()> {
        self.check(tokens)?;
        let n_vocab = self.model.info().config.n_vocab;
        for chunk in tokens.chunks((SCORE_FLOATS / n_vocab).clamp(1, self.batch)) {
            let start = self.line.tokens.len();
            self.forward(Step::Prefill, chunk, 0)?;
            // Only the last row stays as "the logits"; the others go by.
            for (i, logits) in self.line.logits.chunks_exact(n_vocab).enumerate() {
                if each(start + i, logits).is_break() {
                    self.keep_last_logits(n_vocab);
                    return Err(Error::Cancelled);
                }
            }
            self.keep_last_logits(n_vocab);
        }
        Ok(())
    }

    /// Appends `tokens` and calls `each` with the position and the hidden state, `(hidden)`, of every one of them: what
    /// the head makes logits of, after the final norm. Until it breaks.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn hidden_states(
        &mut self,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]) -> ControlFlow<()>,
    ) -> Result<()> {
        self.check(tokens)?;
        let hidden = self.model.info().config.hidden;
        for chunk in tokens.chunks(self.batch) {
            let start = self.line.tokens.len();
            let done = self.forward_to(Output::Hidden, Step::Prefill, chunk, 0, 0);
            let states = std::mem::take(&mut self.line.logits); // they are none
            done?;
            for (i, state) in states.chunks_exact(hidden).enumerate() {
                if each(start + i, state).is_break() {
                    return Err(Error::Cancelled);
                }
            }
        }
        Ok(())
    }

    /// Bytes held beside the weights.
    pub fn memory(&self) -> MemoryReport {
        let (kv, conv) = self.engine.state_bytes();
        MemoryReport {
            kv,
            conv,
            scratch: self.engine.scratch_bytes() + self.line.bytes(),
        }
    }

    /// What the backend has done for this session so far.
    pub fn work(&self) -> Work {
        self.engine.work()
    }

    /// Every operation since the last call, where the model was loaded with [`LoadOptions::trace`]. There is room for some
    /// tens of passes; a trace that lost some says so.
    pub fn take_trace(&mut self) -> Option<Trace> {
        self.engine.take_trace()
    }

    /// What the operations have done so far, where the backend tells them apart: on an outline.
    pub fn tallies(&self) -> Vec<Tally> {
        self.engine.tallies()
    }

    fn check(&self, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.model.info().config.n_vocab;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            return Err(Error::Invalid(format!(
                "token: expected a number below {n_vocab}, found {token}"
            )));
        }
        let needed = self.line.tokens.len() + tokens.len();
        if needed > self.n_ctx {
            return Err(Error::ContextFull {
                needed,
                n_ctx: self.n_ctx,
            });
        }
        Ok(())
    }

    fn forward(&mut self, step: Step, tokens: &[u32], output_from: usize) -> Result<()> {
        self.forward_to(Output::Logits, step, tokens, output_from, 0)
    }

    /// Runs a pass, whose output becomes the logits of the line, whatever it is.
    fn forward_to(
        &mut self,
        output: Output,
        step: Step,
        tokens: &[u32],
        output_from: usize,
        k: usize,
    ) -> Result<()> {
        self.or_on_cpu(|session| session.forward_once(output, step, tokens, output_from, k))
    }

    fn forward_once(
        &mut self,
        output: Output,
        step: Step,
        tokens: &[u32],
        output_from: usize,
        k: usize,
    ) -> Result<()> {
        self.cancel.check()?;
        self.rebuild()?;
        let start = self.line.tokens.len();
        self.engine.reserve(start..start + tokens.len())?;
        let pass = Pass {
            tokens,
            input: None,
            start,
            output,
            output_from,
            step,
            write_kv: true,
            follows: k == 1 && step == Step::Decode && start + 1 < self.n_ctx,
        };
        let exact_from = self.line.exact_from.take(); // until the pass has run
        let (top, logits) = (&mut self.line.top, &mut self.line.logits);
        self.engine.forward_top(&pass, k, top, logits)?;
        self.line.exact_from = exact_from;
        self.line.tokens.extend_from_slice(tokens);
        self.line.steps.resize(self.line.tokens.len(), step);
        if let Some(claim) = &self.claim {
            claim.enforce();
        }
        Ok(())
    }

    fn keep_last_logits(&mut self, n_vocab: usize) {
        let logits = &mut self.line.logits;
        let last = logits.len() - n_vocab;
        logits.copy_within(last.., 0);
        logits.truncate(n_vocab);
    }
}
