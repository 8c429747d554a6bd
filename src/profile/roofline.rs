//! What a machine can do at most (the roofline model: Williams, Waterman, Patterson, CACM 52(4), 2009), with some
//! number of threads, and the file in which that is kept.
//!
//! The file is one line of JSON and a line with its FNV-1a hash. One that is damaged, or was written by another version
//! or on another machine, counts as missing. It is written to a temporary, synced and renamed, so it is never half there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What a rate is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Bytes read from memory that the program has allocated.
    Anonymous,
    /// Bytes read from such memory on huge pages.
    HugePages,
    /// Bytes read from a mapped file that is in memory: where weights lie.
    Mapped,
    /// Multiplications and additions of 8-bit integers.
    Int8,
    /// Multiplications and additions of 16-bit floats of the bf16 kind.
    Bf16,
    /// Multiplications and additions of 32-bit floats.
    F32,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 6] = [
        Resource::Anonymous,
        Resource::HugePages,
        Resource::Mapped,
        Resource::Int8,
        Resource::Bf16,
        Resource::F32,
    ];
}

/// The best that one loop reached.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Rate {
    /// Of what.
    pub resource: Resource,
    /// The loop: a row of the kernel table.
    pub kernel: String,
    /// The level that it needs.
    pub level: String,
    /// Bytes or operations per second; whole numbers come back from a file as they were.
    pub per_second: u64,
}

/// What was measured, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Key {
    /// The CPU's name.
    pub cpu: String,
    /// Levels of the kernel table that it has.
    pub levels: Vec<String>,
    /// Version of this library.
    pub version: String,
    /// Threads.
    pub n_threads: usize,
}

/// The rates of a machine with some number of threads.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Roofline {
    /// What and where.
    pub key: Key,
    /// Seconds since 1970.
    pub measured_at: u64,
    /// Bytes of the memory that was read: more than caches hold.
    pub buffer_bytes: u64,
    /// Bytes of the last-level cache, where that is known.
    pub cache_bytes: Option<u64>,
    /// Thousandths of the time in which a thread waited for a core that another process had; 0 where that is unknown.
    pub disturbed: u64,
    /// Every loop.
    pub rates: Vec<Rate>,
}

/// Of the file: changes with its fields and with what the loops do.
const FORMAT: u32 = 3;

#[derive(Serialize, Deserialize)]
struct Stored<T> {
    format: u32,
    roofline: T,
}

impl Roofline {
    /// The best rate of `resource` among the loops of `levels`.
    pub fn best(&self, resource: Resource, levels: impl Fn(&str) -> bool) -> Option<&Rate> {
        let rates = self.rates.iter();
        rates
            .filter(|rate| rate.resource == resource && levels(&rate.level))
            .max_by_key(|rate| rate.per_second)
    }

    /// What `folder` keeps for `key`, if that is whole.
    pub fn load(folder: &Path, key: &Key) -> Option<Self> {
        let text = fs::read_to_string(folder.join(key.file_name())).ok()?;
        let (body, rest) = text.split_once('\n')?;
        if rest.trim_end() != hash(body) {
            return None;
        }
        let stored: Stored<Self> = serde_json::from_str(body).ok()?;
        let roofline = stored.roofline;
        (stored.format == FORMAT && roofline.key == *key).then_some(roofline)
    }

    /// Keeps it in `folder`, which is made if there is none.
    ///
    /// # Errors
    /// If the operating system refuses.
    pub fn save(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(self.key.file_name());
        let stored = Stored {
            format: FORMAT,
            roofline: self,
        };
        let body = serde_json::to_string(&stored).expect("all names are strings");
        let text = format!("{body}\n{}\n", hash(&body));
        replace(&path, text.as_bytes()).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }
}

impl Key {
    /// `roofline-intel-r-xeon-r-processor-2t-1f2e3d4c5b6a7988.json`: readable, and another for each key.
    fn file_name(&self) -> String {
        let plain = |c: char| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        };
        let name: String = self.cpu.chars().take(40).map(plain).collect();
        let words: Vec<&str> = name.split('-').filter(|word| !word.is_empty()).collect();
        let whole = format!("{} {} {}", self.cpu, self.levels.join(" "), self.version);
        format!(
            "roofline-{}-{}t-{}.json",
            words.join("-"),
            self.n_threads,
            hash(&whole)
        )
    }
}

/// FNV-1a of 64 bits, in hexadecimal digits.
fn hash(text: &str) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Puts a file where it is whole or as it was, whatever happens meanwhile; its folder is made if there is none.
pub(crate) fn replace(path: &Path, body: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let write = || {
        if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create(&temporary)?;
        file.write_all(body)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary); // it may never have been there
    })
}

/// Where a person's programs keep what can be made again, ours in a folder of its own. `None` where the system does
/// not say.
pub fn cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let absolute = |path: &PathBuf| path.is_absolute();
    let home = |below: &str| variable("HOME").map(|home| home.join(below));
    let folder = variable("XDG_CACHE_HOME").filter(absolute).or_else(|| {
        if cfg!(windows) {
            variable("LOCALAPPDATA")
        } else if cfg!(target_os = "macos") {
            home("Library/Caches")
        } else {
            home(".cache")
        }
    });
    folder.filter(absolute).map(|folder| folder.join("kinglet"))
}
