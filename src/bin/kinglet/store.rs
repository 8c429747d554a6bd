//! What the program keeps for its user: the history of the prompt, sessions by name.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Outcome};

/// `$XDG_STATE_HOME/kinglet`, else `~/.local/state/kinglet`, with `below` in it: a folder that only its owner can read.
pub fn state_folder(below: &str) -> Option<PathBuf> {
    let absolute = |name: &str| {
        let path = PathBuf::from(std::env::var_os(name)?);
        path.is_absolute().then_some(path)
    };
    let state =
        absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    let folder = state.join("kinglet").join(below);
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::DirBuilderExt;
        builder.mode(0o700);
    }
    builder.create(&folder).ok()?;
    Some(folder)
}

/// The place of a session, which no other chat uses as long as this lives.
pub struct SessionFile {
    path: PathBuf,
    /// Locked until it is closed.
    _lock: File,
}

impl SessionFile {
    /// That of the session called `name`.
    pub fn open(name: &str) -> Outcome<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(plain)
        {
            return Err(Failure::usage(format!(
                "--session: expected a name of letters, digits, `-`, `_` and `.`, found `{name}`"
            )));
        }
        let folder = state_folder("sessions").ok_or_else(|| {
            Failure::usage("--session: no folder to keep it in: neither HOME nor XDG_STATE_HOME")
        })?;
        let path = folder.join(format!("{name}.state"));
        let lock_path = folder.join(format!("{name}.lock"));
        let io = |e| kinglet::Error::io(&lock_path, e);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let lock = options.open(&lock_path).map_err(io)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Failure::usage(format!(
                "--session {name}: another chat has it open"
            ))),
            // A file system without locks: better unguarded than not at all.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { path, _lock: lock }),
        }
    }

    /// The state file, which may not exist yet.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
