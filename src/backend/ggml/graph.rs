//! A graph of ggml: recorded operation by operation, run as a whole, then begun anew.
//!
//! Sizes are in ggml's order, the contiguous dimension first. Strides and offsets count elements.

#![allow(unsafe_code, reason = "calls into ggml")]

use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Once};

use super::memory::{Held, Memory, Repacked};
use super::sys;
use crate::backend::{Activation, KvType, RopePairs};
use crate::error::{Error, Result};
use crate::quant::Bytes;

/// Tensors that an arena holds.
const ARENA_TENSORS: usize = 1024;

/// How long ggml's threads spin for another graph before they sleep: some milliseconds, more than there are between
/// tokens. At its own 50 they would spin for a third of a second, beside whoever is measured next.
const POLL: u32 = 1;

/// A number for each recording of this process.
static RECORDINGS: AtomicU64 = AtomicU64::new(0);

/// What ggml has to say beside its results, to nobody: a library does not write to stderr.
extern "C" fn ignore(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}

/// A tensor of a recording.
#[derive(Clone, Copy)]
pub(super) struct Node {
    index: usize,
    recording: u64,
}

/// The recording of a pass, and what runs it.
pub(super) struct Graph {
    n_threads: usize,
    apart: bool,
    /// Where tensors are described. All before `arena` are full, all after it are empty.
    arenas: Vec<Arena>,
    arena: usize,
    /// Every tensor, in the order of recording, which is that of running.
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    /// What the tensors point to.
    held: Vec<Held>,
    recording: u64,
    failed: Option<Error>,
    runner: Option<Runner>,
}

// SAFETY: what its pointers lead to is its own, and ggml binds none of it to a thread.
unsafe impl Send for Graph {}

/// A context of ggml: an arena for descriptions of tensors, without their data.
pub(super) struct Arena(NonNull<sys::ggml_context>);

/// What a run needs and keeps: activations, threads, scratch.
struct Runner {
    allocator: NonNull<sys::ggml_gallocr>,
    threads: NonNull<sys::ggml_threadpool>,
    /// Takes the caller's part.
    apart: Option<Apart>,
    /// For the graph itself.
    arena: Arena,
    scratch: Vec<Line>,
}

/// The alignment of ggml's own scratch.
#[derive(Clone)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "ggml's")] [u8; 64]);

/// Some rows of a cache, as a tensor of three dimensions.
pub(super) struct CacheView<'a> {
    pub(super) memory: &'a Arc<Memory>,
    pub(super) kind: KvType,
    pub(super) size: [usize; 3],
    /// Of the second and the third dimension.
    pub(super) strides: [usize; 2],
    pub(super) offset: usize,
}

/// Records `ggml_NAME(context, ARGS)`.
macro_rules! record {
    ($graph:expr, $name:ident($($arg:expr),*)) => {{
        let context = $graph.context();
        // SAFETY: the context has room, and its tensors are those of this recording: `at` makes sure. ggml checks
        // that their sizes go together.
        let tensor = unsafe { sys::$name(context, $($arg),*) };
        $graph.push(tensor)
    }};
}

impl Graph {
    /// A graph that runs on `n_threads`: the caller's and others, or others alone if `apart`.
    pub(super) fn new(n_threads: usize, apart: bool) -> Result<Self> {
        let max = sys::GGML_MAX_N_THREADS as usize;
        if n_threads == 0 || n_threads > max {
            return Err(Error::Invalid(format!(
                "ggml: expected 1 to {max} threads, found {n_threads}"
            )));
        }
        static QUIET: Once = Once::new();
        // SAFETY: a function that takes anything.
        QUIET.call_once(|| unsafe { sys::ggml_log_set(Some(ignore), std::ptr::null_mut()) });
        Ok(Self {
            n_threads,
            apart,
            arenas: Vec::new(),
            arena: 0,
            tensors: Vec::new(),
            held: Vec::new(),
            recording: RECORDINGS.fetch_add(1, Ordering::Relaxed),
            failed: None,
            runner: None,
        })
    }

    /// Whether nothing has been recorded.
    pub(super) fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of activations and scratch.
    pub(super) fn bytes(&self) -> usize {
        let arenas = self.arenas.len() * Arena::bytes_of(ARENA_TENSORS);
        arenas + self.runner.as_ref().map_or(0, Runner::bytes)
    }

    /// A context with room for a tensor.
    fn context(&mut self) -> *mut sys::ggml_context {
        if self.arenas.get(self.arena).is_some_and(Arena::is_full) {
            self.arena += 1;
        }
        if self.arena == self.arenas.len() {
            self.arenas.push(Arena::new(Arena::bytes_of(ARENA_TENSORS)));
        }
        self.arenas[self.arena].0.as_ptr()
    }

    fn push(&mut self, tensor: *mut sys::ggml_tensor) -> Node {
        let tensor = NonNull::new(tensor).expect("the arena had room");
        self.tensors.push(tensor);
        Node {
            index: self.tensors.len() - 1,
            recording: self.recording,
        }
    }

    fn at(&self, node: Node) -> *mut sys::ggml_tensor {
        assert_eq!(
            node.recording, self.recording,
            "a tensor of another pass or backend"
        );
        self.tensors[node.index].as_ptr()
    }

    /// Sizes of a tensor.
    fn size(&self, node: Node) -> [usize; 4] {
        // SAFETY: `at` gives a tensor of an arena that lives.
        unsafe { (*self.at(node)).ne }.map(|n| n as usize)
    }

    /// A tensor over bytes that exist.
    fn leaf(&mut self, kind: sys::ggml_type, [n0, n1]: [usize; 2], data: Held) -> Node {
        let node = record!(self, ggml_new_tensor_2d(kind, n0 as i64, n1 as i64));
        let (start, bytes) = data.span();
        let tensor = self.at(node);
        // SAFETY: `at` gives a tensor of an arena that lives. ggml reads at most `ggml_nbytes` from `start`, which
        // `held` keeps until the graph has run, and writes only where `store` asks for it.
        unsafe {
            assert!(
                sys::ggml_nbytes(tensor) <= bytes,
                "a tensor beyond its data"
            );
            (*tensor).data = start.cast_mut().cast();
        }
        self.held.push(data);
        node
    }

    /// A weight matrix `(n_in, n_out)`, in the format with ggml's number `kind`.
    pub(super) fn matrix(&mut self, kind: u32, size: [usize; 2], data: &Bytes) -> Node {
        self.leaf(kind, size, Held::Bytes(data.clone()))
    }

    /// The same in a layout of ggml's own, for [`Graph::mul_mat`] alone.
    pub(super) fn repacked(&mut self, kind: u32, [n0, n1]: [usize; 2], data: &Repacked) -> Node {
        let node = record!(self, ggml_new_tensor_2d(kind, n0 as i64, n1 as i64));
        self.held.push(Held::Memory(Arc::clone(data.memory())));
        // SAFETY: `at` gives a tensor of an arena that lives, and nobody else has a reference to it.
        data.give(unsafe { &mut *self.at(node) });
        node
    }

    /// Makes the next run fail.
    pub(super) fn fail(&mut self, error: Error) {
        self.failed.get_or_insert(error);
    }

    /// Floats of a model.
    pub(super) fn floats(&mut self, size: [usize; 2], data: &Arc<[f32]>) -> Node {
        self.leaf(sys::GGML_TYPE_F32, size, Held::Floats(Arc::clone(data)))
    }

    /// Tokens or positions.
    pub(super) fn ints(&mut self, data: impl Iterator<Item = i32>) -> Node {
        let data: Box<[i32]> = data.collect();
        self.leaf(sys::GGML_TYPE_I32, [data.len(), 1], Held::Ints(data))
    }

    /// A mask of half floats.
    pub(super) fn halves(&mut self, size: [usize; 2], data: Box<[u16]>) -> Node {
        self.leaf(sys::GGML_TYPE_F16, size, Held::Halves(data))
    }

    /// What a cache holds when the graph comes to it.
    pub(super) fn load(&mut self, cache: &CacheView) -> Node {
        let kind = match cache.kind {
            KvType::F32 => sys::GGML_TYPE_F32,
            KvType::F16 => sys::GGML_TYPE_F16,
            quantized => unreachable!("{quantized:?}: refused when the session was made"),
        };
        let memory = Held::Memory(Arc::clone(cache.memory));
        let n = cache.memory.bytes() / cache.kind.row_bytes(1);
        let whole = self.leaf(kind, [n, 1], memory);
        self.view(whole, cache.size, cache.strides, cache.offset)
    }

    /// Writes `x` to a cache, in its type.
    pub(super) fn store(&mut self, x: Node, cache: &CacheView) {
        let (from, to) = (self.at(x), self.load(cache));
        record!(self, ggml_cpy(from, self.at(to)));
    }

    /// Some elements of a tensor of four-byte or two-byte elements.
    pub(super) fn view(
        &mut self,
        x: Node,
        [n0, n1, n2]: [usize; 3],
        [s1, s2]: [usize; 2],
        offset: usize,
    ) -> Node {
        let tensor = self.at(x);
        // SAFETY: `at` gives a tensor of an arena that lives.
        let (element, bytes) = unsafe { ((*tensor).nb[0], sys::ggml_nbytes(tensor)) };
        let end = offset + (n2 - 1) * s2 + (n1 - 1) * s1 + n0;
        assert!(end * element <= bytes, "a view beyond its tensor");
        let size = [n0, n1, n2].map(|n| n as i64);
        let (s1, s2, offset) = (s1 * element, s2 * element, offset * element);
        record!(
            self,
            ggml_view_3d(tensor, size[0], size[1], size[2], s1, s2, offset)
        )
    }

    pub(super) fn reshape(&mut self, x: Node, [n0, n1, n2]: [usize; 3]) -> Node {
        let x = self.at(x);
        record!(self, ggml_reshape_3d(x, n0 as i64, n1 as i64, n2 as i64))
    }

    /// Exchanges the first two dimensions.
    pub(super) fn transpose(&mut self, x: Node) -> Node {
        let x = self.at(x);
        record!(self, ggml_transpose(x))
    }

    /// Exchanges the second and the third dimension.
    pub(super) fn swap_rows(&mut self, x: Node) -> Node {
        let x = self.at(x);
        record!(self, ggml_permute(x, 0, 2, 1, 3))
    }

    pub(super) fn get_rows(&mut self, table: Node, rows: Node) -> Node {
        let (table, rows) = (self.at(table), self.at(rows));
        record!(self, ggml_get_rows(table, rows))
    }

    pub(super) fn scale(&mut self, x: Node, factor: f32) -> Node {
        let x = self.at(x);
        record!(self, ggml_scale(x, factor))
    }

    pub(super) fn add(&mut self, x: Node, y: Node) -> Node {
        let (x, y) = (self.at(x), self.at(y));
        record!(self, ggml_add(x, y))
    }

    pub(super) fn mul(&mut self, x: Node, y: Node) -> Node {
        let (x, y) = (self.at(x), self.at(y));
        record!(self, ggml_mul(x, y))
    }

    pub(super) fn mul_mat(&mut self, weight: Node, x: Node) -> Node {
        let (weight, x) = (self.at(weight), self.at(x));
        record!(self, ggml_mul_mat(weight, x))
    }

    /// Each `(n_in, n_out)` of `weights`, of which there are many, where `picks`, `(n_picks, n_tokens)`, names it; `x`:
    /// `(n_in, 1 or n_picks, n_tokens)`. Out: `(n_out, n_picks, n_tokens)`.
    pub(super) fn mul_mat_picked(&mut self, weights: Node, x: Node, picks: Node) -> Node {
        let (weights, x, picks) = (self.at(weights), self.at(x), self.at(picks));
        record!(self, ggml_mul_mat_id(weights, x, picks))
    }

    /// The indices of the `n` largest of each row, the largest first.
    pub(super) fn top_k(&mut self, x: Node, n: usize) -> Node {
        let x = self.at(x);
        let top = record!(self, ggml_argsort_top_k(x, n as i32));
        self.contiguous(top)
    }

    pub(super) fn sigmoid(&mut self, x: Node) -> Node {
        let x = self.at(x);
        record!(self, ggml_sigmoid(x))
    }

    pub(super) fn softmax(&mut self, x: Node) -> Node {
        let x = self.at(x);
        record!(self, ggml_soft_max(x))
    }

    /// `x / (sum of its row + eps)`.
    pub(super) fn normalize(&mut self, x: Node, eps: f32) -> Node {
        let x = self.at(x);
        let sums = record!(self, ggml_sum_rows(x));
        let sums = record!(self, ggml_scale_bias(self.at(sums), 1.0, eps));
        record!(self, ggml_div(x, self.at(sums)))
    }

    pub(super) fn rms_norm(&mut self, x: Node, eps: f32) -> Node {
        let x = self.at(x);
        record!(self, ggml_rms_norm(x, eps))
    }

    /// Rotates the first `2 * factors.len()` of each row of `x`, `(head_dim, n_heads, n_tokens)`, by the angles
    /// `positions[token] / factors[pair]`.
    pub(super) fn rope(
        &mut self,
        x: Node,
        positions: Node,
        factors: Node,
        pairs: RopePairs,
    ) -> Node {
        let n_rot = 2 * self.size(factors)[0] as i32;
        let mode = match pairs {
            RopePairs::Halves => sys::GGML_ROPE_TYPE_NEOX as i32,
            RopePairs::Neighbours => 0,
        };
        let (x, positions, factors) = (self.at(x), self.at(positions), self.at(factors));
        // With base 1 the factors are the whole of an angle; the rest is YaRN, at rest.
        record!(
            self,
            ggml_rope_ext(
                x, positions, factors, n_rot, mode, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0
            )
        )
    }

    pub(super) fn glu(&mut self, gate: Node, up: Node, activation: Activation) -> Node {
        let (gate, up) = (self.at(gate), self.at(up));
        match activation {
            Activation::Silu => record!(self, ggml_swiglu_split(gate, up)),
            Activation::GeluTanh => record!(self, ggml_geglu_split(gate, up)),
            Activation::Relu => record!(self, ggml_reglu_split(gate, up)),
        }
    }

    /// `q`: `(head_dim, n_tokens, n_heads)`; `k` and `v`: `(head_dim, n_keys, n_kv_heads)`; `mask`, added to the
    /// scores: `(n_keys, n_tokens)`. Out: `(head_dim, n_heads, n_tokens)`.
    pub(super) fn flash_attention(
        &mut self,
        [q, k, v]: [Node; 3],
        mask: Option<Node>,
        scale: f32,
    ) -> Node {
        let (q, k, v) = (self.at(q), self.at(k), self.at(v));
        let mask = mask.map_or(std::ptr::null_mut(), |mask| self.at(mask));
        record!(self, ggml_flash_attn_ext(q, k, v, mask, scale, 0.0, 0.0))
    }

    /// Puts `y` behind `x` in the first dimension.
    pub(super) fn concat(&mut self, x: Node, y: Node) -> Node {
        let (x, y) = (self.at(x), self.at(y));
        record!(self, ggml_concat(x, y, 0))
    }

    pub(super) fn contiguous(&mut self, x: Node) -> Node {
        let x = self.at(x);
        record!(self, ggml_cont(x))
    }

    /// `x`: `(n_taps - 1 + n_tokens, n_channels)`; `taps`: `(n_taps, n_channels)`. Out: `(n_channels, n_tokens)`.
    pub(super) fn short_conv(&mut self, x: Node, taps: Node) -> Node {
        let (x, taps) = (self.at(x), self.at(taps));
        record!(self, ggml_ssm_conv(x, taps))
    }

    /// Runs what was recorded, copies the floats of `wanted` to `out`, and begins a new recording, whether it went
    /// well or not.
    pub(super) fn run(&mut self, wanted: Option<Node>, out: &mut Vec<f32>) -> Result<()> {
        let ran = match self.failed.take() {
            Some(error) => Err(error),
            None => self.run_recorded(wanted, out),
        };
        for arena in &self.arenas {
            arena.reset();
        }
        self.arena = 0;
        self.tensors.clear();
        self.held.clear();
        self.recording = RECORDINGS.fetch_add(1, Ordering::Relaxed);
        ran
    }

    fn run_recorded(&mut self, wanted: Option<Node>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        let wanted = wanted.map(|node| self.at(node));
        if let Some(wanted) = wanted {
            // SAFETY: a tensor of this recording.
            unsafe { sys::ggml_set_output(wanted) };
        }
        let runner = match &mut self.runner {
            Some(runner) => runner,
            None => self.runner.insert(Runner::new(self.n_threads, self.apart)?),
        };
        runner.run(&self.tensors, self.n_threads)?;
        if let Some(wanted) = wanted {
            // SAFETY: a tensor of this recording; it has been computed, and as an output nothing has reused its memory.
            let floats = unsafe {
                let tensor = &*wanted;
                let n: i64 = tensor.ne.iter().product();
                assert!(
                    tensor.type_ == sys::GGML_TYPE_F32
                        && sys::ggml_nbytes(wanted) == n as usize * size_of::<f32>(),
                    "results are whole rows of floats"
                );
                std::slice::from_raw_parts(tensor.data.cast::<f32>(), n as usize)
            };
            out.extend_from_slice(floats);
        }
        Ok(())
    }
}

/// A graph that is ready to run.
struct Job {
    graph: *mut sys::ggml_cgraph,
    plan: sys::ggml_cplan,
}

// SAFETY: who sends it waits for its end, and touches nothing of it before.
unsafe impl Send for Job {}

impl Job {
    /// # Safety
    /// The graph is placed, and the plan is its own.
    unsafe fn run(&mut self) -> sys::ggml_status {
        // SAFETY: as the caller says.
        unsafe { sys::ggml_graph_compute(self.graph, &mut self.plan) }
    }
}

/// A thread that runs graphs. ggml's AMX kernels configure the tiles of a thread once and take them for theirs ever
/// after; on a thread where our kernels use them too the next instruction on a tile is illegal.
struct Apart {
    jobs: SyncSender<Job>,
    done: Receiver<sys::ggml_status>,
}

impl Apart {
    fn new() -> Result<Self> {
        let (jobs, todo) = mpsc::sync_channel::<Job>(1);
        let (ended, done) = mpsc::sync_channel(1);
        let run = move || {
            for mut job in todo {
                // SAFETY: `Runner::run` has made it, and waits.
                let status = unsafe { job.run() };
                if ended.send(status).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("ggml".into()).spawn(run);
        thread.map_err(|e| Error::Backend(format!("ggml: no thread: {e}")))?;
        Ok(Self { jobs, done })
    }

    fn run(&self, job: Job) -> Result<sys::ggml_status> {
        let gone = || Error::Backend("ggml: its thread is gone".into());
        self.jobs.send(job).map_err(|_| gone())?;
        self.done.recv().map_err(|_| gone())
    }
}

impl Arena {
    pub(super) fn new(bytes: usize) -> Self {
        // SAFETY: a context over memory of its own.
        let context = unsafe {
            sys::ggml_init(sys::ggml_init_params {
                mem_size: bytes,
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            })
        };
        Self(
            NonNull::new(context)
                .expect("ggml ends the program itself when it has no memory for a context"),
        )
    }

    /// Bytes that `n` tensors take.
    pub(super) fn bytes_of(n: usize) -> usize {
        // SAFETY: a constant.
        n * unsafe { sys::ggml_tensor_overhead() }
    }

    /// For ggml; it lives as long as `self`.
    pub(super) fn context(&self) -> *mut sys::ggml_context {
        self.0.as_ptr()
    }

    fn bytes(&self) -> usize {
        // SAFETY: the context lives as long as `self`.
        unsafe { sys::ggml_get_mem_size(self.0.as_ptr()) }
    }

    /// Whether there may be no room for two tensors more, as many as an operation makes.
    fn is_full(&self) -> bool {
        // SAFETY: the context lives as long as `self`.
        let used = unsafe { sys::ggml_used_mem(self.0.as_ptr()) };
        used + Self::bytes_of(2) > self.bytes()
    }

    fn reset(&self) {
        // SAFETY: the context lives as long as `self`; the tensors in it are forgotten with it.
        unsafe { sys::ggml_reset(self.0.as_ptr()) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        unsafe { sys::ggml_free(self.0.as_ptr()) };
    }
}

impl Runner {
    fn new(n_threads: usize, apart: bool) -> Result<Self> {
        let failed = |what: &str| Error::Backend(format!("ggml: no {what}"));
        // SAFETY: the buffer type of the CPU is static.
        let allocator = unsafe { sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type()) };
        // SAFETY: `Graph::new` has checked the number of threads; the parameters are copied.
        let threads = unsafe {
            let mut parameters = sys::ggml_threadpool_params_default(n_threads as i32);
            parameters.poll = POLL;
            sys::ggml_threadpool_new(&mut parameters)
        };
        Ok(Self {
            allocator: NonNull::new(allocator).ok_or_else(|| failed("allocator"))?,
            threads: NonNull::new(threads).ok_or_else(|| failed("threads"))?,
            apart: apart.then(Apart::new).transpose()?,
            arena: Arena::new(graph_bytes(ARENA_TENSORS)),
            scratch: Vec::new(),
        })
    }

    fn bytes(&self) -> usize {
        // SAFETY: the allocator lives as long as `self`.
        let activations = unsafe { sys::ggml_gallocr_get_buffer_size(self.allocator.as_ptr(), 0) };
        activations + self.arena.bytes() + size_of_val(&*self.scratch)
    }

    /// Computes `tensors`, in their order.
    fn run(&mut self, tensors: &[NonNull<sys::ggml_tensor>], n_threads: usize) -> Result<()> {
        let bytes = graph_bytes(tensors.len());
        if self.arena.bytes() < bytes {
            self.arena = Arena::new(bytes);
        }
        self.arena.reset();
        // SAFETY: the arena has room for a graph of this size. The tensors live until the recording ends, and what
        // their leaves point to as long.
        let graph = unsafe {
            let graph = sys::ggml_new_graph_custom(self.arena.0.as_ptr(), tensors.len(), false);
            for tensor in tensors {
                sys::ggml_build_forward_expand(graph, tensor.as_ptr());
            }
            graph
        };
        // SAFETY: as above. The plan of an earlier graph would do for one of the same sizes, but not of another shape,
        // so it is made anew.
        let placed = unsafe {
            sys::ggml_gallocr_reserve(self.allocator.as_ptr(), graph)
                && sys::ggml_gallocr_alloc_graph(self.allocator.as_ptr(), graph)
        };
        let no_memory = |bytes| Error::OutOfMemory {
            what: "activations in ggml".into(),
            bytes,
        };
        if !placed {
            return Err(no_memory(0));
        }
        // SAFETY: as above; the threads are as many as the plan is for.
        let mut plan =
            unsafe { sys::ggml_graph_plan(graph, n_threads as i32, self.threads.as_ptr()) };
        let n_lines = plan.work_size.div_ceil(size_of::<Line>());
        if self.scratch.len() < n_lines {
            self.scratch.clear();
            self.scratch
                .try_reserve_exact(n_lines)
                .map_err(|_| no_memory(plan.work_size))?;
            self.scratch.resize(n_lines, Line([0; 64]));
        }
        plan.work_data = self.scratch.as_mut_ptr().cast();
        let mut job = Job { graph, plan };
        let status = match &self.apart {
            Some(apart) => apart.run(job)?,
            // SAFETY: as above; the scratch is as large as the plan wants.
            None => unsafe { job.run() },
        };
        match status {
            sys::GGML_STATUS_SUCCESS => Ok(()),
            sys::GGML_STATUS_ALLOC_FAILED => Err(no_memory(0)),
            status => Err(Error::Backend(format!("ggml: status {status}"))),
        }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // SAFETY: nobody else has them, and no graph is running.
        unsafe {
            sys::ggml_threadpool_free(self.threads.as_ptr());
            sys::ggml_gallocr_free(self.allocator.as_ptr());
        }
    }
}

/// The instruction sets of this build of ggml, but for AMX if it is not used (see `build.rs`).
pub(super) fn features() -> Vec<&'static str> {
    macro_rules! having {
        ($($function:ident $name:literal)*) => {
            // SAFETY: they ask the CPU and the build, no more.
            [$(($name, unsafe { sys::$function() })),*]
        };
    }
    let all = having! {
        ggml_cpu_has_avx2 "AVX2"
        ggml_cpu_has_f16c "F16C"
        ggml_cpu_has_fma "FMA"
        ggml_cpu_has_avx_vnni "AVX-VNNI"
        ggml_cpu_has_avx512 "AVX-512"
        ggml_cpu_has_avx512_vbmi "AVX-512 VBMI"
        ggml_cpu_has_avx512_vnni "AVX-512 VNNI"
        ggml_cpu_has_avx512_bf16 "AVX-512 BF16"
        ggml_cpu_has_amx_int8 "AMX INT8"
        ggml_cpu_has_neon "NEON"
        ggml_cpu_has_dotprod "DOTPROD"
        ggml_cpu_has_matmul_int8 "I8MM"
        ggml_cpu_has_sve "SVE"
        ggml_cpu_has_llamafile "llamafile"
    };
    let used = |name: &str| cfg!(ggml_amx) || name != "AMX INT8";
    let had = all
        .into_iter()
        .filter(|(name, has)| *has != 0 && used(name));
    had.map(|(name, _)| name).collect()
}

/// Bytes of an arena for a graph of `n` tensors.
fn graph_bytes(n: usize) -> usize {
    // SAFETY: a constant and arithmetic.
    unsafe { sys::ggml_graph_overhead_custom(n, false) + sys::ggml_tensor_overhead() }
}
