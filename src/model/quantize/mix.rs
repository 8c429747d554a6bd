//! Which tensor of a model gets which format: the mixtures that llama.cpp's quantizing tool knows by name (state of
//! ggml 0.25), without an importance matrix.
//!
//! Only matrices are quantized, not vectors, norms, routers or convolutions. A mixture has a base format; some tensors
//! that hurt most get a better one, most of them only in the first eighth of the layers, the last eighth and every third
//! between. A row that is no whole number of blocks gets the next format with shorter blocks.

use crate::error::{Error, Result};
use crate::gguf::Metadata;
use crate::quant::DType;

macro_rules! mixes {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $name:literal, $base:ident;)*) => {
        /// What a file can be quantized to. The numbers are `general.file_type`'s.
        #[allow(non_camel_case_types, reason = "the field writes these names so")]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u32)]
        pub enum Mix { $($(#[$doc])* $variant = $id,)* }

        impl Mix {
            /// Every mixture.
            pub const ALL: &[Mix] = &[$(Mix::$variant),*];

            /// The name as llama.cpp writes it: `Q4_K_M`.
            pub const fn name(self) -> &'static str {
                match self { $(Mix::$variant => $name,)* }
            }

            /// The format of most tensors.
            pub const fn base(self) -> DType {
                match self { $(Mix::$variant => DType::$base,)* }
            }
        }
    };
}

mixes! {
    /// Every matrix F32.
    F32 = 0, "F32", F32;
    /// Every matrix F16.
    F16 = 1, "F16", F16;
    /// Q4_0, the head Q6_K.
    Q4_0 = 2, "Q4_0", Q4_0;
    /// Q4_1, the head Q6_K.
    Q4_1 = 3, "Q4_1", Q4_1;
    /// Q8_0.
    Q8_0 = 7, "Q8_0", Q8_0;
    /// Q5_0, the head Q6_K.
    Q5_0 = 8, "Q5_0", Q5_0;
    /// Q5_1, the head Q6_K.
    Q5_1 = 9, "Q5_1", Q5_1;
    /// Q2_K; attn_v Q3_K or Q4_K, attn_output and ffn_down Q3_K, the head Q6_K.
    Q2_K = 10, "Q2_K", Q2_K;
    /// Q3_K, the head Q6_K.
    Q3_K_S = 11, "Q3_K_S", Q3_K;
    /// Q3_K; attn_v, attn_output and ffn_down Q4_K, the first of them Q5_K, the head Q6_K.
    Q3_K_M = 12, "Q3_K_M", Q3_K;
    /// Q3_K; attn_v, attn_output and ffn_down Q5_K, the head Q6_K.
    Q3_K_L = 13, "Q3_K_L", Q3_K;
    /// Q4_K; the first attn_v and ffn_down Q5_K, the head Q6_K.
    Q4_K_S = 14, "Q4_K_S", Q4_K;
    /// Q4_K; half of attn_v and ffn_down and the head Q6_K.
    Q4_K_M = 15, "Q4_K_M", Q4_K;
    /// Q5_K, the head Q6_K.
    Q5_K_S = 16, "Q5_K_S", Q5_K;
    /// Q5_K; half of attn_v and ffn_down and the head Q6_K.
    Q5_K_M = 17, "Q5_K_M", Q5_K;
    /// Q6_K.
    Q6_K = 18, "Q6_K", Q6_K;
    /// Every matrix BF16.
    BF16 = 32, "BF16", BF16;
    /// TQ2_0 for models trained ternary; embeddings Q4_K, the head Q6_K.
    TQ2_0 = 37, "TQ2_0", TQ2_0;
    /// The experts MXFP4, everything else Q8_0.
    MXFP4_MOE = 38, "MXFP4_MOE", MXFP4;
}

impl Mix {
    /// The mixture called `name` in either case; `Q3_K`, `Q4_K` and `Q5_K` mean their `_M`.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = match name.to_ascii_uppercase().as_str() {
            base @ ("Q3_K" | "Q4_K" | "Q5_K") => format!("{base}_M"),
            name => name.to_owned(),
        };
        Self::ALL.iter().copied().find(|mix| mix.name() == name)
    }

    /// The number in `general.file_type`.
    pub const fn file_type(self) -> u32 {
        self as u32
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A tensor as the choice sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The name in the file.
    pub name: &'a str,
    /// Sizes in GGUF's order; trailing ones are 1.
    pub shape: [usize; 4],
}

/// What the choice depends on besides the tensors.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// Decoder layers.
    pub n_layers: usize,
    /// Experts of a layer, 0 or 1 in a dense model.
    pub n_experts: usize,
    /// Query heads per key head in the first layer; 0 if that has no attention.
    pub n_gqa: usize,
    /// Whether llama.cpp takes the model for one of 70 B parameters, in which attn_v is small.
    pub is_70b: bool,
}

impl Traits {
    /// Reads them from a file's metadata.
    ///
    /// # Errors
    /// If the architecture or its number of layers is missing or no such thing.
    pub fn read(metadata: &Metadata) -> Result<Self> {
        let arch = metadata.str("general.architecture")?;
        let key = |name: &str| format!("{arch}.{name}");
        let n_layers = metadata.usize(&key("block_count"))?;
        let first = |name: &str| -> Result<Option<usize>> {
            let per_layer = metadata.opt_per_layer_usize(&key(name), n_layers)?;
            Ok(per_layer.and_then(|n| n.first().copied()))
        };
        let n_heads = first("attention.head_count")?.unwrap_or(0);
        let n_kv_heads = first("attention.head_count_kv")?.unwrap_or(n_heads);
        Ok(Self {
            n_layers,
            n_experts: metadata.opt_usize(&key("expert_count"))?.unwrap_or(0),
            n_gqa: n_heads.checked_div(n_kv_heads).unwrap_or(0),
            is_70b: n_layers == 80 && (arch == "qwen2" || arch == "llama" && n_heads != n_kv_heads),
        })
    }
}

/// What a tensor is for, as far as mixtures treat it differently.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Embedding,
    Head,
    /// `attn_v`, and what contains it: `attn_qkv`, `attn_kv_b`.
    Value,
    Key,
    AttentionOutput,
    Down,
    Other,
}

impl Role {
    fn of(name: &str) -> Self {
        match name {
            "output.weight" => Role::Head,
            "token_embd.weight" | "per_layer_token_embd.weight" => Role::Embedding,
            _ => [
                ("attn_qkv.weight", Role::Value),
                ("attn_kv_b.weight", Role::Value),
                ("attn_v.weight", Role::Value),
                ("attn_k.weight", Role::Key),
                ("attn_output.weight", Role::AttentionOutput),
                ("ffn_up", Role::Other),
                ("ffn_gate", Role::Other),
                ("ffn_down", Role::Down),
            ]
            .into_iter()
            .find_map(|(part, role)| name.contains(part).then_some(role))
            .unwrap_or(Role::Other),
        }
    }
}

/// Parts of the names of matrices that keep their format: small ones, and those that decide (routers, norms, convolutions,
/// positions, recurrent gates).
const KEPT: &[&str] = &[
    "_norm.weight",
    "ffn_gate_inp.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

impl Candidate<'_> {
    fn is_quantizable(&self) -> bool {
        let is_matrix = self.shape[1..].iter().any(|n| *n > 1);
        is_matrix
            && self.name.ends_with("weight")
            && !matches!(self.name, "position_embd.weight" | "token_types.weight")
            && !KEPT.iter().any(|part| self.name.contains(part))
    }
}

/// The layer in a name like `blk.7.attn_q.weight`.
fn layer(name: &str) -> Option<usize> {
    let (layer, _) = name.strip_prefix("blk.")?.split_once('.')?;
    layer.parse().ok()
}

/// The order in which llama.cpp counts and writes tensors: by layer, then by name; what has no layer comes first.
pub(super) fn layer_order(name: &str) -> (Option<usize>, &str) {
    (layer(name), name)
}

/// A tensor's new format.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Choice {
    /// The format; `None` if the tensor is to stay as it is.
    pub dtype: Option<DType>,
    /// Whether the format meant for it did not fit its rows.
    pub is_fallback: bool,
}

/// The new format of each tensor, in the order given.
///
/// # Errors
/// If a tensor of a model with experts belongs to a layer that the model does not have.
pub fn choose(mix: Mix, traits: Traits, tensors: &[Candidate]) -> Result<Vec<Choice>> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|i| layer_order(tensors[*i].name));
    let count = |role| tensors.iter().filter(|t| Role::of(t.name) == role).count();
    let mut chooser = Chooser {
        mix,
        traits,
        is_tied: count(Role::Head) == 0,
        n_values: count(Role::Value),
        value_idx: 0,
        down_idx: 0,
    };
    let mut choices = vec![Choice::default(); tensors.len()];
    for i in order {
        let tensor = &tensors[i];
        if !tensor.is_quantizable() {
            continue;
        }
        let base = mix.base();
        choices[i] = match base {
            DType::F32 | DType::F16 | DType::BF16 => Choice {
                dtype: Some(base),
                is_fallback: false,
            },
            _ => fit(chooser.wanted(tensor)?, tensor.shape[0]),
        };
    }
    Ok(choices)
}

/// `dtype`, or what takes its place for rows of `n` weights.
fn fit(dtype: DType, n: usize) -> Choice {
    if n.is_multiple_of(dtype.block_len()) {
        return Choice {
            dtype: Some(dtype),
            is_fallback: false,
        };
    }
    let shorter = match dtype {
        DType::Q2_K | DType::Q3_K | DType::TQ2_0 => DType::Q4_0,
        DType::Q4_K => DType::Q5_0,
        DType::Q5_K => DType::Q5_1,
        DType::Q6_K => DType::Q8_0,
        _ => DType::F16,
    };
    let fits = n.is_multiple_of(shorter.block_len());
    Choice {
        dtype: Some(if fits { shorter } else { DType::F16 }),
        is_fallback: true,
    }
}

/// The first eighth of the layers, the last one, and every third between.
fn is_sensitive(i: usize, n: usize) -> bool {
    i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
}

struct Chooser {
    mix: Mix,
    traits: Traits,
    /// Whether the embeddings are the head too.
    is_tied: bool,
    n_values: usize,
    value_idx: usize,
    down_idx: usize,
}

impl Chooser {
    fn wanted(&mut self, tensor: &Candidate) -> Result<DType> {
        let (mix, base) = (self.mix, self.mix.base());
        let role = Role::of(tensor.name);
        if role == Role::Head || role == Role::Embedding && self.is_tied {
            let is_whole = tensor.shape[0].is_multiple_of(base.block_len());
            return Ok(match base {
                DType::MXFP4 | DType::Q8_0 => DType::Q8_0,
                _ if !is_whole => DType::Q8_0,
                _ => DType::Q6_K,
            });
        }
        if mix == Mix::MXFP4_MOE {
            let are_experts = tensor.shape[2] > 1;
            return Ok(if are_experts { base } else { DType::Q8_0 });
        }
        Ok(match role {
            Role::Embedding if mix == Mix::TQ2_0 => DType::Q4_K,
            Role::Value => self.value(),
            Role::Key if self.traits.n_experts == 8 => DType::Q8_0,
            Role::Down => self.down(tensor)?,
            Role::AttentionOutput if self.traits.n_experts == 8 => match mix {
                Mix::Q2_K | Mix::Q3_K_S | Mix::Q3_K_M | Mix::Q4_K_S | Mix::Q4_K_M => DType::Q5_K,
                _ => base,
            },
            Role::AttentionOutput => match mix {
                Mix::Q2_K => DType::Q3_K,
                Mix::Q3_K_M => DType::Q4_K,
                Mix::Q3_K_L => DType::Q5_K,
                _ => base,
            },
            _ => base,
        })
    }

    fn value(&mut self) -> DType {
        let i = self.value_idx;
        self.value_idx += 1;
        if self.traits.n_experts == 8 {
            return DType::Q8_0;
        }
        let dtype = match self.mix {
            Mix::Q2_K if self.traits.n_gqa >= 4 => DType::Q4_K,
            Mix::Q2_K => DType::Q3_K,
            Mix::Q3_K_M if i < 2 => DType::Q5_K,
            Mix::Q3_K_M => DType::Q4_K,
            Mix::Q3_K_L => DType::Q5_K,
            Mix::Q4_K_S if i < 4 => DType::Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if is_sensitive(i, self.n_values) => DType::Q6_K,
            _ => self.mix.base(),
        };
        match dtype {
            DType::Q3_K | DType::Q4_K if self.traits.is_70b => DType::Q5_K,
            _ => dtype,
        }
    }

    fn down(&mut self, tensor: &Candidate) -> Result<DType> {
        let n = self.traits.n_layers;
        // Shared experts and experts may both be there: only the name knows the layer.
        let i = if self.traits.n_experts > 1 {
            layer(tensor.name).filter(|i| *i < n).ok_or_else(|| {
                let name = tensor.name;
                Error::BadModel(format!("tensor {name}: expected a layer below {n}"))
            })?
        } else {
            self.down_idx
        };
        self.down_idx += 1;
        Ok(match self.mix {
            Mix::Q2_K => DType::Q3_K,
            Mix::Q3_K_M if i < n / 16 => DType::Q5_K,
            Mix::Q3_K_M => DType::Q4_K,
            Mix::Q3_K_L => DType::Q5_K,
            Mix::Q4_K_S if i < n / 8 => DType::Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if is_sensitive(i, n) => DType::Q6_K,
            _ => self.mix.base(),
        })
    }
}
