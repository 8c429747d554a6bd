//! The arguments of every verb. Names are llama.cpp's where it has them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kinglet::experts::{IoMode, PolicyKind, Prefetch};
use kinglet::grammar::ReplyFormat;
use kinglet::sampler::{Settings, Source};
use kinglet::session::{ExpertOptions, GenerateOptions, OnExceed, Pooling, Repack};
use kinglet::{BackendKind, KvType, KvTypes, Model, Session, SessionOptions};

use crate::attention::AttentionArgs;
use crate::device::DeviceArgs;

use crate::failure::Outcome;
use crate::ui;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 2 wrong arguments, 3 bad or unsupported model file, 4 out of memory or over budget, 5 input or output failed, \
7 context full, 130 Ctrl-C.

MODEL is the path of a GGUF file. Without it: $KINGLET_MODEL, else models/lfm2-smol-Q4_0.gguf here or beside the program.";

/// An on-device LLM runtime: quantized GGUF models on the CPU.
#[derive(Parser)]
#[command(name = "kinglet", version, after_help = EXIT_CODES, disable_help_subcommand = true, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Talk to a model.
    Chat(ChatArgs),
    /// Answer one prompt, or continue a text.
    Run(RunArgs),
    /// Turn texts into vectors.
    Embed(EmbedArgs),
    /// Show what a model will need and how fast it will be, from its header alone.
    Plan(PlanArgs),
    /// Show what a model file holds: header, metadata, tensors, problems.
    Inspect(InspectArgs),
    /// Show what a model is, and with which values it is sampled.
    Show(ShowArgs),
    /// Show the tokens of a text.
    Tokenize(TokenizeArgs),
    /// Write a model file in a smaller format.
    Quantize(QuantizeArgs),
    /// Measure how well a model predicts a text.
    Eval(EvalArgs),
    /// Find what a lossy option needs to know of a model.
    Calibrate(CalibrateArgs),
    /// Measure how fast models run.
    Bench(BenchArgs),
    /// Keep a core busy until stdin ends: the other processes of `bench --busy`.
    #[command(hide = true)]
    Spin,
    /// Show where the time of each token goes.
    Profile(ProfileArgs),
    /// Ask what a run of a mixture of experts would have read with other policies or more memory.
    #[command(subcommand)]
    Experts(ExpertsCommand),
    /// Show this machine as Kinglet sees it: CPU, kernels, memory.
    Doctor(DoctorArgs),
    /// Write a completion script for a shell.
    Completions(CompletionsArgs),
}

/// Which model, on what.
#[derive(Args)]
pub struct ModelArgs {
    /// A GGUF file; without it the small model.
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// The same as MODEL.
    #[arg(
        short = 'm',
        long = "model",
        value_name = "MODEL",
        conflicts_with = "model"
    )]
    model_flag: Option<String>,
    /// Threads [default: as many as there are fast cores for this process]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Threads that read the prompt; also `-tb` [default: as --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads_batch: Option<u16>,
    /// Taken for llama.cpp's sake: nothing is run before the first token
    #[arg(long, hide = true)]
    no_warmup: bool,
    /// Who computes
    #[arg(long, value_name = "NAME", default_value = BackendKind::default().name(), value_parser = backends(), conflicts_with = "device")]
    backend: BackendKind,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// The backends of this build.
fn backends() -> impl TypedValueParser<Value = BackendKind> {
    PossibleValuesParser::new(BackendKind::ALL.iter().map(|kind| kind.name()))
        .map(|name| BackendKind::from_name(&name).expect("one of their names"))
}

/// A backend to compare ours with.
fn other_backend(name: &str) -> Result<BackendKind, String> {
    let others = BackendKind::ALL.iter().filter(|k| **k != BackendKind::Cpu);
    let names: Vec<_> = others.map(|kind| kind.name()).collect();
    match BackendKind::from_name(name).filter(|_| names.contains(&name)) {
        Some(kind) => Ok(kind),
        None if names.is_empty() => Err("this build has none but ours".into()),
        None => Err(format!("expected {}", names.join(" or "))),
    }
}

impl ModelArgs {
    /// MODEL as it was given.
    pub fn name(&self) -> Option<&str> {
        self.model.as_deref().or(self.model_flag.as_deref())
    }

    /// Threads; 0: as many as there are fast cores.
    pub fn n_threads(&self) -> usize {
        self.threads.unwrap_or(0).into()
    }

    /// Threads that read the prompt; 0: as many as decode.
    pub fn n_threads_batch(&self) -> usize {
        self.threads_batch.unwrap_or(0).into()
    }

    /// Who computes.
    pub fn backend(&self) -> BackendKind {
        self.backend
    }
}

/// How much memory there is.
#[derive(Args)]
pub struct BudgetArgs {
    /// Memory for everything together: 800M, 2G; weights, keys and values, scratch, vocabulary, program
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Where it does not suffice: give something up, or refuse [default: degrade]
    #[arg(long, value_name = "WHAT", requires = "memory")]
    on_exceed: Option<Exceed>,
    /// Copy matrices for decoding, as much memory again: for small models without --memory, always, never
    #[arg(long, value_name = "WHEN", default_value = Repack::default().name(), value_parser = repacks())]
    repack: Repack,
    #[command(flatten)]
    experts: ExpertArgs,
}

/// How experts are kept that do not all fit in memory.
#[derive(Args)]
struct ExpertArgs {
    /// Memory for the experts of a model; they are read when they are used [default: what --memory leaves]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    expert_cache: Option<u64>,
    /// How far ahead experts are read: when a router has named them, or guesses too
    #[arg(long, value_name = "WHAT", default_value = Prefetch::default().name(), value_parser = prefetches())]
    prefetch: Prefetch,
    /// Threads that read experts, or reads that are under way at once with `--io uring`
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u8).range(1..=64))]
    io_threads: u8,
    /// How they read: past the system's cache, through it, as the file allows, or past it by one thread with io_uring
    #[arg(long, value_name = "HOW", default_value = "auto")]
    io: Io,
    /// Which expert makes room for another
    #[arg(long, value_name = "POLICY", default_value = PolicyKind::default().name(), value_parser = policies())]
    expert_policy: PolicyKind,
    /// Neither keep which experts were used, beside the model or in the cache folder, nor begin with them
    #[arg(long)]
    no_expert_usage: bool,
    /// Write what routers ask for to this file, for `kinglet experts replay`
    #[arg(long, value_name = "FILE")]
    expert_trace: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Io {
    Auto,
    Direct,
    Buffered,
    Uring,
}

/// When matrices are copied, for a parser.
fn repacks() -> impl TypedValueParser<Value = Repack> {
    PossibleValuesParser::new(Repack::ALL.map(Repack::name))
        .map(|name| Repack::from_name(&name).expect("one of their names"))
}

/// The ways to read ahead, for a parser.
fn prefetches() -> impl TypedValueParser<Value = Prefetch> {
    PossibleValuesParser::new(Prefetch::ALL.map(Prefetch::name))
        .map(|name| Prefetch::from_name(&name).expect("one of their names"))
}

/// The policies of experts, for a parser.
fn policies() -> impl TypedValueParser<Value = PolicyKind> {
    PossibleValuesParser::new(PolicyKind::ALL.map(PolicyKind::name))
        .map(|name| PolicyKind::from_name(&name).expect("one of their names"))
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Exceed {
    Degrade,
    Refuse,
}

impl BudgetArgs {
    /// Whether matrices are copied for decoding.
    pub fn repack(&self) -> Repack {
        self.repack
    }

    pub fn memory(&self) -> Option<u64> {
        self.memory
    }

    pub fn experts(&self) -> ExpertOptions {
        let args = &self.experts;
        ExpertOptions {
            cache: args.expert_cache,
            prefetch: args.prefetch,
            io_threads: args.io_threads.into(),
            io: match args.io {
                Io::Auto => IoMode::Auto,
                Io::Direct => IoMode::Direct,
                Io::Buffered => IoMode::Buffered,
                Io::Uring => IoMode::Uring,
            },
            policy: args.expert_policy,
            remember: !args.no_expert_usage,
            trace: args.expert_trace.clone(),
        }
    }

    pub fn on_exceed(&self) -> OnExceed {
        match self.on_exceed {
            Some(Exceed::Refuse) => OnExceed::Refuse,
            Some(Exceed::Degrade) | None => OnExceed::Degrade,
        }
    }
}

/// `800M`, `1.5GiB`, `2g`, `1000000`: units of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("expected a size like 800M or 1.5G, found `{text}`");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = text[digits.len()..].to_ascii_lowercase();
    let unit = unit.trim_end_matches('b').trim_end_matches('i');
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(bad()),
    };
    let number: f64 = digits.parse().map_err(|_| bad())?;
    let bytes = number * (1u64 << shift) as f64;
    // More than an exabyte is a slip, and less than nothing too.
    match bytes {
        _ if !(1.0..=1e18).contains(&bytes) => Err(bad()),
        _ => Ok(bytes as u64),
    }
}

/// The types of cached keys and values, for a parser.
fn cache_types() -> impl TypedValueParser<Value = KvType> {
    PossibleValuesParser::new(KvType::ALL.map(KvType::name)).map(|name| {
        let found = KvType::ALL.into_iter().find(|kind| kind.name() == name);
        found.expect("one of their names")
    })
}

/// In which types keys and values are cached.
#[derive(Args)]
pub struct CacheArgs {
    /// Type of cached keys and values [default: f16]
    #[arg(long, value_name = "TYPE", value_parser = cache_types())]
    cache_type: Option<KvType>,
    /// Type of cached keys alone
    #[arg(long, visible_alias = "ctk", value_name = "TYPE", value_parser = cache_types())]
    cache_type_k: Option<KvType>,
    /// Type of cached values alone
    #[arg(long, visible_alias = "ctv", value_name = "TYPE", value_parser = cache_types())]
    cache_type_v: Option<KvType>,
}

impl CacheArgs {
    pub fn types(&self) -> KvTypes {
        let both = self.cache_type.unwrap_or_default();
        KvTypes {
            keys: self.cache_type_k.unwrap_or(both),
            values: self.cache_type_v.unwrap_or(both),
        }
    }
}

/// How much a session holds, and in which type.
#[derive(Args)]
pub struct SessionArgs {
    /// Tokens that fit [default: what the model was made for, at most 32768]
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", value_parser = positive)]
    ctx: Option<usize>,
    /// Tokens read at once
    #[arg(short, long, visible_alias = "batch-size", value_name = "N", default_value = "512", value_parser = positive)]
    batch: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    attention: AttentionArgs,
}

fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(['s', 'm', 'h']);
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("expected a number with s, m or h".into()),
    };
    match digits.parse::<u64>() {
        Ok(n @ 1..=86_400) => Ok(Duration::from_secs(n * unit)),
        _ => Err("expected a whole number from 1 with s, m or h".into()),
    }
}

pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a whole number from 1".into()),
    }
}

impl SessionArgs {
    /// Says what had to be given up for a budget.
    pub fn open(&self, model: &Model) -> Outcome<Session> {
        let session = Session::new(model, &self.options())?;
        for concession in session.concessions() {
            ui::note(&format!("note: to stay within --memory, {concession}"));
        }
        Ok(session)
    }

    pub fn options(&self) -> SessionOptions {
        SessionOptions {
            n_ctx: self.ctx.unwrap_or(0),
            kv: self.cache.types(),
            sparsity: self.attention.sparsity,
            predictor: self.attention.predictor.clone(),
            delta: self.attention.delta.clone(),
            batch: self.batch,
        }
    }
}

macro_rules! sampling_args {
    ($($field:ident, $name:literal, $about:literal;)*) => {
        /// The values of the sampler chain. What is not given comes from the model file, else from a table of models.
        #[derive(Args)]
        #[command(next_help_heading = "Sampling")]
        pub struct SamplingArgs {
            $(
                #[doc = $about]
                #[arg(long = $name, value_name = "X", allow_negative_numbers = true)]
                $field: Option<String>,
            )*
        }

        impl SamplingArgs {
            /// Sets what was given.
            fn set(&self, settings: &mut Settings) -> Outcome {
                $(if let Some(text) = &self.$field {
                    settings.set($name, text, Source::Flag)?;
                })*
                Ok(())
            }
        }
    };
}

sampling_args! {
    temp, "temp", "Temperature; 0 takes the likeliest token";
    top_k, "top-k", "Keep the k likeliest tokens; 0 keeps all";
    top_p, "top-p", "Keep the likeliest tokens up to this probability; 1 keeps all";
    min_p, "min-p", "Keep tokens this likely relative to the likeliest; 0 keeps all";
    typical, "typical", "Keep tokens of typical surprise up to this probability; 1 keeps all";
    repeat_penalty, "repeat-penalty", "Factor against tokens that occurred; 1 is neutral";
    repeat_last_n, "repeat-last-n", "Tokens that the penalties look back; -1: all";
    presence_penalty, "presence-penalty", "Taken from the logits of tokens that occurred";
    frequency_penalty, "frequency-penalty", "Taken from the logits for each occurrence";
    seed, "seed", "Of the generator: a number, or `random`";
    samplers, "samplers", "Order: penalties;top_k;typ_p;top_p;min_p;temperature";
}

impl SamplingArgs {
    /// That what was given can be set, before a model is loaded for it.
    pub fn check(&self) -> Outcome {
        self.set(&mut Settings::default())
    }

    /// The values for a model.
    pub fn settings(&self, model: &Model) -> Outcome<Settings> {
        let mut settings = model.recommended();
        self.set(&mut settings)?;
        Ok(settings)
    }
}

/// When a reply ends.
#[derive(Args)]
pub struct EndArgs {
    /// Tokens of a reply at most; -1: no limit
    #[arg(short = 'n', long = "max-tokens", visible_aliases = ["predict", "n-predict"], value_name = "N",
          default_value = "-1", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    max_tokens: i64,
    /// A text that ends the reply; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Let the model not end by itself
    #[arg(long)]
    ignore_eos: bool,
    /// Replies are JSON by this schema: a file, or the schema itself
    #[arg(short = 'j', long, value_name = "FILE|{…}", conflicts_with = "grammar")]
    json_schema: Option<String>,
    /// Replies are texts of the Lark grammar in this file
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl EndArgs {
    pub fn options(&self, model: &Model) -> Outcome<GenerateOptions> {
        let schema = match self.json_schema.as_deref() {
            Some(text) if text.trim_start().starts_with('{') => Some(text.to_owned()),
            Some(path) => Some(ui::read_text(Path::new(path))?),
            None => None,
        };
        let grammar = self.grammar.as_deref().map(ui::read_text).transpose()?;
        let format = match (&schema, &grammar) {
            (Some(schema), _) => Some(ReplyFormat::JsonSchema(schema)),
            (None, Some(grammar)) => Some(ReplyFormat::Lark(grammar)),
            (None, None) => None,
        };
        let constraint = format.map(|format| model.constraint(&format)).transpose()?;
        Ok(GenerateOptions {
            max_tokens: usize::try_from(self.max_tokens).ok(),
            stop: self.stop.clone(),
            ignore_end: self.ignore_eos,
            continued: false,
            constraint,
            tools: false,
        })
    }
}

#[derive(Args)]
pub struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Instructions before the conversation
    #[arg(short, long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Keep the conversation under this name, and go on where it ended, without reading it again
    #[arg(long = "session", value_name = "NAME")]
    pub name: Option<String>,
    /// Neither greeting nor statistics
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub end: EndArgs,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The prompt; without it and -f it is read from stdin
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    pub prompt: Option<String>,
    /// A file with the prompt; `-`: stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Instructions before the prompt
    #[arg(short, long, value_name = "TEXT", conflicts_with = "raw")]
    pub system: Option<String>,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    /// With --raw: control tokens spelled in the text become control tokens
    #[arg(long, requires = "raw")]
    pub special: bool,
    /// Tools that the model may call, a JSON list in this file; calls are printed as lines of JSON
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    pub tools: Option<PathBuf>,
    /// Keep the prompt as it was read in this file, and read no more of the next than is different
    #[arg(long, value_name = "FILE")]
    pub prompt_cache: Option<PathBuf>,
    /// One JSON object with text, tokens, end and times
    #[arg(long)]
    pub json: bool,
    /// No statistics
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub end: EndArgs,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
pub struct EmbedArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A text; may be given several times. Without one each line of stdin is one
    #[arg(short = 'p', long = "prompt", value_name = "TEXT")]
    pub texts: Vec<String>,
    /// How the states of tokens become one vector; none: one for each token
    #[arg(long, value_name = "HOW", default_value = Pooling::default().name(), value_parser = poolings())]
    pub pooling: Pooling,
    /// Leave vectors as long as they are
    #[arg(long)]
    pub no_normalize: bool,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
}

/// The ways to pool, for a parser.
fn poolings() -> impl TypedValueParser<Value = Pooling> {
    PossibleValuesParser::new(Pooling::ALL.map(Pooling::name)).map(|name| {
        let found = Pooling::ALL.into_iter().find(|p| p.name() == name);
        found.expect("one of their names")
    })
}

#[derive(Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt whose time is told
    #[arg(short = 'p', long, value_name = "N", default_value = "512", value_parser = positive)]
    pub n_prompt: usize,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct InspectArgs {
    /// A GGUF file
    pub file: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Print the chat template alone, as it is
    #[arg(long, conflicts_with_all = ["json", "tensors"])]
    pub template: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Subcommand)]
pub enum ExpertsCommand {
    /// Replay the trace of a run: hits and bytes per token of each policy.
    Replay(ReplayArgs),
}

#[derive(Args)]
pub struct ReplayArgs {
    /// A trace of a run
    #[arg(value_name = "TRACE")]
    pub trace: PathBuf,
    /// Numbers of experts in memory [default: the least, a token's, an eighth, a quarter, a half, all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    pub slots: Vec<usize>,
    /// One JSON object for each line
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct ShowArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct TokenizeArgs {
    /// A GGUF file, if it ends in .gguf, and the text; without the text it is read from stdin
    #[arg(value_name = "[MODEL] [TEXT]", num_args = 0..=2)]
    pub model_and_text: Vec<String>,
    /// A GGUF file
    #[arg(short, long)]
    pub model: Option<String>,
    /// A file with the text; `-`: stdin
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Control tokens spelled in the text become control tokens
    #[arg(long)]
    pub special: bool,
    /// With the tokens that the model wants around a prompt
    #[arg(long)]
    pub bos: bool,
    /// One JSON object with the ids, and whether they decode to the text
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct QuantizeArgs {
    /// A GGUF file
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The file to write
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// The format, as llama.cpp names it: Q8_0, Q4_0, Q4_K_M
    #[arg(value_name = "TYPE")]
    pub to: String,
    /// Quantize again what is quantized already, at a further loss
    #[arg(long)]
    pub allow_requantize: bool,
    /// Threads [default: as many as there are cores for this process]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

#[derive(Args)]
pub struct CalibrateArgs {
    #[command(subcommand)]
    pub what: CalibrateCommand,
}

#[derive(Subcommand)]
pub enum CalibrateCommand {
    /// Thresholds of `--delta` for each channel of a model's keys, so that scores are off by as much in all layers.
    Delta(CalibrationArgs),
    /// A predictor of where chunks of keys end, for `--dhsa-chunk predict:N`.
    Chunks(CalibrationArgs),
}

#[derive(Args)]
pub struct CalibrationArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// A text
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub text: PathBuf,
    /// Where what was found is written
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Tokens of the text at most [default: 2048, for chunks 16384]
    #[arg(short = 'n', long, value_name = "N", value_parser = positive)]
    pub tokens: Option<usize>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct EvalArgs {
    #[command(subcommand)]
    pub what: EvalCommand,
}

#[derive(Subcommand)]
pub enum EvalCommand {
    /// Perplexity of a text, by llama-perplexity's method.
    Ppl(PplArgs),
    /// How far predictions are from those of dense attention over f16 keys and values.
    Kl(KlArgs),
    /// Whether a fact planted in a long text is found again.
    Needle(NeedleArgs),
    /// Whether pairs of random words are recalled: multi-query associative recall.
    Recall(RecallArgs),
}

/// How the session that is measured reads tokens and what it keeps of them.
#[derive(Args)]
pub struct ScoringArgs {
    /// Tokens read at once
    #[arg(short, long, visible_alias = "batch-size", value_name = "N", default_value = "512", value_parser = positive)]
    batch: usize,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    attention: AttentionArgs,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

impl ScoringArgs {
    /// The session that is measured.
    pub fn options(&self, n_ctx: usize) -> SessionOptions {
        SessionOptions {
            n_ctx,
            kv: self.cache.types(),
            sparsity: self.attention.sparsity,
            predictor: self.attention.predictor.clone(),
            delta: self.attention.delta.clone(),
            batch: self.batch,
        }
    }

    /// The session that it is compared with: what is lossy is off.
    pub fn dense(&self, n_ctx: usize) -> SessionOptions {
        SessionOptions {
            n_ctx,
            batch: self.batch,
            ..SessionOptions::default()
        }
    }
}

/// A text cut into windows.
#[derive(Args)]
pub struct WindowArgs {
    /// The text
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Tokens of a window, of which the second half is scored
    #[arg(short, long, visible_alias = "ctx-size", value_name = "N", default_value = "512", value_parser = positive)]
    pub ctx: usize,
    /// Windows at most
    #[arg(long, value_name = "N", value_parser = positive)]
    pub chunks: Option<usize>,
}

#[derive(Args)]
pub struct PplArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub windows: WindowArgs,
    #[command(flatten)]
    pub scoring: ScoringArgs,
}

#[derive(Args)]
pub struct KlArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub windows: WindowArgs,
    #[command(flatten)]
    pub scoring: ScoringArgs,
}

#[derive(Args)]
pub struct NeedleArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The text in which facts are hidden
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Lengths of prompts, in tokens
    #[arg(short, long, value_name = "N", default_value = "2048")]
    lengths: Numbers,
    /// Where facts lie, in per cent of the text
    #[arg(short, long, value_name = "N", default_value = "0-100+10")]
    depths: Numbers,
    /// Facts hidden at the same time; each is asked for
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    pub needles: usize,
    /// How often, each time with other facts and another part of the text
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    pub trials: usize,
    /// Read questions and numbers with dense attention, as is usual when sparse attention is published: what is
    /// sparse then is the reading of the text alone
    #[arg(long)]
    pub dense_tail: bool,
    /// Write the table as a heat map
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    #[command(flatten)]
    pub scoring: ScoringArgs,
}

impl NeedleArgs {
    pub fn lengths(&self) -> &[usize] {
        &self.lengths.0
    }

    pub fn depths(&self) -> &[usize] {
        &self.depths.0
    }
}

#[derive(Args)]
pub struct RecallArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Lengths of prompts, in tokens
    #[arg(short, long, value_name = "N", default_value = "2048")]
    lengths: Numbers,
    /// Pairs of words at the beginning, each asked for once
    #[arg(short, long, value_name = "N", default_value = "32", value_parser = positive)]
    pub pairs: usize,
    /// How often, each time with other words
    #[arg(long, value_name = "N", default_value = "1", value_parser = positive)]
    pub trials: usize,
    #[command(flatten)]
    pub scoring: ScoringArgs,
}

impl RecallArgs {
    pub fn lengths(&self) -> &[usize] {
        &self.lengths.0
    }
}

/// Numbers as llama-bench takes them: `1,2,4`, `1-4`, `64-256+64`, `1-8*2`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Numbers(Vec<usize>);

/// More would be a slip of the finger.
const MAX_NUMBERS: usize = 1000;

impl std::str::FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("expected numbers like 1,2 or 1-4 or 64-256+64 or 1-8*2, found `{text}`");
        let number = |text: &str| text.parse::<u32>().map(|n| n as usize).map_err(|_| bad());
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let Some((first, rest)) = part.split_once('-') else {
                numbers.push(number(part)?);
                continue;
            };
            let (last, step, times) = match (rest.split_once('+'), rest.split_once('*')) {
                (Some((last, step)), _) => (last, number(step)?, 1),
                (_, Some((last, times))) => (last, 0, number(times)?),
                _ => (rest, 1, 1),
            };
            let (mut n, last) = (number(first)?, number(last)?);
            while n <= last && numbers.len() <= MAX_NUMBERS {
                numbers.push(n);
                let next = n * times + step;
                if next <= n {
                    return Err(bad());
                }
                n = next;
            }
        }
        if numbers.is_empty() || numbers.len() > MAX_NUMBERS {
            return Err(bad());
        }
        Ok(Self(numbers))
    }
}

/// Tokens of a prompt and of a reply: `512,128`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PromptAndReply(pub usize, pub usize);

impl std::str::FromStr for PromptAndReply {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Numbers::from_str(text) {
            Ok(Numbers(numbers)) if numbers.len() == 2 && text.contains(',') => {
                Ok(Self(numbers[0], numbers[1]))
            }
            _ => Err(format!("expected two numbers like 512,128, found `{text}`")),
        }
    }
}

/// Rows of a matrix and their length: `2048x576`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape(pub usize, pub usize);

impl std::str::FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |_| format!("expected rows and row length like 2048x576, found `{text}`");
        let (n, k) = text.split_once('x').unwrap_or((text, ""));
        let number = |text: &str| text.parse::<u32>().map(|n| n as usize).map_err(bad);
        Ok(Self(number(n)?, number(k)?))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

#[derive(Args)]
#[command(after_help = BENCH_HELP)]
pub struct BenchArgs {
    /// GGUF files; without them the small model
    #[arg(value_name = "MODEL")]
    models: Vec<String>,
    /// The same as MODEL; may be given several times
    #[arg(short, long = "model", value_name = "MODEL")]
    model: Vec<String>,
    /// Tokens of a prompt, read at once; 0: no such test [default: 512]
    #[arg(short = 'p', long, value_name = "N")]
    n_prompt: Vec<Numbers>,
    /// Tokens decoded one by one; 0: no such test [default: 128]
    #[arg(short = 'n', long, value_name = "N")]
    n_gen: Vec<Numbers>,
    /// A prompt and then a reply, timed together; also `-pg`
    #[arg(long, value_name = "P,N")]
    pub pg: Vec<PromptAndReply>,
    /// Tokens that come before, not timed [default: 0]
    #[arg(short = 'd', long, value_name = "N")]
    n_depth: Vec<Numbers>,
    /// Tokens of a prompt given at once, with logits after the last [default: 2048]
    #[arg(short, long, value_name = "N")]
    batch_size: Vec<Numbers>,
    /// Tokens of a step of those; also `-ub` [default: 512]
    #[arg(long, value_name = "N")]
    ubatch_size: Vec<Numbers>,
    /// Threads [default: as many as there are fast cores for this process]
    #[arg(short, long, value_name = "N")]
    threads: Vec<Numbers>,
    /// Threads that read prompts; also `-tb` [default: as --threads]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads_batch: Option<u16>,
    /// Type of cached keys; also `-ctk` [default: f16]
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = cache_types())]
    pub cache_type_k: Vec<KvType>,
    /// Type of cached values; also `-ctv` [default: f16]
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_parser = cache_types())]
    pub cache_type_v: Vec<KvType>,
    #[command(flatten)]
    pub attention: AttentionArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Draw tokens in stretches of N out of 64 neighbouring numbers: for files that `models/synthetic.py --sticky` makes
    #[arg(long, value_name = "N", value_parser = positive)]
    pub stretch: Option<usize>,
    /// Decode the most likely token each time, as `--temp 0` does, of which nothing but its number is read: otherwise tokens
    /// are any and all logits are read
    #[arg(long)]
    pub greedy: bool,
    /// Times that each test is run
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = positive)]
    pub repetitions: usize,
    /// Format of the results
    #[arg(short, long, value_name = "FORMAT", default_value = "md")]
    pub output: Format,
    /// The same by other backends too, in turns with ours: gpu; ggml, ggml-repack, where the feature `ggml` has built them
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = other_backend, conflicts_with_all = ["first_token", "kernel"])]
    pub vs: Vec<BackendKind>,
    /// Time the first run too
    #[arg(long)]
    pub no_warmup: bool,
    /// Instead of the tests: the time from the start of a new process to its first token after a prompt of N tokens
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with_all = ["n_prompt", "n_gen", "pg", "n_depth", "device"])]
    pub first_token: Option<usize>,
    /// Instead of the tests: decode for so long (`90s`, `10m`, `1h`) and tell the speed of each twentieth of that, with clock
    /// and temperature: shows throttling
    #[arg(long, value_name = "TIME", value_parser = time, conflicts_with_all = ["n_prompt", "pg", "first_token", "vs", "kernel", "device"])]
    pub sustained: Option<Duration>,
    /// Instead of models: rows of the kernel table, by name
    #[arg(long, value_name = "NAME", value_delimiter = ',', conflicts_with_all = ["models", "model", "n_prompt", "n_gen", "pg", "n_depth"])]
    pub kernel: Vec<String>,
    /// Print the rows of the kernel table, and whether this CPU can run them
    #[arg(long)]
    pub list_kernels: bool,
    /// With --kernel: rows and row length of matrices, keys and head size of attention [default: as suits the kernel]
    #[arg(long, value_name = "NxK", value_delimiter = ',', requires = "kernel", conflicts_with_all = ["models", "model"])]
    pub shape: Vec<Shape>,
    /// With --kernel: tokens of a call [default: 1,512]
    #[arg(long, value_name = "N", requires = "kernel", conflicts_with_all = ["models", "model"])]
    tokens: Vec<Numbers>,
    /// Below the table: times of tokens, limits of the machine and what of them was reached, memory, barriers, kernels;
    /// CSV and JSON always have them
    #[arg(long)]
    pub details: bool,
    /// Do not measure the limits of the machine, though they are not known
    #[arg(long)]
    pub no_measure: bool,
    /// Processes that spin beside the measurement, to see it under contention
    #[arg(long, value_name = "N", default_value = "0", value_parser = clap::value_parser!(u16).range(..=256))]
    busy: u16,
    /// Seconds to wait before each test
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = clap::value_parser!(u64).range(..=3600))]
    pub delay: u64,
}

const BENCH_HELP: &str = "\
Flags, tests and columns are llama-bench's. Numbers can be lists and ranges (1,2  1-4  64-256+64  1-8*2) or be given \
several times; every combination is run. Rows: pp512 reads a prompt, tg128 decodes, `@ d4096` after so many tokens.";

impl BenchArgs {
    /// Threads that read prompts, if they are not those that decode.
    pub fn n_threads_batch(&self) -> Option<usize> {
        self.threads_batch.map(usize::from)
    }

    /// Processes that spin.
    pub fn n_busy(&self) -> usize {
        self.busy.into()
    }

    /// Models as they were given; a comma separates them unless a file has it in its name.
    pub fn models(&self) -> Vec<&str> {
        let names = self.models.iter().chain(&self.model).map(String::as_str);
        let apart = |name: &'_ str| std::path::Path::new(name).exists();
        names
            .flat_map(|name| {
                let whole = apart(name).then_some(name);
                let parts = name.split(',').filter(move |_| whole.is_none());
                whole.into_iter().chain(parts)
            })
            .collect()
    }
}

macro_rules! number_lists {
    ($($name:ident)*) => {
        impl BenchArgs {
            $(
                #[doc = concat!("The numbers of `", stringify!($name), "`, if any were given.")]
                pub fn $name(&self) -> Option<Vec<usize>> {
                    let numbers = || self.$name.iter().flat_map(|list| list.0.clone()).collect();
                    (!self.$name.is_empty()).then(numbers)
                }
            )*
        }
    };
}

number_lists! { n_prompt n_gen n_depth batch_size ubatch_size threads tokens }

/// llama.cpp's flags of several letters after one dash, which this parser would read letter by letter.
pub fn spelled_out(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let verb = arguments.get(1).and_then(|verb| verb.to_str());
    let is_bench = verb == Some("bench");
    if is_bench || matches!(verb, Some("chat" | "run" | "plan" | "profile" | "embed")) {
        for argument in &mut arguments[2..] {
            let long = match argument.to_str() {
                Some("-tb") => "--threads-batch",
                Some("-ngl") => "--gpu-layers",
                Some("-pg") if is_bench => "--pg",
                Some("-ub") if is_bench => "--ubatch-size",
                Some("-ctk") if is_bench => "--cache-type-k",
                Some("-ctv") if is_bench => "--cache-type-v",
                _ => continue,
            };
            *argument = long.into();
        }
    }
    arguments
}

#[derive(Args)]
#[command(after_help = PROFILE_HELP)]
pub struct ProfileArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt, without a meaning
    #[arg(short = 'p', long, value_name = "N", default_value = "512", value_parser = positive)]
    pub n_prompt: usize,
    /// Tokens of the reply, chosen with the model's own sampling values; 0: the prompt alone
    #[arg(short = 'n', long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u32).range(..=1 << 20))]
    pub n_gen: u32,
    #[command(flatten)]
    pub session: SessionArgs,
    #[command(flatten)]
    pub budget: BudgetArgs,
    /// Write every operation to a file that Perfetto (ui.perfetto.dev) and Chrome open
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Write one page with plots of tokens, layers, memory and the roofline
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
    /// Do not measure the limits of the machine and of the file, though they are not known
    #[arg(long)]
    pub no_measure: bool,
}

const PROFILE_HELP: &str = "\
Phases: load, prefill (the prompt), first token (its choice, and the first decoding pass), decode (all tokens after it). \
`% roof` is the least time that the machine's limits allow for the bytes and operations of a line, by the time it took; \
models that lie in a cache are compared with the rate at which their own file is read.";

#[derive(Args)]
pub struct DoctorArgs {
    /// Measure the roofline again, though it is kept
    #[arg(long)]
    pub measure: bool,
    /// Do not measure it, though it is missing
    #[arg(long, conflicts_with = "measure")]
    pub no_measure: bool,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct CompletionsArgs {
    pub shell: clap_complete::Shell,
}
