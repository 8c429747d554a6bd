//! What a model takes of a GPU's memory, and how many of its layers have room there: from the header of the file.

use super::{LoadOptions, Model, Plan};
use crate::backend::gpu;
use crate::backend::select::Select;
use crate::error::Result;
use crate::gguf::TensorInfo;

/// Bytes on a GPU when a context is full.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GpuPlan {
    /// Layers on the GPU: the last ones.
    pub layers: usize,
    /// Layers of the model.
    pub n_layers: usize,
    /// Weights, as they are laid out there.
    pub weights: u64,
    /// Keys and values, and sums of keys where some are chosen.
    pub kv: u64,
    /// Memory of convolutions.
    pub conv: u64,
    /// Activations, logits and what is read back.
    pub scratch: u64,
}

/// Buffers are powers of two there, of most lengths one or two are in use, and some are read back.
const SCRATCH: u64 = 3;

/// Parameters, a few small buffers.
const SMALL: u64 = 1 << 20;

impl GpuPlan {
    /// Of as many layers as `load` asks for, or, where it asks for a budget alone, as many as fit that; for sessions as
    /// `plan` has them.
    ///
    /// # Errors
    /// If the file contradicts itself.
    pub fn new(model: &Model, plan: &Plan, load: &LoadOptions) -> Result<Self> {
        let n_layers = model.info().config.n_layers;
        let of = |layers| Self::of(model, plan, load, layers);
        if let Some(layers) = load.gpu_layers {
            return Ok(of(layers.min(n_layers)));
        }
        let memory = load.gpu_memory.unwrap_or(u64::MAX);
        let fits = (1..=n_layers).rev().map(of);
        Ok(fits
            .into_iter()
            .find(|plan| plan.total() <= memory)
            .unwrap_or(of(0)))
    }

    fn of(model: &Model, plan: &Plan, load: &LoadOptions, layers: usize) -> Self {
        let config = &model.info().config;
        let n_layers = config.n_layers;
        let mut found = Self {
            layers,
            n_layers,
            ..Self::default()
        };
        if layers == 0 {
            return found;
        }
        let first = n_layers - layers;
        let has_output = model.gguf().tensor("output.weight").is_some();
        let is_there = |t: &&TensorInfo| match t.name.strip_prefix("blk.") {
            Some(rest) => {
                let layer = rest.split('.').next().and_then(|n| n.parse::<usize>().ok());
                let stays = load.cpu_moe && gpu::is_of_experts(&t.name);
                layer.is_some_and(|layer| layer >= first) && !stays
            }
            // A table that is no head is where the first layer is.
            None if t.name == "token_embd.weight" => !has_output || first == 0,
            None => true,
        };
        let bytes = |t: &TensorInfo| match t.n_dims {
            1 => (t.n_elements() * size_of::<f32>()) as u64,
            _ => match t.dtype.dtype() {
                Some(dtype) => gpu::device_bytes(dtype, t.shape[0], t.n_elements() / t.shape[0]),
                None => t.bytes as u64,
            },
        };
        found.weights = model.gguf().tensors().filter(is_there).map(bytes).sum();
        let n_convs = config.n_kv_heads.iter().filter(|n| **n == 0).count();
        let taps = config.conv_reach.checked_div(n_convs).unwrap_or(0);
        let (kinds, n_ctx) = (plan.options.kv, plan.options.n_ctx);
        let sparsity = &plan.options.sparsity;
        let rule = sparsity.rule().ok().filter(|_| !sparsity.is_dense());
        let mut to_choose = 0;
        for (layer, heads) in config.n_kv_heads.iter().enumerate().skip(first) {
            if *heads == 0 {
                found.conv += gpu::conv_bytes(taps, config.hidden);
                continue;
            }
            found.kv += gpu::kv_bytes(kinds, heads * config.head_dim, n_ctx);
            if let Some(rule) = rule.as_ref().filter(|_| sparsity.is_for(layer)) {
                let heads = (config.n_heads, *heads);
                let (head_dim, batch) = (config.head_dim, plan.options.batch);
                let [sums, scratch] = gpu::choice_bytes(rule, heads, head_dim, n_ctx, batch);
                found.kv += sums;
                to_choose = scratch.max(to_choose);
            }
        }
        found.scratch = SCRATCH * (plan.footprint.scratch + to_choose) + SMALL;
        found
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.conv + self.scratch
    }
}
