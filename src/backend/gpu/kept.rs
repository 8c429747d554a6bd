//! Pipelines as a driver has compiled them, kept in a folder for the next process: where a driver keeps none by itself, the
//! first token waits for its compiler otherwise.
//!
//! The file is `KNGLPIPE`, a checksum, then what the driver gave, by way of wgpu, which says what device and driver it is for.
//! One that is damaged, of another version of this program, or for another device counts as none. It is written to a
//! temporary, synced and renamed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use wgpu::Features;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::device::Device;
use super::pipeline;
use crate::profile::roofline::replace;

const MAGIC: &[u8; 8] = b"KNGLPIPE";

/// Bytes before those of the driver.
const HEAD: usize = 16;

/// A longer file is none of ours.
const MAX_BYTES: u64 = 256 << 20;

/// The pipelines of a device that are kept.
pub(super) struct Kept {
    pub(super) raw: wgpu::PipelineCache,
    path: PathBuf,
    /// Whether some were made since it was written.
    pub(super) grew: AtomicBool,
    /// The checksum of the file.
    saved: AtomicU64,
}

impl Kept {
    /// What `folder` keeps for a device, or nothing yet; `None` where drivers do not give it away.
    fn open(device: &Device, folder: &Path) -> Option<Self> {
        if !device.raw.features().contains(Features::PIPELINE_CACHE) {
            return None;
        }
        let name = wgpu::util::pipeline_cache_key(&device.raw.adapter_info())?;
        let path = folder.join(name);
        let data = read(&path);
        let cache = |data: Option<&[u8]>| {
            let raw = pipeline::cache(&device.raw, data);
            device.check("pipelines that were kept").map(|()| raw)
        };
        let found = data.as_deref().and_then(|data| cache(Some(data)).ok());
        let saved = match (&found, &data) {
            (Some(_), Some(data)) => checksum(data),
            _ => 0,
        };
        Some(Self {
            raw: found.or_else(|| cache(None).ok())?,
            path,
            grew: AtomicBool::new(false),
            saved: AtomicU64::new(saved),
        })
    }

    /// Writes what has come since it was read. Where it cannot be, the next process compiles again.
    fn save(&self) {
        if !self.grew.swap(false, Ordering::Relaxed) {
            return;
        }
        let Some(data) = self.raw.get_data() else {
            return;
        };
        let sum = checksum(&data);
        if self.saved.load(Ordering::Relaxed) == sum {
            return;
        }
        let file = [MAGIC, &sum.to_le_bytes()[..], &data].concat();
        if replace(&self.path, &file).is_ok() {
            self.saved.store(sum, Ordering::Relaxed);
        }
    }
}

impl Device {
    /// Pipelines that are made from now on are looked for in `folder`, and kept there for the next process when a session ends:
    /// for devices whose drivers give them away. The first folder stays.
    pub fn keep_pipelines(&self, folder: &Path) {
        self.kept.get_or_init(|| Kept::open(self, folder));
    }

    pub(super) fn kept(&self) -> Option<&Kept> {
        self.kept.get().and_then(Option::as_ref)
    }

    pub(super) fn save_pipelines(&self) {
        if let Some(kept) = self.kept()
            && !self.is_lost()
        {
            kept.save();
        }
    }
}

/// What the driver gave, of a file that is whole.
fn read(path: &Path) -> Option<Vec<u8>> {
    let file = File::open(path).ok()?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    let (head, data) = bytes.split_at_checked(HEAD)?;
    let sum = u64::from_le_bytes(*head.last_chunk()?);
    (head.starts_with(MAGIC) && sum == checksum(data)).then(|| data.to_vec())
}

/// Of another version the shaders are others: what it kept would only grow.
fn checksum(data: &[u8]) -> u64 {
    xxh3_64_with_seed(data, xxh3_64(env!("CARGO_PKG_VERSION").as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_whole_files_are_read() {
        let path = std::env::temp_dir().join(format!("kinglet-pipelines-{}", std::process::id()));
        let data: Vec<u8> = (0..200).collect();
        let file = [MAGIC, &checksum(&data).to_le_bytes()[..], &data].concat();
        let found = |bytes: &[u8]| {
            fs::write(&path, bytes).expect("room for a file");
            read(&path)
        };
        assert_eq!(found(&file), Some(data));
        for n in 0..file.len() {
            assert_eq!(found(&file[..n]), None, "the first {n} bytes");
            let mut damaged = file.clone();
            damaged[n] ^= 0x10;
            assert_eq!(found(&damaged), None, "byte {n}");
        }
        fs::remove_file(&path).expect("it was written");
        assert_eq!(read(&path), None);
    }
}
