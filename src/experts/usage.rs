//! The usage profile: how much each expert was used, so that the next start begins with reading those.
//!
//! One line of JSON. It belongs to one model and one layout; a file that does not fit counts as missing. It is written
//! to a temporary, synced and renamed.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Decayed, Key, Layout, UsageFile};
use crate::profile::roofline::{cache_folder, replace};
use crate::{Error, Result};

const FORMAT: u32 = 1;

/// A longer file is none of ours: twenty digits for each of the most experts that a model may have.
const MAX_BYTES: u64 = 20 << 20;

/// More than any expert can have been used: 47 uses, one a token, count at most.
const MAX_USED: f32 = 1e6;

#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    model: String,
    layout: String,
    used: Vec<f32>,
}

impl UsageFile {
    /// Beside the model, then where the model's folder cannot be written to.
    fn places(&self) -> impl Iterator<Item = PathBuf> {
        let name = self.model.file_name().unwrap_or_default();
        let mut beside = name.to_owned();
        beside.push(".experts.json");
        let mut cached = name.to_owned();
        cached.push(format!("-{:016x}.experts.json", self.model_hash));
        let cached = cache_folder().map(|folder| folder.join(cached));
        std::iter::once(self.model.with_file_name(beside)).chain(cached)
    }

    /// What was kept for this model, as uses at token 0.
    pub(super) fn load(&self, layout: &Layout, into: &mut Decayed) -> bool {
        let stored = self.places().find_map(|path| self.read(&path, layout));
        let Some(stored) = stored else {
            return false;
        };
        for (key, used) in stored.used.iter().enumerate() {
            into.set_used(key as Key, f64::from(*used), 0);
        }
        true
    }

    fn read(&self, path: &Path, layout: &Layout) -> Option<Stored> {
        let mut text = String::new();
        let file = File::open(path).ok()?;
        file.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        let stored: Stored = serde_json::from_str(&text).ok()?;
        let fits = stored.format == FORMAT
            && stored.model == format!("{:016x}", self.model_hash)
            && stored.layout == format!("{:016x}", layout.hash())
            && stored.used.len() == layout.n_experts()
            && stored
                .used
                .iter()
                .all(|used| (0.0..=MAX_USED).contains(used));
        fits.then_some(stored)
    }

    /// Keeps `used` as it counts at token `now`. Where it was written.
    ///
    /// # Errors
    /// [`Error::Io`] if neither place can be written to.
    pub(super) fn save(&self, layout: &Layout, used: &Decayed, now: u64) -> Result<PathBuf> {
        let keys = 0..used.n_experts() as Key;
        let stored = Stored {
            format: FORMAT,
            model: format!("{:016x}", self.model_hash),
            layout: format!("{:016x}", layout.hash()),
            used: keys.map(|key| used.used(key, now) as f32).collect(),
        };
        let body = serde_json::to_string(&stored).expect("numbers and names") + "\n";
        let mut refused = None;
        for path in self.places() {
            match replace(&path, body.as_bytes()) {
                Ok(()) => return Ok(path),
                Err(e) => refused = Some(Error::io(path, e)),
            }
        }
        Err(refused.expect("there is at least one place"))
    }
}
