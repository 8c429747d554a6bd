//! Shaders: what each is specialized for, and pipelines made of them once.

#![allow(unsafe_code, reason = "shaders without run-time bounds checks")]

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::Device;
use crate::backend::select::By;
use crate::backend::{Activation, KvType, RopePairs};
use crate::error::Result;
use crate::quant::DType;

/// What a device has that shaders are written for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target {
    /// Half floats.
    pub f16: bool,
    /// Lanes of every subgroup.
    pub subgroup: Option<u32>,
    /// Matrices of 16 x 16 half floats that 32 lanes multiply together, summed as floats.
    pub matrices: bool,
}

/// How a product takes experts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Experts {
    /// There are none.
    None,
    /// Each slot of a route has outputs.
    Each,
    /// The outputs of all slots are weighted and summed: of many tokens by [`Shader::Slots`], afterwards.
    Sum,
}

/// Units of a row, rounded up to a power of two: what shapes the loops over them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct UnitsOf(u32);

impl UnitsOf {
    /// Of rows of `n`.
    pub fn new(n: usize) -> Self {
        Self((n as u32).next_power_of_two())
    }

    /// Units that a workgroup prepares at once, and loads that a lane has ahead.
    pub(super) fn loops(self, team: u32, is_float: bool) -> (u32, u32) {
        // Of floats 128 bytes each, of packed ones 48.
        let most = if is_float { 64 } else { 256 };
        let depth = if self.0 > team { 2 } else { 1 };
        (self.0.min(most.max(depth * team)), depth)
    }
}

/// What the output of a product is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Then {
    /// Whatever.
    Nothing,
    /// A norm and a product, which want it packed.
    Norm,
    /// Nothing but a product, which wants it packed.
    Product,
    /// A product, which wants it packed, or whatever.
    Either,
}

/// Which keys a token reads.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reads {
    /// All that it sees.
    All,
    /// The first of them and the last.
    Ends,
    /// A list of them.
    List,
}

/// How the lanes of a workgroup share eight rows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PackedShape {
    /// Lanes of a team.
    pub team: u32,
    /// Whether a row is more than a unit for each lane.
    pub deep: bool,
    /// Whether two teams share a row.
    pub split: bool,
}

impl PackedShape {
    /// Rows of a team: a workgroup has 256 lanes at most, 512 where two teams share a row.
    pub(super) fn rows(self) -> u32 {
        (self.team / 32).max(1)
    }

    pub(super) fn split(self) -> u32 {
        if self.split { 2 } else { 1 }
    }

    pub(super) fn teams(self) -> u32 {
        8 * self.split() / self.rows()
    }

    /// Units that a lane reads at once.
    pub(super) fn depth(self) -> u32 {
        if self.deep { 2 } else { 1 }
    }
}

/// What a workgroup of [`Shader::GemmMatrix`] makes, in squares of 16 x 16.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MatrixTile {
    /// Squares of a subgroup, along rows and along tokens.
    pub squares: (u32, u32),
    /// Subgroups of a workgroup, along rows and along tokens.
    pub subgroups: (u32, u32),
}

impl MatrixTile {
    /// From the largest on. A lane unpacks a row of weights, so there are as many lanes as rows.
    pub const ALL: [Self; 4] = [
        Self::new((4, 2), (2, 4)),
        Self::new((4, 2), (2, 2)),
        Self::new((2, 2), (2, 2)),
        Self::new((2, 1), (2, 2)),
    ];

    const fn new(squares: (u32, u32), subgroups: (u32, u32)) -> Self {
        Self { squares, subgroups }
    }

    /// Rows of weights.
    pub fn rows(self) -> usize {
        16 * (self.squares.0 * self.subgroups.0) as usize
    }

    /// Tokens.
    pub fn tokens(self) -> usize {
        16 * (self.squares.1 * self.subgroups.1) as usize
    }
}

/// A shader: an operation, and what it is specialized for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shader {
    /// Products of one token.
    Gemv {
        /// Of the matrices.
        dtype: DType,
        /// How many.
        matrices: u32,
        /// Of a team.
        rows: u32,
        /// Units of a row.
        units: UnitsOf,
        /// Whether the input is normed.
        norm: bool,
        /// Whether there is one.
        bias: bool,
        /// Whether there is one.
        residual: bool,
        /// Gate and up become one.
        glu: Option<Activation>,
        /// Whose rows.
        experts: Experts,
    },
    /// Products of one token that came packed.
    GemvPacked {
        /// Of the matrices.
        dtype: DType,
        /// How many.
        matrices: u32,
        /// How lanes share them.
        shape: PackedShape,
        /// Whether the input is normed.
        norm: bool,
        /// Whether there is one.
        bias: bool,
        /// Whether there is one.
        residual: bool,
        /// Gate and up become one.
        glu: Option<Activation>,
        /// Taps of the short convolution whose gates and input become its output; 0: of none.
        taps: u32,
        /// What comes next.
        then: Then,
        /// Whose rows.
        experts: Experts,
    },
    /// Products of many tokens.
    Gemm {
        /// Of the matrix.
        dtype: DType,
        /// Rows of a lane.
        tm: u32,
        /// Tokens of a lane.
        tn: u32,
        /// Whether there is one.
        bias: bool,
        /// Whether there is one.
        residual: bool,
        /// Whose rows.
        experts: Experts,
    },
    /// Products of many tokens, by matrix units.
    GemmMatrix {
        /// Of the matrix.
        dtype: DType,
        /// What a workgroup makes.
        tile: MatrixTile,
        /// Whether there is one.
        bias: bool,
        /// Whether there is one.
        residual: bool,
        /// Whose rows.
        experts: Experts,
    },
    /// Rows of a table.
    Embed(DType),
    /// A norm of whole rows.
    RmsNorm {
        /// Whether there is one.
        residual: bool,
    },
    /// Queries, keys and values before attention.
    Heads {
        /// Whether queries and keys are normed.
        norm: bool,
        /// Whether they are turned.
        rope: Option<RopePairs>,
        /// Elements of a head at most.
        max_head: u32,
        /// Of the cache.
        keys: KvType,
        /// Of the cache.
        values: KvType,
    },
    /// Attention of one token.
    AttentionOne {
        /// Elements of a head.
        head_dim: u32,
        /// Query heads of a workgroup.
        group: u32,
        /// Whether few keys are spread over many workgroups.
        few: bool,
        /// Whether the output is packed.
        pack: bool,
        /// Of the cache.
        keys: KvType,
        /// Of the cache.
        values: KvType,
        /// Which keys.
        reads: Reads,
    },
    /// The parts of a split attention.
    AttentionMerge {
        /// Whether the output is packed.
        pack: bool,
    },
    /// Attention of many tokens.
    AttentionMany {
        /// Elements of a head.
        head_dim: u32,
        /// Queries of a workgroup.
        bq: u32,
        /// Keys of a tile.
        bk: u32,
        /// Of the cache.
        keys: KvType,
        /// Of the cache.
        values: KvType,
        /// Whether the first keys are read and the last alone.
        ends: bool,
    },
    /// Sums of the keys of chunks.
    SumKeys {
        /// Keys of a chunk.
        chunk: u32,
        /// Of the cache.
        keys: KvType,
    },
    /// Products of queries with sums of keys.
    ChunkScores {
        /// Elements of a head.
        head_dim: u32,
        /// Rows of a workgroup.
        rows: u32,
        /// Keys of a chunk.
        chunk: u32,
        /// Whether queries are summed.
        summed: bool,
    },
    /// The keys that tokens read.
    Choose {
        /// What makes a chunk better than another.
        by: By,
        /// Keys of a chunk,
        chunk: u32,
        /// and of what is read or left out together.
        item: u32,
        /// Queries that share a head of keys.
        group: u32,
    },
    /// A short convolution.
    ShortConv {
        /// Whether it remembers what it reads.
        store: bool,
        /// Whether it does nothing else.
        push: bool,
        /// Whether the output is packed.
        pack: bool,
    },
    /// A gated unit.
    Glu(Activation),
    /// A sum.
    Add,
    /// The largest numbers.
    Top {
        /// How many: 1, or up to `MAX_TOP`.
        k: u32,
        /// Whether they were chosen before.
        pairs: bool,
    },
    /// The choice of a router.
    Route {
        /// Whether there is one.
        bias: bool,
        /// Of the scores.
        sigmoid: bool,
    },
    /// The tokens of each expert.
    Group {
        /// Of the router.
        n_experts: u32,
    },
    /// The weighted sum of what a token's experts made.
    Slots,
}

/// Numbers that [`Shader::Top`] chooses at most.
pub(super) const MAX_TOP: usize = 256;

/// Lanes of a workgroup of a GEMV.
pub(super) const GEMV_LANES: u32 = 128;

impl Target {
    /// Lanes of a team of a GEMV.
    pub(super) fn team(&self) -> u32 {
        self.subgroup.unwrap_or(32)
    }
}

/// Whether weights are floats, which are multiplied as such.
pub(super) fn is_float(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

impl Shader {
    /// Some of [`Shader::GemvPacked`].
    fn packed(dtype: DType) -> [Self; 8] {
        let plain = |team: u32, deep: bool, then: Then| Self::GemvPacked {
            dtype,
            matrices: 1,
            shape: PackedShape {
                team,
                deep,
                split: deep && team < 64 && then == Then::Norm,
            },
            norm: then != Then::Norm,
            bias: false,
            residual: then == Then::Norm,
            glu: (then == Then::Product).then_some(Activation::Silu),
            taps: 3 * u32::from(then == Then::Either),
            then,
            experts: Experts::None,
        };
        let some = |n: u32| {
            let mut shader = plain(32, n == 2, Then::Nothing);
            if let Self::GemvPacked { matrices, bias, .. } = &mut shader {
                (*matrices, *bias) = (n, n == 2);
            }
            shader
        };
        let unit = |of: Experts| {
            let mut shader = plain(32, true, Then::Product);
            if let Self::GemvPacked {
                matrices, experts, ..
            } = &mut shader
            {
                (*matrices, *experts) = (2, of);
            }
            shader
        };
        let mut sum = plain(32, true, Then::Norm);
        if let Self::GemvPacked { experts, .. } = &mut sum {
            *experts = Experts::Sum;
        }
        [
            plain(32, true, Then::Norm),
            plain(64, true, Then::Nothing),
            plain(8, true, Then::Either),
            some(2),
            some(3),
            unit(Experts::None),
            unit(Experts::Each),
            sum,
        ]
    }

    /// Whether a target can run it.
    pub fn runs_on(&self, target: &Target) -> bool {
        match self {
            Shader::GemmMatrix { dtype, .. } => {
                target.f16 && target.matrices && *dtype != DType::F32
            }
            _ => true,
        }
    }

    /// One of every operation in every way that it is specialized, for tests.
    pub fn all() -> Vec<Shader> {
        let mut all = Vec::new();
        let (halves, floats, blocks) = (KvType::F16, KvType::F32, KvType::Q8_0);
        for &dtype in DType::ALL {
            let units = UnitsOf::new(64);
            let plain = |matrices, rows, flags: [bool; 3]| Shader::Gemv {
                dtype,
                matrices,
                rows,
                units,
                norm: flags[0],
                bias: flags[1],
                residual: flags[2],
                glu: None,
                experts: Experts::None,
            };
            all.push(plain(1, 4, [false, false, true]));
            all.push(plain(2, 2, [true, false, false]));
            all.push(plain(3, 2, [true, true, false]));
            for (glu, experts, norm) in [
                (Some(Activation::Silu), Experts::None, true),
                (Some(Activation::GeluTanh), Experts::None, false),
                (Some(Activation::Relu), Experts::Each, true),
                (None, Experts::Sum, false),
            ] {
                all.push(Shader::Gemv {
                    dtype,
                    matrices: if glu.is_some() { 2 } else { 1 },
                    rows: 2,
                    units: UnitsOf::new(if norm { 8 } else { 1024 }),
                    norm,
                    bias: false,
                    residual: false,
                    glu,
                    experts,
                });
            }
            if !is_float(dtype) {
                all.extend(Self::packed(dtype));
            }
            for (tile, bias, residual, experts) in [
                (0, true, false, Experts::None),
                (1, false, true, Experts::None),
                (2, false, false, Experts::Each),
                (3, false, false, Experts::Sum),
            ] {
                let (tm, tn) = [(8, 8), (4, 4), (4, 4), (4, 1)][tile];
                all.push(Shader::Gemm {
                    dtype,
                    tm,
                    tn,
                    bias,
                    residual,
                    experts,
                });
                all.push(Shader::GemmMatrix {
                    dtype,
                    tile: MatrixTile::ALL[tile],
                    bias,
                    residual,
                    experts,
                });
            }
            all.push(Shader::Embed(dtype));
        }
        for residual in [false, true] {
            all.push(Shader::RmsNorm { residual });
        }
        for (keys, values) in [
            (halves, halves),
            (floats, floats),
            (halves, floats),
            (blocks, blocks),
            (blocks, halves),
        ] {
            let ropes = [None, Some(RopePairs::Halves), Some(RopePairs::Neighbours)];
            for rope in ropes {
                for norm in [false, true] {
                    all.push(Shader::Heads {
                        norm,
                        rope,
                        max_head: 128,
                        keys,
                        values,
                    });
                }
            }
            for (head_dim, group, bq, bk) in [(16, 2, 16, 32), (64, 4, 16, 32), (256, 8, 8, 16)] {
                for reads in [Reads::All, Reads::Ends, Reads::List] {
                    for few in [false, true] {
                        all.push(Shader::AttentionOne {
                            head_dim,
                            group,
                            few,
                            pack: group < 8,
                            keys,
                            values,
                            reads,
                        });
                    }
                }
                for ends in [false, true] {
                    all.push(Shader::AttentionMany {
                        head_dim,
                        bq,
                        bk,
                        keys,
                        values,
                        ends,
                    });
                }
            }
            all.push(Shader::SumKeys { chunk: 8, keys });
        }
        for (head_dim, rows, summed) in [(64, 1, true), (80, 3, false), (256, 8, false)] {
            all.push(Shader::ChunkScores {
                head_dim,
                rows,
                chunk: 8,
                summed,
            });
        }
        for by in [By::Sum, By::Shared, By::Vote, By::Best, By::Blocks] {
            let (chunk, item) = if by == By::Blocks { (16, 64) } else { (8, 8) };
            let group = 3;
            all.push(Shader::Choose {
                by,
                chunk,
                item,
                group,
            });
        }
        for pack in [false, true] {
            all.push(Shader::AttentionMerge { pack });
        }
        for (store, push) in [(true, false), (false, false), (false, true)] {
            let pack = store;
            all.push(Shader::ShortConv { store, push, pack });
        }
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Relu] {
            all.push(Shader::Glu(activation));
        }
        all.push(Shader::Add);
        for k in [1, 64, MAX_TOP as u32] {
            for pairs in [false, true] {
                all.push(Shader::Top { k, pairs });
            }
        }
        for bias in [false, true] {
            for sigmoid in [false, true] {
                all.push(Shader::Route { bias, sigmoid });
            }
        }
        all.push(Shader::Group { n_experts: 32 });
        all.push(Shader::Slots);
        all
    }
}

/// Leave to use matrices that a subgroup holds.
pub(super) fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: experimental is their translation; all their loads and stores stay within the memory of a workgroup, whose
    // sizes are constants of the shader.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// What a driver compiles, with `data` that it gave away before.
pub(super) fn cache(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let descriptor = wgpu::PipelineCacheDescriptor {
        label: None,
        data,
        // Of another driver, or another version of wgpu, it counts as none.
        fallback: true,
    };
    // SAFETY: the data carry a checksum of what `get_data` returned in an earlier process; wgpu compares device and driver.
    unsafe { device.create_pipeline_cache(&descriptor) }
}

/// A shader on a device.
pub(super) struct Pipeline {
    /// Unlike any other's of the device.
    pub(super) id: u64,
    pub(super) raw: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    /// After the first, which is for parameters.
    pub(super) bindings: Vec<u32>,
}

/// The pipelines of a device that were asked for so far.
#[derive(Default)]
pub(super) struct Pipelines(Mutex<HashMap<Shader, Arc<Pipeline>>>);

impl Device {
    /// The pipeline of a shader, made if this is the first time.
    pub(super) fn pipeline(&self, shader: Shader) -> Result<Arc<Pipeline>> {
        let mut known = self
            .pipelines
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = known.get(&shader) {
            return Ok(Arc::clone(pipeline));
        }
        let pipeline = Arc::new(self.make(shader, known.len() as u64)?);
        known.insert(shader, Arc::clone(&pipeline));
        Ok(pipeline)
    }

    fn make(&self, shader: Shader, id: u64) -> Result<Pipeline> {
        self.n_made.fetch_add(1, Ordering::Relaxed);
        let source = shader.source(&self.target);
        let entries = bindings(&source);
        let label = format!("{shader:?}");
        let layout = self
            .raw
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: None,
                entries: &entries,
            });
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Wgsl(Cow::Borrowed(&source)),
        };
        let module = if std::env::var_os("KINGLET_GPU_CHECKS").is_some() {
            self.raw.create_shader_module(descriptor)
        } else {
            let checks = wgpu::ShaderRuntimeChecks::unchecked();
            // SAFETY: no shader indexes beyond its bindings: whoever dispatches one asserts the sizes that it is told,
            // tokens and experts are numbers that host or router have bounded, and all loops end.
            unsafe { self.raw.create_shader_module_trusted(descriptor, checks) }
        };
        let pipeline_layout = self
            .raw
            .create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
        let raw = self
            .raw
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&label),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some("main"),
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: self.kept().map(|kept| &kept.raw),
            });
        self.check(&label)?;
        if let Some(kept) = self.kept() {
            kept.grew.store(true, Ordering::Relaxed);
        }
        Ok(Pipeline {
            id,
            raw,
            layout,
            bindings: entries.iter().skip(1).map(|entry| entry.binding).collect(),
        })
    }
}

/// What a text binds, in the order of its numbers.
fn bindings(source: &str) -> Vec<wgpu::BindGroupLayoutEntry> {
    let mut entries = Vec::new();
    for (at, mark) in source.match_indices("@binding(") {
        let rest = &source[at + mark.len()..];
        let (number, rest) = rest.split_once(')').expect("a binding has a number");
        let (kind, _) = rest
            .split_once('>')
            .expect("a binding has an address space");
        let is_uniform = kind.contains("uniform");
        entries.push(wgpu::BindGroupLayoutEntry {
            binding: number.parse().expect("a number"),
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match is_uniform {
                    true => wgpu::BufferBindingType::Uniform,
                    false => wgpu::BufferBindingType::Storage {
                        read_only: !kind.contains("read_write"),
                    },
                },
                has_dynamic_offset: is_uniform,
                min_binding_size: None,
            },
            count: None,
        });
    }
    entries.sort_by_key(|entry| entry.binding);
    entries
}
