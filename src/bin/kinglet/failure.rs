//! What can end a command before its time, and the exit code of each.

use std::error::Error as _;
use std::io;
use std::process::ExitCode;

use kinglet::{DeviceFault, Error};

use crate::ui;

/// Exit code of wrong arguments.
pub const USAGE: u8 = 2;
/// Exit code after Ctrl-C: 128 + SIGINT.
pub const INTERRUPTED: u8 = 130;

/// Why a command ended early.
#[derive(Debug)]
pub enum Failure {
    /// The library said so.
    Library(Error),
    /// Arguments that contradict each other or what they name.
    Usage(String),
    /// Standard output or input failed.
    Stream(io::Error),
    /// Ctrl-C.
    Interrupted,
}

/// What a command returns.
pub type Outcome<T = ()> = Result<T, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Cancelled => Failure::Interrupted,
            error => Failure::Library(error),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Stream(error)
    }
}

impl Failure {
    /// Wrong arguments.
    pub fn usage(what: impl Into<String>) -> Self {
        Failure::Usage(what.into())
    }

    /// One line to stderr, and the exit code.
    pub fn report(&self) -> ExitCode {
        if let Some(line) = self.line() {
            ui::note(&format!("error: {}", ui::one_line(&line)));
        }
        ExitCode::from(self.code())
    }

    /// What to tell; `None` where the person knows.
    pub fn line(&self) -> Option<String> {
        match self {
            Failure::Library(error) => Some(chain(error)),
            Failure::Usage(what) => Some(what.clone()),
            Failure::Stream(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
            Failure::Stream(error) => Some(format!("standard input or output: {error}")),
            Failure::Interrupted => None,
        }
    }

    fn code(&self) -> u8 {
        match self {
            Failure::Library(error) => match error {
                Error::Invalid(_) | Error::Grammar(_) => USAGE,
                Error::BadFile { .. }
                | Error::Mismatch { .. }
                | Error::BadModel(_)
                | Error::Unsupported { .. }
                | Error::Template(_) => 3,
                Error::OutOfMemory { .. } | Error::OverBudget { .. } => 4,
                Error::Device { fault, .. } if *fault == DeviceFault::OutOfMemory => 4,
                Error::Io { .. } => 5,
                Error::ContextFull { .. } => 7,
                _ => 1,
            },
            Failure::Usage(_) => USAGE,
            // Who reads has had enough: `kinglet … | head` is no error.
            Failure::Stream(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            Failure::Stream(_) => 5,
            Failure::Interrupted => INTERRUPTED,
        }
    }
}

/// The error and its causes, but for those that it quotes already.
fn chain(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = error.source();
    }
    line
}
