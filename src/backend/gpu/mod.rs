//! The GPU backend: compute shaders by way of wgpu, on Vulkan, Metal or DX12. The cargo feature `gpu` builds it.
//!
//! Operations are recorded and submitted once a pass. Those that a shader can join are held back until what follows is
//! known: a norm waits for the product that reads it, a product for the residual that it is added to, keys for the queries
//! of their layer. A layer is five to seven dispatches so. No tensor is ever changed: an operation makes a new one, in a
//! buffer that no living tensor holds.

mod attention;
mod compose;
pub mod device;
mod experts;
mod host;
mod kept;
mod ops;
mod packed;
pub mod pipeline;
mod products;
mod record;
mod sparse;
mod times;
mod top;
mod weights;

use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex};

pub use self::attention::KvCache;
use self::attention::Waiting;
use self::device::Buffer;
pub use self::device::{AdapterInfo, Device, adapters};
use self::experts::Routes;
use self::host::Host;
pub use self::host::is_of_experts;
use self::packed::Packed;
use self::record::Recorder;
use self::weights::Weights;
pub use self::weights::device_bytes;
use super::select::Rule;
use super::{KvTypes, RopePairs, Step};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::profile::Work;

/// A GPU, and what one session records for it.
pub struct Gpu {
    device: Arc<Device>,
    recorder: RefCell<Recorder>,
    /// Keys and values that wait for the queries of their layer.
    waiting: Option<Waiting>,
    step: Step,
    cancel: Cancel,
    work: Cell<Work>,
    /// Of a pass, on their way to the device.
    angles: Vec<f32>,
    /// Who has the experts, where they are not on the device; away while it works.
    host: Option<Box<Host>>,
    /// Where the device puts the largest that was asked for last, a key and an index,
    largest: Option<Rows>,
    /// and what had been done when a pass of that began.
    ahead: Option<Work>,
    /// What that pass did, if it becomes one of the sequence.
    done_ahead: Work,
}

/// Weights on the device.
pub struct Matrix(Arc<Weights>);

/// Floats on the device.
#[derive(Clone)]
pub struct Vector {
    buffer: Arc<Buffer>,
    n: usize,
}

/// Activations to be, `(n_tokens, n_cols)`.
pub struct Tensor {
    n_tokens: usize,
    n_cols: usize,
    value: RefCell<Value>,
}

/// What a tensor is made of so far.
#[derive(Clone)]
enum Value {
    /// Rows in memory.
    Rows(Rows),
    /// The norm of whole rows.
    Normed(Norm),
    /// Heads, to be normed and turned.
    Heads(Heads),
    /// A product.
    Product(Product),
    /// A residual and the product that is added to it.
    Sum(Sum),
}

/// Rows in memory, one after the other.
#[derive(Clone)]
struct Rows {
    buffer: Arc<Buffer>,
    /// The first float.
    at: usize,
    /// The same, packed; of all rows, from the first of the buffer.
    packed: Option<Packed>,
}

#[derive(Clone)]
struct Norm {
    x: Rows,
    gain: Vector,
    eps: f32,
    /// x times gain.
    packed: Option<Packed>,
}

#[derive(Clone)]
struct Heads {
    x: Rows,
    n: usize,
    norm: Option<(Vector, f32)>,
    rope: Option<Turn>,
}

#[derive(Clone)]
struct Turn {
    pairs: RopePairs,
    angles: Rows,
    half: usize,
}

/// What a product reads.
#[derive(Clone)]
enum Input {
    Rows(Rows),
    Normed(Norm),
    /// Rows that are nowhere else.
    Packed(Packed),
}

#[derive(Clone)]
struct Product {
    x: Input,
    weights: Arc<Weights>,
    bias: Option<Vector>,
    /// Of the experts whose outputs are weighted and summed: x is packed then, a row for each.
    routes: Option<Routes>,
}

impl Product {
    /// Rows of weights of a token's output.
    fn n_out(&self) -> usize {
        let n_experts = self.routes.as_ref().map_or(1, |routes| routes.n_experts);
        self.weights.n_out / n_experts
    }
}

#[derive(Clone)]
struct Sum {
    residual: Rows,
    product: Product,
}

/// What a short convolution remembers: a ring of rows, of which some more than are read are kept, by which it can be
/// rewound.
pub struct ConvState {
    memory: Arc<Buffer>,
    n_rows: usize,
    n_channels: usize,
    /// Rows of the ring.
    ring: usize,
    /// Rows that came so far.
    count: usize,
    /// The newest of them that are in the ring.
    held: usize,
}

/// Tokens that a convolution can take back.
const REWIND: usize = 16;

impl Gpu {
    /// A session's recorder on a device.
    ///
    /// # Errors
    /// If the device has no memory left.
    pub fn new(device: Arc<Device>) -> Result<Self> {
        Ok(Self {
            recorder: RefCell::new(Recorder::new(Arc::clone(&device))?),
            device,
            waiting: None,
            step: Step::Prefill,
            cancel: Cancel::default(),
            work: Cell::default(),
            angles: Vec::new(),
            host: None,
            largest: None,
            ahead: None,
            done_ahead: Work::default(),
        })
    }

    /// The same, which times what it does, where the device can.
    ///
    /// # Errors
    /// As [`Gpu::new`].
    pub fn timing(device: Arc<Device>) -> Result<Self> {
        let gpu = Self::new(device)?;
        gpu.recorder.borrow_mut().time()?;
        Ok(gpu)
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

/// Bytes of keys and values of `n` elements each for `n_positions`.
pub fn kv_bytes(kinds: KvTypes, n: usize, n_positions: usize) -> u64 {
    let rows = attention::row_bytes(kinds.keys, n) + attention::row_bytes(kinds.values, n);
    (rows * n_positions.next_multiple_of(attention::KV_STEP)) as u64
}

/// Bytes beside keys and values of `(n_heads, n_kv_heads)` for tokens that choose among `n_positions`: sums of keys, and
/// scratch of passes of `n_tokens`, which all layers share.
pub fn choice_bytes(
    rule: &Rule,
    (n_heads, n_kv_heads): (usize, usize),
    head_dim: usize,
    n_positions: usize,
    n_tokens: usize,
) -> [u64; 2] {
    let n_positions = n_positions.next_multiple_of(attention::KV_STEP);
    let sums = sparse::sums_bytes(rule, n_kv_heads * head_dim, n_positions);
    let scratch = sparse::scratch_bytes(rule, (n_heads, n_kv_heads), n_positions, n_tokens);
    [sums as u64, scratch as u64]
}

/// Bytes of the memory of a convolution that reads `n_rows` earlier inputs.
pub fn conv_bytes(n_rows: usize, n_channels: usize) -> u64 {
    ((n_rows + REWIND) * n_channels * size_of::<f32>()) as u64
}

/// The device of this index, or the first, opened once a process: models share it, and a driver opens slowly.
///
/// # Errors
/// If there is none, or its driver refuses.
pub fn shared(index: Option<usize>) -> Result<Arc<Device>> {
    type Open = Vec<(Option<usize>, std::sync::Weak<Device>)>;
    static OPEN: Mutex<Open> = Mutex::new(Vec::new());
    let mut open = OPEN
        .lock()
        .map_err(|_| Error::Backend("gpu: a driver panicked".into()))?;
    let known = open.iter().find(|(known, _)| *known == index);
    if let Some(device) = known.and_then(|(_, device)| device.upgrade())
        && device.check("as it was left").is_ok()
    {
        return Ok(device);
    }
    let device = Arc::new(Device::open(index)?);
    open.retain(|(known, _)| *known != index);
    open.push((index, Arc::downgrade(&device)));
    Ok(device)
}

impl Tensor {
    fn new(n_tokens: usize, n_cols: usize, value: Value) -> Self {
        Self {
            n_tokens,
            n_cols,
            value: RefCell::new(value),
        }
    }
}
