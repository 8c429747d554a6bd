//! Adapters, the one that is used, its buffers, and what goes wrong with it: nothing here panics where a driver fails.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use wgpu::{BufferUsages, DeviceType, Features};

use super::kept::Kept;
use super::pipeline::{self, Pipelines, Target};
use super::weights::Weights;
use crate::error::{DeviceFault, Error, Result};

/// A device that can run the shaders, as its driver describes it.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// Its number in `--device`.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Vulkan, Metal or DX12.
    pub api: &'static str,
    /// `discrete`, `integrated`, `software`.
    pub kind: &'static str,
    /// The driver and its version.
    pub driver: String,
    /// Half floats in shaders.
    pub f16: bool,
    /// Lanes of a subgroup, where they are always as many: sums need no memory then.
    pub subgroup: Option<u32>,
    /// Matrix units: 32 lanes multiply 16 x 16 half floats.
    pub matrices: bool,
    /// Timestamps inside of passes.
    pub timestamps: bool,
    /// Bytes of a binding at most: larger matrices are split.
    pub max_binding: u64,
    /// Bytes of memory of a workgroup.
    pub workgroup_memory: u32,
}

impl AdapterInfo {
    /// Whether it is a processor that plays a GPU.
    pub fn is_software(&self) -> bool {
        self.kind == SOFTWARE
    }
}

const SOFTWARE: &str = "software";

/// Every adapter of this machine, in a fixed order: those that are most likely wanted first.
pub fn adapters() -> Vec<AdapterInfo> {
    let adapters = enumerate();
    let described = adapters.iter().enumerate();
    described.map(|(i, adapter)| describe(i, adapter)).collect()
}

/// The one of this process, which stays: drivers are not to be loaded and let go of by several threads at once.
fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        descriptor.flags = wgpu::InstanceFlags::empty();
        wgpu::Instance::new(descriptor)
    })
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let all = wgpu::Backends::all();
    let mut adapters = pollster::block_on(instance().enumerate_adapters(all));
    let rank = |adapter: &wgpu::Adapter| match adapter.get_info().device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    };
    adapters.sort_by_key(rank);
    adapters
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> AdapterInfo {
    let (info, features, limits) = (adapter.get_info(), adapter.features(), adapter.limits());
    AdapterInfo {
        index,
        name: info.name.clone(),
        api: info.backend.to_str(),
        kind: match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::VirtualGpu => "virtual",
            DeviceType::Cpu => SOFTWARE,
            DeviceType::Other => "other",
        },
        driver: format!("{} {}", info.driver, info.driver_info),
        f16: features.contains(Features::SHADER_F16),
        subgroup: subgroup(&info, features),
        matrices: has_matrices(adapter),
        timestamps: features.contains(TIMESTAMPS),
        max_binding: max_binding(&limits),
        workgroup_memory: limits.max_compute_workgroup_storage_size,
    }
}

const TIMESTAMPS: Features =
    Features::TIMESTAMP_QUERY.union(Features::TIMESTAMP_QUERY_INSIDE_PASSES);

fn subgroup(info: &wgpu::AdapterInfo, features: Features) -> Option<u32> {
    let (least, most) = (info.subgroup_min_size, info.subgroup_max_size);
    // A team is a subgroup, and a workgroup some whole teams.
    let fits = least == most && least.is_power_of_two() && (4..=64).contains(&least);
    (features.contains(Features::SUBGROUP) && fits).then_some(least)
}

/// Whether `gemm_matrix.wgsl` runs: half floats that are summed as floats, 16 each way, held by subgroups of 32 lanes.
fn has_matrices(adapter: &wgpu::Adapter) -> bool {
    use wgpu::CooperativeScalarType::{F16, F32};
    let (info, features, limits) = (adapter.get_info(), adapter.features(), adapter.limits());
    let fits = |of: &wgpu::CooperativeMatrixProperties| {
        (of.m_size, of.n_size, of.k_size) == (16, 16, 16) && (of.ab_type, of.cr_type) == (F16, F32)
    };
    features.contains(Features::SHADER_F16 | Features::EXPERIMENTAL_COOPERATIVE_MATRIX)
        && subgroup(&info, features) == Some(32)
        && limits.max_compute_workgroup_storage_size >= MATRIX_MEMORY
        && limits.max_compute_invocations_per_workgroup >= 256
        && adapter.cooperative_matrix_properties().iter().any(fits)
}

/// Bytes of a workgroup of the largest tile: twice 256 rows of ten vectors, and eight squares on their way out.
const MATRIX_MEMORY: u32 = 2 * 256 * 10 * 8 + 8 * 256 * 4;

/// Offsets of planes in a buffer are 32-bit numbers of words; a gibibyte is large enough not to matter.
fn max_binding(limits: &wgpu::Limits) -> u64 {
    let most = limits.max_storage_buffer_binding_size;
    most.min(limits.max_buffer_size).min(1 << 30)
}

/// A word that no new buffer holds.
const RAN: u32 = 0x5eed_cafe;

fn fault(fault: DeviceFault, what: impl Into<String>) -> Error {
    Error::Device {
        fault,
        what: what.into(),
    }
}

/// The first fault of a device, kept until somebody asks.
#[derive(Default)]
struct Faults(Mutex<Option<Fault>>);

enum Fault {
    OutOfMemory,
    Other(String),
    /// The device is gone; stays.
    Lost(String),
}

impl Faults {
    fn is_lost(&self) -> bool {
        let first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(&*first, Some(Fault::Lost(_)))
    }

    fn put(&self, fault: Fault) {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_lost = matches!(&*first, Some(Fault::Lost(_)));
        if first.is_none() || (matches!(fault, Fault::Lost(_)) && !is_lost) {
            *first = Some(fault);
        }
    }

    fn take(&self) -> Option<Fault> {
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*first {
            Some(Fault::Lost(why)) => Some(Fault::Lost(why.clone())),
            _ => first.take(),
        }
    }
}

/// A buffer on the device.
pub(super) struct Buffer {
    /// Unlike any other's.
    pub(super) id: u64,
    pub(super) raw: wgpu::Buffer,
    pub(super) bytes: u64,
    /// The last pass that used it, where it is one for activations.
    pub(super) pass: AtomicU64,
    /// The account of its device.
    held: Option<Arc<AtomicU64>>,
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(held) = &self.held {
            held.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// A part of a buffer, for a binding.
#[derive(Clone, Copy)]
pub(super) struct Span<'a> {
    pub(super) buffer: &'a Buffer,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

impl Buffer {
    /// All of it.
    pub(super) fn all(&self) -> Span<'_> {
        Span {
            buffer: self,
            offset: 0,
            bytes: self.bytes,
        }
    }
}

/// An open device, shared by the model and its sessions.
pub struct Device {
    pub(super) raw: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) info: AdapterInfo,
    pub(super) limits: wgpu::Limits,
    pub(super) target: Target,
    pub(super) pipelines: Pipelines,
    /// Those of earlier processes, where somebody has said where they are.
    pub(super) kept: OnceLock<Option<Kept>>,
    /// For bindings that a shader has and a dispatch does not use.
    pub(super) nothing: Buffer,
    /// Holds [`RAN`]: copied behind what is read back, it says that the copies were made.
    pub(super) ran: Buffer,
    faults: Arc<Faults>,
    /// Bytes of all buffers, and how many there may be.
    held: Arc<AtomicU64>,
    budget: AtomicU64,
    /// Bytes of a part of a matrix at most.
    part_bytes: AtomicU64,
    /// Pipelines, bind groups and buffers.
    pub(super) n_made: AtomicU64,
    /// Submissions, how many of them had been encoded ahead, and how many were of passes that began ahead.
    pub(super) n_submitted: [AtomicU64; 3],
    /// Submissions until one fails, and how: see [`Device::fail_after`].
    fails: Mutex<Option<(u64, DeviceFault)>>,
    /// Whether the system may leave submissions out without a word, as Metal does with those of an app in the background.
    pub(super) may_refuse: AtomicBool,
    next_id: AtomicU64,
    /// Weights by the place of their bytes, which they hold: tables that are heads too are uploaded once.
    pub(super) weights: Mutex<HashMap<(usize, usize), Weak<Weights>>>,
}

impl Device {
    /// Opens the adapter with this index, or the first.
    ///
    /// # Errors
    /// If there is none, or its driver refuses.
    pub fn open(index: Option<usize>) -> Result<Self> {
        let adapters = enumerate();
        let n = adapters.len();
        let index = index.unwrap_or(0);
        let adapter = adapters.into_iter().nth(index).ok_or_else(|| match n {
            0 => Error::Backend(
                "gpu: no adapter found: is a driver for Vulkan, Metal or DX12 installed?".into(),
            ),
            n => Error::Invalid(format!("gpu: expected a device below {n}, found {index}")),
        })?;
        let info = describe(index, &adapter);
        let limits = adapter.limits();
        let mut wanted = Features::SHADER_F16 | Features::SUBGROUP | TIMESTAMPS;
        wanted |= Features::PIPELINE_CACHE;
        let mut experimental = wgpu::ExperimentalFeatures::disabled();
        if info.matrices {
            wanted |= Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            experimental = pipeline::experimental();
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("kinglet"),
            required_features: adapter.features() & wanted,
            required_limits: limits.clone(),
            experimental_features: experimental,
            memory_hints: wgpu::MemoryHints::Performance,
            ..wgpu::DeviceDescriptor::default()
        };
        let opened = pollster::block_on(adapter.request_device(&descriptor));
        let (raw, queue) =
            opened.map_err(|e| Error::Backend(format!("gpu: {}: {e}", info.name)))?;
        let faults = Arc::new(Faults::default());
        let (uncaptured, lost) = (Arc::clone(&faults), Arc::clone(&faults));
        raw.on_uncaptured_error(Arc::new(move |error| {
            uncaptured.put(match error {
                wgpu::Error::OutOfMemory { .. } => Fault::OutOfMemory,
                error => Fault::Other(error.to_string()),
            });
        }));
        raw.set_device_lost_callback(move |reason, message| {
            // Dropping a device ends it too; nobody is left to ask then.
            lost.put(Fault::Lost(format!("{reason:?}: {message}")));
        });
        let small = |id, usage| Buffer {
            id,
            raw: raw.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: 256,
                usage,
                mapped_at_creation: false,
            }),
            bytes: 256,
            pass: AtomicU64::new(0),
            held: None,
        };
        let nothing = small(0, BufferUsages::STORAGE);
        let ran = small(1, BufferUsages::COPY_SRC | BufferUsages::COPY_DST);
        queue.write_buffer(&ran.raw, 0, &RAN.to_le_bytes());
        Ok(Self {
            target: Target {
                f16: info.f16,
                subgroup: info.subgroup,
                matrices: info.matrices,
            },
            pipelines: Pipelines::default(),
            kept: OnceLock::new(),
            nothing,
            ran,
            fails: Mutex::default(),
            held: Arc::default(),
            budget: AtomicU64::new(u64::MAX),
            part_bytes: AtomicU64::new(info.max_binding),
            n_made: AtomicU64::new(0),
            n_submitted: Default::default(),
            may_refuse: AtomicBool::new(info.api == wgpu::Backend::Metal.to_str()),
            raw,
            queue,
            info,
            limits,
            faults,
            next_id: AtomicU64::new(2),
            weights: Mutex::default(),
        })
    }

    /// What it is.
    pub fn info(&self) -> &AdapterInfo {
        &self.info
    }

    /// Ends the device, as a driver does that hangs or is replaced: to see what becomes of its users.
    pub fn lose(&self) {
        self.raw.destroy();
        let why = "it was ended".to_owned();
        self.faults.put(Fault::Lost(why));
    }

    /// From now on `n` submissions run, and the next fails in this way: to see what becomes of its users. A lost device
    /// stays so; of the others one submission is dropped.
    pub fn fail_after(&self, n: u64, fault: DeviceFault) {
        if fault == DeviceFault::Refused {
            self.may_refuse.store(true, Ordering::Relaxed);
        }
        *self.fails.lock().unwrap_or_else(PoisonError::into_inner) = Some((n, fault));
    }

    /// Whether [`Device::fail_after`] has come true.
    pub fn has_failed(&self) -> bool {
        let fails = self.fails.lock().unwrap_or_else(PoisonError::into_inner);
        fails.is_none()
    }

    /// Hands what was encoded to the device.
    pub(super) fn submit(
        &self,
        encoded: wgpu::CommandBuffer,
    ) -> Result<Option<wgpu::SubmissionIndex>> {
        let mut fails = self.fails.lock().unwrap_or_else(PoisonError::into_inner);
        let fails_now = match &mut *fails {
            Some((0, fault)) => Some(*fault),
            Some((n, _)) => {
                *n -= 1;
                None
            }
            None => None,
        };
        if fails_now.is_some() {
            *fails = None;
        }
        drop(fails);
        let mut index = None;
        match fails_now {
            None => index = Some(self.queue.submit([encoded])),
            Some(DeviceFault::Lost) => self.lose(),
            Some(DeviceFault::OutOfMemory) => self.faults.put(Fault::OutOfMemory),
            Some(DeviceFault::Refused) => {}
        }
        self.check("submitting").map(|()| index)
    }

    pub(super) fn is_lost(&self) -> bool {
        self.faults.is_lost()
    }

    /// What the device has come to, if it is no good.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        match self.faults.take() {
            None => Ok(()),
            Some(Fault::OutOfMemory) => Err(fault(DeviceFault::OutOfMemory, what)),
            Some(Fault::Lost(why)) => Err(fault(DeviceFault::Lost, why)),
            Some(Fault::Other(why)) => Err(Error::Backend(format!("gpu: {what}: {why}"))),
        }
    }

    /// A zeroed buffer.
    ///
    /// # Errors
    /// If there is no memory for it, or it is larger than a binding may be.
    pub(super) fn buffer(&self, bytes: u64, usage: BufferUsages, what: &str) -> Result<Buffer> {
        let bytes = bytes.max(16).next_multiple_of(16);
        let no_memory = || {
            fault(
                DeviceFault::OutOfMemory,
                format!("{bytes} bytes for {what}"),
            )
        };
        if bytes > max_binding(&self.limits) {
            return Err(Error::Unsupported {
                kind: "size on this GPU",
                found: format!("{bytes} bytes for {what}"),
                supported: format!("{} bytes", max_binding(&self.limits)),
            });
        }
        self.n_made.fetch_add(1, Ordering::Relaxed);
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let account = |raw| Buffer {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            raw,
            bytes,
            pass: AtomicU64::new(0),
            held: Some(Arc::clone(&self.held)),
        };
        let budget = self.budget.load(Ordering::Relaxed);
        if held > budget {
            self.held.fetch_sub(bytes, Ordering::Relaxed);
            let before = held - bytes;
            return Err(fault(
                DeviceFault::OutOfMemory,
                format!("{bytes} bytes for {what}: {before} of {budget} are in use"),
            ));
        }
        let buffer = account(self.raw.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage,
            mapped_at_creation: false,
        }));
        match self.faults.take() {
            Some(Fault::OutOfMemory) => return Err(no_memory()),
            Some(fault) => {
                self.faults.put(fault);
                self.check(what)?;
            }
            None => {}
        }
        Ok(buffer)
    }

    /// From now on no more than so many bytes are taken of its memory.
    pub fn set_budget(&self, bytes: u64) {
        self.budget.store(bytes, Ordering::Relaxed);
    }

    /// From now on matrices are split where they exceed so many bytes, as if no binding were larger: to see what becomes of
    /// them on small devices.
    pub fn limit_parts(&self, bytes: u64) {
        let bytes = bytes.min(self.info.max_binding);
        self.part_bytes.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn part_bytes(&self) -> u64 {
        self.part_bytes.load(Ordering::Relaxed)
    }

    /// Pipelines, bind groups and buffers that were made so far: what costs time once.
    pub fn n_made(&self) -> u64 {
        self.n_made.load(Ordering::Relaxed)
    }

    /// Submissions of passes so far, how many of them had been encoded while the pass before ran, and how many were made then.
    pub fn n_submitted(&self) -> [u64; 3] {
        self.n_submitted
            .each_ref()
            .map(|n| n.load(Ordering::Relaxed))
    }

    /// Bytes of its memory that are in use.
    pub fn held_bytes(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// A buffer for shaders that holds `data`.
    pub(super) fn buffer_of(&self, data: &[u8], what: &str) -> Result<Buffer> {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let buffer = self.buffer(data.len() as u64, usage, what)?;
        self.queue.write_buffer(&buffer.raw, 0, data);
        Ok(buffer)
    }

    /// Waits until a submission has run; `None`: everything that was submitted.
    pub(super) fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let waited = self.raw.poll(wgpu::PollType::Wait {
            submission_index,
            timeout: None,
        });
        self.check("waiting")?;
        waited
            .map(|_| ())
            .map_err(|e| fault(DeviceFault::Lost, e.to_string()))
    }

    /// The first bytes of `staging`, when a submission has run; `None`: everything that was submitted.
    pub(super) fn read_back(
        &self,
        staging: &wgpu::Buffer,
        bytes: u64,
        after: Option<wgpu::SubmissionIndex>,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let slice = staging.slice(..bytes);
        slice.map_async(wgpu::MapMode::Read, |_| {});
        self.wait(after)?;
        let view = slice.get_mapped_range();
        let view = view.map_err(|e| fault(DeviceFault::Lost, format!("reading back: {e}")))?;
        take(&view);
        drop(view);
        staging.unmap();
        Ok(())
    }

    /// Copies the beginning of a buffer into another: between passes.
    pub(super) fn copy(&self, from: &Buffer, to: &Buffer) -> Result<()> {
        let bytes = from.bytes.min(to.bytes);
        let mut encoder = self.raw.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&from.raw, 0, &to.raw, 0, bytes);
        if !self.may_refuse.load(Ordering::Relaxed) {
            return self.submit(encoder.finish()).map(drop);
        }
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        let staging = self.buffer(4, usage, "reading back")?;
        encoder.copy_buffer_to_buffer(&self.ran.raw, 0, &staging.raw, 0, 4);
        self.submit(encoder.finish())?;
        let mut word = [0; 4];
        self.read_back(&staging.raw, 4, None, |view| word.copy_from_slice(view))?;
        self.must_have_run(&[u32::from_le_bytes(word)], RAN)
    }

    /// That copies of `mark` were made, one a word.
    pub(super) fn must_have_run(&self, words: &[u32], mark: u32) -> Result<()> {
        match words.iter().all(|word| *word == mark) {
            true => Ok(()),
            false => Err(fault(DeviceFault::Refused, "is the app in the background?")),
        }
    }

    /// A copy of `bytes` of a buffer from `offset`, which are multiples of four: between passes.
    pub(super) fn download(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
        let staging = self.buffer(bytes + 4, usage, "reading back")?;
        let mut encoder = self.raw.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&buffer.raw, offset, &staging.raw, 0, bytes);
        encoder.copy_buffer_to_buffer(&self.ran.raw, 0, &staging.raw, bytes, 4);
        self.submit(encoder.finish())?;
        let mut out = Vec::new();
        self.read_back(&staging.raw, bytes + 4, None, |view| {
            out.extend_from_slice(view)
        })?;
        let mark = out.split_off(bytes as usize);
        let mark = u32::from_le_bytes(mark.try_into().expect("four bytes"));
        self.must_have_run(&[mark], RAN)?;
        Ok(out)
    }
}
