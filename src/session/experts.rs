//! Experts of a model that are read when they are used: where they lie, and when that is worth it.

use std::path::PathBuf;
use std::sync::Arc;

use super::LoadOptions;
use super::budget::resident;
use super::file::header_hash;
use crate::backend::BackendKind;
use crate::backend::cpu::residency::FileTable;
use crate::backend::cpu::stored::StoredExperts;
use crate::error::{Error, Result};
use crate::experts::disk::Disk;
use crate::experts::{
    self, Budget, ExpertStore, IoMode, LayerExperts, Layout, Part, PolicyKind, Prefetch, UsageFile,
};
use crate::gguf::{Gguf, TensorInfo};

/// How the experts of a model are kept that does not fit in memory as a whole.
#[derive(Clone, Debug)]
pub struct ExpertOptions {
    /// Bytes for experts. `None`: what [`LoadOptions::memory`] leaves, or all of them where it says nothing.
    pub cache: Option<u64>,
    /// How far ahead they are read.
    pub prefetch: Prefetch,
    /// Threads that read them.
    pub io_threads: usize,
    /// How they are read.
    pub io: IoMode,
    /// Which expert makes room for another.
    pub policy: PolicyKind,
    /// Whether a file beside the model keeps which experts were used, so that the next start begins with them.
    pub remember: bool,
    /// Writes what routers ask for to this file, see [`experts::trace`].
    pub trace: Option<PathBuf>,
}

impl Default for ExpertOptions {
    fn default() -> Self {
        let options = experts::Options::default();
        Self {
            cache: None,
            prefetch: options.prefetch,
            io_threads: options.io_threads,
            io: options.io,
            policy: options.policy,
            remember: false,
            trace: None,
        }
    }
}

/// Experts in a file.
pub(super) struct Found {
    /// Where they lie.
    pub layout: Layout,
    /// The decoder layer of each layer that has some.
    blocks: Vec<usize>,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// The experts of `gguf`, if its layers have any.
///
/// # Errors
/// If its tensors contradict each other.
pub(super) fn find(gguf: &Gguf) -> Result<Option<Found>> {
    let (meta, architecture) = (gguf.metadata(), gguf.architecture()?);
    let n_used = meta.opt_usize(&format!("{architecture}.expert_used_count"))?;
    let n_layers = meta.opt_usize(&format!("{architecture}.block_count"))?;
    let (Some(n_used), Some(n_layers)) = (n_used, n_layers) else {
        return Ok(None);
    };
    let (mut layers, mut blocks, mut bytes) = (Vec::new(), Vec::new(), 0);
    // A header may promise parts that are not there yet.
    let mut ends: Vec<u64> = gguf.parts().iter().map(|part| part.file_bytes()).collect();
    for block in 0..n_layers.min(gguf.tensors().count()) {
        let tensor = |part: &str| gguf.tensor(&format!("blk.{block}.ffn_{part}_exps.weight"));
        let (Some(gate), Some(up), Some(down)) = (tensor("gate"), tensor("up"), tensor("down"))
        else {
            continue;
        };
        let n_experts = gate.shape[2];
        let part = |t: &TensorInfo| match (t.bytes as u64).checked_div(n_experts as u64) {
            Some(expert_bytes) if expert_bytes * n_experts as u64 == t.bytes as u64 => Ok(Part {
                file: t.part,
                offset: t.offset,
                expert_bytes,
            }),
            _ => Err(Error::BadModel(format!(
                "tensor {}: expected {n_experts} experts of one size, found {} bytes",
                t.name, t.bytes
            ))),
        };
        layers.push(LayerExperts {
            n_experts,
            n_used,
            parts: vec![part(gate)?, part(up)?, part(down)?],
        });
        for t in [gate, up, down] {
            bytes += t.bytes as u64;
            ends[t.part] = ends[t.part].max(t.offset + t.bytes as u64);
        }
        blocks.push(block);
    }
    if layers.is_empty() {
        return Ok(None);
    }
    Ok(Some(Found {
        layout: Layout::new(ends, layers)?,
        blocks,
        bytes,
    }))
}

/// The table of embeddings, where it is not the head too: a token uses one row of it.
pub(super) fn table(gguf: &Gguf) -> Option<&TensorInfo> {
    let table = gguf.tensor("token_embd.weight");
    table.filter(|_| gguf.tensor("output.weight").is_some())
}

/// The same, to be read from its file.
///
/// # Errors
/// If the file cannot be opened once more.
pub(super) fn file_table(gguf: &Gguf) -> Result<Option<FileTable>> {
    let open = |table: &TensorInfo| {
        let part = &gguf.parts()[table.part];
        let (file, start) = part.reopen()?;
        Ok(FileTable {
            name: table.name.clone(),
            path: part.path().into(),
            file,
            offset: start + table.offset,
        })
    };
    table(gguf).map(open).transpose()
}

/// Those of `gguf` that are to be read when they are used: its experts, if `options` give them a part of the memory or the
/// model fills what they give for all.
pub(super) fn to_store(gguf: &Gguf, options: &LoadOptions) -> Result<Option<Found>> {
    if options.backend != BackendKind::Cpu {
        return Ok(None);
    }
    let Some(found) = find(gguf)? else {
        return Ok(None);
    };
    let weights: u64 = gguf.tensors().map(|t| t.bytes as u64).sum();
    let (anonymous, file) = resident();
    // What a session takes is not known yet.
    let fills = |memory: u64| weights + anonymous + file > memory - memory / 8;
    let wanted = options.experts.cache.is_some() || options.memory.is_some_and(fills);
    Ok(wanted.then_some(found))
}

/// Opens a store for what was `found` in `gguf`. With a budget for the whole process it begins with the least that it can
/// work with: sessions say how much is left for it. Without a `disk` it opens the files of the model once more.
pub(super) fn open(
    gguf: &Gguf,
    found: &Found,
    options: &LoadOptions,
    disk: Option<Box<dyn Disk>>,
) -> Result<Arc<StoredExperts>> {
    let given = &options.experts;
    let least = Budget::Slots(found.layout.min_slots());
    let is_named = gguf.parts().iter().all(|part| part.is_named());
    // Nothing lies beside a file of which only the descriptor is known.
    let usage = (given.remember && is_named).then(|| UsageFile {
        model: gguf.path().to_owned(),
        model_hash: header_hash(gguf),
    });
    let store = experts::Options {
        budget: match given.cache {
            Some(bytes) if options.memory.is_none() => Budget::Bytes(bytes),
            _ => least,
        },
        io_threads: given.io_threads,
        io: given.io,
        policy: given.policy,
        prefetch: given.prefetch,
        usage,
        trace: given.trace.clone(),
        ..experts::Options::default()
    };
    let layout = found.layout.clone();
    let store = match disk {
        Some(disk) => ExpertStore::with_disk(disk, layout, &store)?,
        None if !is_named => {
            let (file, start) = gguf.parts()[0].reopen()?;
            ExpertStore::open_in(file, start, gguf.path(), layout, &store)?
        }
        None => {
            let paths = gguf.parts().iter().map(|part| part.path().into());
            ExpertStore::open(&paths.collect::<Vec<PathBuf>>(), layout, &store)?
        }
    };
    Ok(Arc::new(StoredExperts::new(store, &found.blocks)))
}
