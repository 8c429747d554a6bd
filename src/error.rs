//! The one error type. A message names the object, what was expected and what was found.

use std::path::PathBuf;

/// Everything that files, arguments and callers can cause.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to open, read, map or write `path`.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file concerned.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// `path` is no model file that can be read: wrong magic, truncated, sizes that do not add up.
    #[error("{}: {what}", path.display())]
    BadFile {
        /// The file concerned.
        path: PathBuf,
        /// Object, expected, found.
        what: String,
    },
    /// A sound state file that is not for this model or these options.
    #[error("{}: {what}", path.display())]
    Mismatch {
        /// The file concerned.
        path: PathBuf,
        /// What is different.
        what: String,
    },
    /// A sound file that this build cannot run: architecture, tensor type, tokenizer.
    #[error("unsupported {kind} `{found}`; supported: {supported}")]
    Unsupported {
        /// What kind of thing: "architecture", "tensor type", "tokenizer".
        kind: &'static str,
        /// The name in the file.
        found: String,
        /// What is supported, separated by commas.
        supported: String,
    },
    /// Metadata or tensors of a model contradict each other or the architecture.
    #[error("{0}")]
    BadModel(String),
    /// The chat template of a model or the messages given to it are wrong.
    #[error("chat template: {0}")]
    Template(String),
    /// A schema or grammar for a reply is wrong, or the reply cannot go on within it.
    #[error("{0}")]
    Grammar(String),
    /// A prompt or a reply does not fit in the context.
    #[error("context full: {needed} tokens needed, {n_ctx} available")]
    ContextFull {
        /// Tokens that would have to be held.
        needed: usize,
        /// Tokens that the session can hold.
        n_ctx: usize,
    },
    /// An allocation was refused.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Its size.
        bytes: usize,
    },
    /// A memory budget does not suffice.
    #[error("over budget: {needed} bytes needed, {memory} allowed; {advice}")]
    OverBudget {
        /// What was asked for takes so much.
        needed: u64,
        /// The budget.
        memory: u64,
        /// What would help.
        advice: String,
    },
    /// A backend failed at work that it had taken on.
    #[error("{0}")]
    Backend(String),
    /// A GPU is of no use any more: what it held is lost, what a session was told is not.
    #[error("gpu: {fault}: {what}")]
    Device {
        /// How it failed.
        fault: DeviceFault,
        /// At what, or what its driver said.
        what: String,
    },
    /// An argument of the caller is out of its range.
    #[error("{0}")]
    Invalid(String),
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

/// How a GPU fails whoever uses it.
#[non_exhaustive]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceFault {
    /// It was removed, reset or hangs.
    Lost,
    /// It has no memory left, or no more than it may use.
    OutOfMemory,
    /// The system did not run what it was given: iOS does so to an app in the background.
    Refused,
}

impl std::fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeviceFault::Lost => "device lost",
            DeviceFault::OutOfMemory => "out of memory",
            DeviceFault::Refused => "work was not run",
        })
    }
}

/// The result type of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Adds the path to an error of the operating system.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io {
            path: path.into(),
            source,
        }
    }
}
