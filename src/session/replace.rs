//! A file replaced as a whole: written beside its place, synced, renamed. Whatever happens on the way, a crash
//! included, its name stands for the old contents or for the new.
//!
//! The temporary is locked as long as it is written, and the lock ends with its process: one that can be locked was
//! left behind by a crash, and the next to write here removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Error, Result};

/// Bytes that wait to be written together.
const BUFFER: usize = 256 << 10;

/// The operating system, where it writes; tests put one in its place that fails.
pub(super) trait Disk {
    /// Makes a file that nobody else can read, and that was not there.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Writes some of `bytes`.
    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<usize>;
    /// Waits until a file, or the names in a folder, are where a loss of power does not reach them.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Gives a file the name of another, in whose place it then is.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The operating system itself.
pub(super) struct Os;

impl Disk for Os {
    fn create(&self, path: &Path) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            options.mode(0o600); // what somebody said to a model is theirs
        }
        options.open(path)
    }

    fn write(&self, file: &mut File, bytes: &[u8]) -> io::Result<usize> {
        file.write(bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// A file as a disk writes it.
struct Out<'a> {
    disk: &'a dyn Disk,
    file: File,
}

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.write(&mut self.file, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts a file with what `contents` writes in the place of `path`.
pub(super) fn replace(
    disk: &dyn Disk,
    path: &Path,
    contents: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let Some(name) = path.file_name() else {
        let path = path.display();
        return Err(Error::Invalid(format!(
            "{path}: expected the name of a file"
        )));
    };
    remove_stale(disk, path, name);
    let temporary = temporary(path, name);
    let file = disk.create(&temporary).map_err(failed)?;
    let _ = file.try_lock(); // a file system without locks: nothing there is ever taken for stale
    let written =
        write(disk, file, contents).and_then(|file| disk.rename(&temporary, path).map(|()| file));
    if written.is_err() {
        let _ = disk.remove(&temporary); // the first error is the one to tell
    }
    written.map_err(failed)?;
    if cfg!(unix) {
        let folder = File::open(folder(path)).map_err(failed)?;
        disk.sync(&folder).map_err(failed)?;
    }
    Ok(())
}

/// Writes and syncs a file; the lock ends when what is returned is dropped.
fn write(
    disk: &dyn Disk,
    file: File,
    contents: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
) -> io::Result<File> {
    let mut out = BufWriter::with_capacity(BUFFER, Out { disk, file });
    let written = contents(&mut out).and_then(|()| out.flush());
    let (Out { file, .. }, _) = out.into_parts(); // what a failure left in the buffer is not wanted
    written?;
    disk.sync(&file)?;
    Ok(file)
}

fn folder(path: &Path) -> &Path {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// `.NAME.PROCESS-NUMBER.tmp`, in the same folder: a rename does not leave the file system.
fn temporary(path: &Path, name: &OsStr) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{n}.tmp", std::process::id()));
    path.with_file_name(temporary)
}

/// Removes the temporaries of `path` that nobody writes any more.
fn remove_stale(disk: &dyn Disk, path: &Path, name: &OsStr) {
    let (Some(name), Ok(entries)) = (name.to_str(), fs::read_dir(folder(path))) else {
        return; // only tidying up
    };
    for entry in entries.flatten() {
        let found = entry.file_name();
        let numbers = found
            .to_str()
            .and_then(|found| {
                found
                    .strip_prefix('.')?
                    .strip_prefix(name)?
                    .strip_prefix('.')
            })
            .and_then(|rest| rest.strip_suffix(".tmp")?.split_once('-'));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let ours = numbers.is_some_and(|(process, n)| digits(process) && digits(n));
        let stale = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if ours && stale() {
            let _ = disk.remove(&entry.path());
        }
    }
}
