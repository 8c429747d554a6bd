//! What the standard library does not offer of a file: to leave no trace in the page cache.
#![allow(unsafe_code, reason = "advice about a descriptor is a call of libc")]

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

/// Opens a file whose reads go past the page cache.
///
/// # Errors
/// If the system has no such way, or not for this file system.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Opens a file whose reads go past the page cache.
///
/// # Errors
/// If the system has no such way, or not for this file system.
#[cfg(target_vendor = "apple")]
pub fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::fd::AsRawFd;
    let file = OpenOptions::new().read(true).open(path)?;
    // SAFETY: a call about a descriptor that is open; it touches no memory of ours.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_NOCACHE, 1) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(file),
    }
}

/// Opens a file whose reads go past the page cache.
///
/// # Errors
/// If the system has no such way, or not for this file system.
#[cfg(windows)]
pub fn open_direct(path: &Path) -> io::Result<File> {
    use std::os::windows::fs::OpenOptionsExt;
    const FILE_FLAG_NO_BUFFERING: u32 = 0x2000_0000;
    let mut options = OpenOptions::new();
    let options = options.read(true).custom_flags(FILE_FLAG_NO_BUFFERING);
    options.open(path)
}

/// Opens a file whose reads go past the page cache.
///
/// # Errors
/// If the system has no such way, or not for this file system.
#[cfg(not(any(
    target_os = "linux",
    target_os = "android",
    target_vendor = "apple",
    windows
)))]
pub fn open_direct(_: &Path) -> io::Result<File> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Drops what the page cache has of a range, if the system takes the advice.
#[allow(unused_variables, reason = "not every system has such advice")]
pub fn drop_cached(file: &File, offset: u64, len: usize) {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    {
        use std::os::fd::AsRawFd;
        // SAFETY: a call about a descriptor that is open; it touches no memory of ours.
        let _ = unsafe {
            libc::posix_fadvise(
                file.as_raw_fd(),
                offset as libc::off_t,
                len as libc::off_t,
                libc::POSIX_FADV_DONTNEED,
            )
        }; // what is refused stays, and the system drops it when it needs memory
    }
}

/// Reads at `offset`, whatever the position of the file.
pub fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, into, offset);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, into, offset);
}
