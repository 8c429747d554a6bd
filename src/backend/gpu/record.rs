//! What a pass will do: dispatches with their parameters, in order; buffers for activations; and the submission.

use std::collections::{HashMap, VecDeque};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use wgpu::BufferUsages;

use super::device::{self, Buffer, Device};
use super::pipeline::{Pipeline, Shader};
use super::times::Times;
use crate::error::{Error, Result};
use crate::profile::{Span, Work};

/// Bindings of a shader at most, with the one for parameters.
const MAX_BINDINGS: usize = 18;

/// Buffers of a dispatch, in the order of its bindings.
pub(super) struct Bindings<'a> {
    spans: [Option<device::Span<'a>>; MAX_BINDINGS],
    n: usize,
}

impl<'a> Bindings<'a> {
    pub(super) fn new() -> Self {
        Self {
            spans: [None; MAX_BINDINGS],
            n: 0,
        }
    }

    /// The next; `None`: not used.
    pub(super) fn push(&mut self, span: Option<device::Span<'a>>) {
        self.spans[self.n] = span;
        self.n += 1;
    }

    /// The next, of a shader that has it only where it is there.
    pub(super) fn push_some(&mut self, span: Option<device::Span<'a>>) {
        if span.is_some() {
            self.push(span);
        }
    }
}

impl<'a> Deref for Bindings<'a> {
    type Target = [Option<device::Span<'a>>];

    fn deref(&self) -> &Self::Target {
        &self.spans[..self.n]
    }
}

/// What a bind group is made of: the pipeline, then buffers.
type Key = [u64; MAX_BINDINGS];

/// Bind groups that are kept. Those of a decode step recur; a prompt of another length brings new ones.
const MAX_GROUPS: usize = 4096;

/// Bytes of a slot of parameters: the alignment of dynamic offsets that every device has.
const SLOT: usize = 256;

/// Slots of a submission at most,
const SLOTS: usize = 128;

/// and of the first that many, so that the GPU has begun when the others are recorded. On an H100 these decode 1.12 (1.2 B
/// parameters), 1.12 (89 M) and 1.18 times (SmolLM2-135M) as fast as submissions of 24, which had been best before the next
/// token was encoded ahead; one submission a token is as slow. A thread that submits while the next are recorded is slower, too.
const FIRST: usize = 16;

/// Submissions of a pass that are told apart where some may not run: more than there are, or else of the rest the last.
const SIGNED: u64 = 256;

/// Buffers of activations are the next power of two, from this.
const LEAST: u64 = 4096;

struct Command {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
    grid: [u32; 3],
    /// Where it is traced.
    span: Option<Span>,
}

impl Command {
    /// Whether it is `other` but for its parameters.
    fn recurs(&self, other: &Self) -> bool {
        self.pipeline.id == other.pipeline.id
            && self.group == other.group
            && self.grid == other.grid
    }
}

/// What the host reads after a submission: `bytes` of a buffer from a byte on, if any, by way of another.
#[derive(PartialEq)]
struct Reading {
    from: Option<(wgpu::Buffer, u64)>,
    bytes: u64,
    staging: wgpu::Buffer,
}

/// What the host has asked for and not taken yet.
struct Asked {
    staging: Buffer,
    /// What was wanted, before the words of submissions that may not have run.
    bytes: u64,
    signed: u64,
    pass: u64,
    /// What puts it there; `None`: nothing tells.
    after: Option<wgpu::SubmissionIndex>,
}

/// What a pass submitted. Those of passes that decode differ in their parameters alone, mostly: the next ones are encoded
/// while the GPU works, for encoding takes the host about as long as it takes the GPU to run them.
struct Submission {
    commands: Vec<Command>,
    reading: Option<Reading>,
    /// Whether it was the same in the pass before.
    recurs: bool,
    /// The same once more.
    again: Option<wgpu::CommandBuffer>,
}

impl Submission {
    fn is(&self, commands: &[Command], reading: Option<&Reading>) -> bool {
        let pairs = self.commands.iter().zip(commands);
        self.commands.len() == commands.len()
            && self.reading.as_ref() == reading
            && pairs.into_iter().all(|(a, b)| a.recurs(b))
    }
}

/// Records the passes of one session.
pub(super) struct Recorder {
    device: Arc<Device>,
    pipelines: HashMap<Shader, Arc<Pipeline>>,
    groups: HashMap<Key, wgpu::BindGroup>,
    commands: Vec<Command>,
    /// Those of this pass, `n_submitted`, then what is left of the pass before.
    submissions: Vec<Submission>,
    n_submitted: usize,
    /// Whether something of this pass was submitted.
    begun: bool,
    params: Vec<u8>,
    uniforms: Buffer,
    pool: Vec<Arc<Buffer>>,
    /// For what is read, those that nothing waits for.
    staging: Vec<Buffer>,
    /// The oldest first.
    asked: VecDeque<Asked>,
    /// Whether the pass began while the one before was running. The device has work then, so submissions are as long as they
    /// can be, and the host has time to encode them when they are recorded.
    is_ahead: bool,
    /// Passes so far.
    pass: u64,
    /// The number of the pass, and a word for each of its submissions that becomes it when that has run: where the system
    /// may leave some out.
    ran: Option<[Buffer; 2]>,
    /// Submissions of this pass that wrote theirs.
    n_ran: u64,
    /// Where operations are timed.
    times: Option<Times>,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.device.save_pipelines();
    }
}

impl Recorder {
    pub(super) fn new(device: Arc<Device>) -> Result<Self> {
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = device.buffer((SLOTS * SLOT) as u64, usage, "parameters")?;
        Ok(Self {
            pipelines: HashMap::new(),
            groups: HashMap::new(),
            commands: Vec::with_capacity(SLOTS),
            submissions: Vec::new(),
            n_submitted: 0,
            begun: false,
            params: Vec::with_capacity(SLOTS * SLOT),
            uniforms,
            pool: Vec::new(),
            staging: Vec::with_capacity(2),
            asked: VecDeque::with_capacity(2),
            is_ahead: false,
            pass: 0,
            ran: None,
            n_ran: 0,
            times: None,
            device,
        })
    }

    /// From now on times every dispatch, if the device can.
    pub(super) fn time(&mut self) -> Result<()> {
        if self.device.info.timestamps {
            self.times = Some(Times::new(&self.device, SLOTS)?);
        }
        Ok(())
    }

    /// The times of the dispatches.
    pub(super) fn times(&mut self) -> Option<&mut Times> {
        self.times.as_mut()
    }

    /// Forgets what was recorded and not submitted, and what was asked for.
    pub(super) fn begin(&mut self) {
        self.restart();
        self.submissions.truncate(self.n_submitted);
        self.n_submitted = 0;
        self.is_ahead = false;
        let unused = self.asked.drain(..).map(|asked| asked.staging);
        self.staging.extend(unused);
    }

    fn restart(&mut self) {
        self.commands.clear();
        self.params.clear();
        self.begun = false;
        self.pass += 1;
        self.n_ran = 0;
    }

    /// Whether passes may begin while others run: not where each is timed, or may be refused.
    pub(super) fn can_run_ahead(&self) -> bool {
        self.times.is_none() && !self.device.may_refuse.load(Ordering::Relaxed)
    }

    /// Begins a pass while the one before runs, if that may be.
    pub(super) fn begin_ahead(&mut self) -> bool {
        let may = self.can_run_ahead();
        if may {
            self.restart();
            self.is_ahead = true;
        }
        may
    }

    /// Bytes of activations.
    pub(super) fn bytes(&self) -> usize {
        self.pool.iter().map(|buffer| buffer.bytes as usize).sum()
    }

    /// Bind groups keep their buffers alive: those of buffers that were replaced must go.
    pub(super) fn forget_groups(&mut self) {
        self.groups.clear();
        self.submissions.clear();
        self.n_submitted = 0;
    }

    /// A buffer for `n` floats that nobody holds. Its contents are anything.
    pub(super) fn take(&mut self, n: usize) -> Result<Arc<Buffer>> {
        self.find(n, true)
    }

    /// The same, which no dispatch of this pass has used: the host may write to it.
    pub(super) fn take_for_upload(&mut self, n: usize) -> Result<Arc<Buffer>> {
        self.find(n, false)
    }

    fn find(&mut self, n: usize, used: bool) -> Result<Arc<Buffer>> {
        let bytes = (4 * n as u64).max(LEAST).next_power_of_two();
        let bytes = bytes.min((4 * n as u64).max(self.device.info.max_binding));
        let pass = self.pass;
        let is_free = |buffer: &&Arc<Buffer>| {
            buffer.bytes == bytes
                && Arc::strong_count(buffer) == 1
                && (used || buffer.pass.load(Ordering::Relaxed) != pass)
        };
        let found = self.pool.iter().find(is_free);
        let buffer = match found {
            Some(buffer) => Arc::clone(buffer),
            None => {
                let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
                let buffer = Arc::new(self.device.buffer(bytes, usage, "activations")?);
                self.pool.push(Arc::clone(&buffer));
                buffer
            }
        };
        buffer.pass.store(pass, Ordering::Relaxed);
        Ok(buffer)
    }

    /// Records a dispatch of `shader` with its parameters and buffers, in the order of its bindings; `None`: not used.
    /// `names` are those of its matrices, `work` what was done when it is.
    pub(super) fn dispatch(
        &mut self,
        (names, work): (&[&str], Work),
        shader: Shader,
        params: &[u32],
        buffers: &[Option<device::Span>],
        grid: [usize; 3],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let most = self.device.limits.max_compute_workgroups_per_dimension as usize;
        if grid.iter().any(|n| *n > most) {
            return Err(Error::Unsupported {
                kind: "size on this GPU",
                found: format!("{grid:?} workgroups of {shader:?}"),
                supported: format!("{most} each way"),
            });
        }
        let pipeline = match self.pipelines.get(&shader) {
            Some(pipeline) => Arc::clone(pipeline),
            None => {
                let pipeline = self.device.pipeline(shader)?;
                self.pipelines.insert(shader, Arc::clone(&pipeline));
                pipeline
            }
        };
        assert_eq!(buffers.len(), pipeline.bindings.len(), "{shader:?}");
        assert!(4 * params.len() <= SLOT, "parameters fit a slot");
        let mut key = [u64::MAX; MAX_BINDINGS];
        key[0] = pipeline.id;
        for (key, buffer) in key[1..].iter_mut().zip(buffers) {
            *key = buffer.map_or(0, |span| (span.buffer.id << 24) | (span.offset / 256));
        }
        let group = match self.groups.get(&key) {
            Some(group) => group.clone(),
            None => {
                let group = self.group(&pipeline, buffers);
                if self.groups.len() == MAX_GROUPS {
                    self.groups.clear();
                }
                self.groups.insert(key, group.clone());
                group
            }
        };
        let span = self.times.as_mut().map(|t| t.span(shader, names, work));
        let start = self.params.len();
        self.params.extend_from_slice(bytemuck::cast_slice(params));
        self.params.resize(start + SLOT, 0);
        self.commands.push(Command {
            pipeline,
            group,
            grid: grid.map(|n| n as u32),
            span,
        });
        let most = match self.begun || self.is_ahead {
            true => SLOTS,
            false => FIRST,
        };
        if self.commands.len() == most {
            self.submit()?;
        }
        Ok(())
    }

    fn group(&self, pipeline: &Pipeline, buffers: &[Option<device::Span>]) -> wgpu::BindGroup {
        self.device.n_made.fetch_add(1, Ordering::Relaxed);
        let nothing = self.device.nothing.all();
        let uniforms = device::Span {
            bytes: SLOT as u64,
            ..self.uniforms.all()
        };
        let bindings = std::iter::once((0, uniforms)).chain(
            pipeline
                .bindings
                .iter()
                .zip(buffers)
                .map(|(binding, buffer)| (*binding, buffer.unwrap_or(nothing))),
        );
        let entries: Vec<_> = bindings
            .map(|(binding, span)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &span.buffer.raw,
                    offset: span.offset,
                    size: std::num::NonZeroU64::new(span.bytes),
                }),
            })
            .collect();
        self.device
            .raw
            .create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.layout,
                entries: &entries,
            })
    }

    fn encode(
        &mut self,
        commands: &[Command],
        reading: Option<&Reading>,
    ) -> Result<wgpu::CommandBuffer> {
        let mut encoder = self.device.raw.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            let mut last = u64::MAX;
            if let Some(times) = &self.times {
                pass.write_timestamp(times.queries(), 0);
            }
            for (i, command) in commands.iter().enumerate() {
                if command.pipeline.id != last {
                    pass.set_pipeline(&command.pipeline.raw);
                    last = command.pipeline.id;
                }
                pass.set_bind_group(0, &command.group, &[(i * SLOT) as u32]);
                let [x, y, z] = command.grid;
                pass.dispatch_workgroups(x, y, z);
                if let Some(times) = &self.times {
                    pass.write_timestamp(times.queries(), i as u32 + 1);
                }
            }
        }
        if let Some(times) = &mut self.times {
            let spans = commands.iter().filter_map(|command| command.span);
            times.resolve(&mut encoder, spans);
        }
        self.sign(&mut encoder)?;
        if let Some(Reading {
            from,
            bytes,
            staging,
        }) = reading
        {
            if let Some((buffer, at)) = from {
                encoder.copy_buffer_to_buffer(buffer, *at, staging, 0, *bytes);
            }
            if let Some([_, ran]) = &self.ran {
                encoder.copy_buffer_to_buffer(&ran.raw, 0, staging, *bytes, 4 * self.n_ran);
            }
        }
        Ok(encoder.finish())
    }

    /// Hands what was recorded to the device, and what is read then.
    fn hand_over(&mut self, reading: Option<Reading>) -> Result<Option<wgpu::SubmissionIndex>> {
        if !self.params.is_empty() {
            let queue = &self.device.queue;
            queue.write_buffer(&self.uniforms.raw, 0, &self.params);
            self.params.clear();
        }
        self.begun = true;
        if self.is_ahead {
            let commands = std::mem::take(&mut self.commands);
            let encoded = self.encode(&commands, reading.as_ref())?;
            self.commands = commands;
            self.commands.clear();
            let [n_submitted, _, n_while_running] = &self.device.n_submitted;
            n_submitted.fetch_add(1, Ordering::Relaxed);
            n_while_running.fetch_add(1, Ordering::Relaxed);
            return self.device.submit(encoded);
        }
        let at = self.n_submitted;
        let before = self.submissions.get_mut(at);
        let recurs = before
            .as_ref()
            .is_some_and(|before| before.is(&self.commands, reading.as_ref()));
        let again = before.filter(|_| recurs).and_then(|s| s.again.take());
        let [n_submitted, n_ahead, _] = &self.device.n_submitted;
        n_submitted.fetch_add(1, Ordering::Relaxed);
        n_ahead.fetch_add(u64::from(again.is_some()), Ordering::Relaxed);
        let mut commands = std::mem::take(&mut self.commands);
        let encoded = match again {
            Some(again) => again,
            None => self.encode(&commands, reading.as_ref())?,
        };
        if self.times.is_some() || self.device.may_refuse.load(Ordering::Relaxed) {
            commands.clear(); // no two are the same
        } else if recurs {
            self.submissions[at].recurs = true;
            commands.clear();
            self.n_submitted += 1;
        } else {
            let new = Submission {
                commands,
                reading,
                recurs: false,
                again: None,
            };
            match self.submissions.get_mut(at) {
                Some(before) => {
                    commands = std::mem::replace(before, new).commands;
                    commands.clear();
                }
                None => {
                    commands = Vec::with_capacity(SLOTS);
                    self.submissions.push(new);
                }
            }
            self.n_submitted += 1;
        }
        self.commands = commands;
        self.device.submit(encoded)
    }

    /// Encodes what this pass has submitted once more, where the pass before did the same.
    fn encode_ahead(&mut self) -> Result<()> {
        for at in 0..self.n_submitted {
            if !self.submissions[at].recurs || self.submissions[at].again.is_some() {
                continue;
            }
            let commands = std::mem::take(&mut self.submissions[at].commands);
            let reading = self.submissions[at].reading.take();
            let again = self.encode(&commands, reading.as_ref())?;
            let submission = &mut self.submissions[at];
            submission.commands = commands;
            submission.reading = reading;
            submission.again = Some(again);
        }
        Ok(())
    }

    /// The last thing that a submission does: puts the number of the pass into its word.
    fn sign(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        if !self.device.may_refuse.load(Ordering::Relaxed) {
            return Ok(());
        }
        let [number, ran] = match &self.ran {
            Some(ran) => ran,
            None => {
                let usage = BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
                let new = |n| self.device.buffer(4 * n, usage, "what ran");
                self.ran.insert([new(1)?, new(SIGNED)?])
            }
        };
        if self.n_ran == 0 {
            let word = (self.pass as u32).to_le_bytes();
            self.device.queue.write_buffer(&number.raw, 0, &word);
        }
        let at = self.n_ran.min(SIGNED - 1);
        encoder.copy_buffer_to_buffer(&number.raw, 0, &ran.raw, 4 * at, 4);
        self.n_ran = at + 1;
        Ok(())
    }

    /// Runs everything, and sees to it that all of it ran.
    pub(super) fn finish(&mut self) -> Result<()> {
        match self.device.may_refuse.load(Ordering::Relaxed) {
            true => self.read(None, |_| {}),
            false => {
                self.submit()?;
                self.device.wait(None)
            }
        }
    }

    /// Hands what was recorded to the device.
    pub(super) fn submit(&mut self) -> Result<()> {
        if !self.commands.is_empty() {
            self.hand_over(None)?;
            if let Some(times) = &mut self.times {
                times.collect(&self.device)?;
            }
        }
        self.device.check("submitting")
    }

    /// Runs everything and takes `n` floats of a buffer from float `at`.
    pub(super) fn read(
        &mut self,
        part: Option<(&Buffer, usize, usize)>,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        self.ask(part)?;
        self.encode_ahead()?;
        self.answer(take)?;
        if let Some(times) = &mut self.times {
            times.collect(&self.device)?;
        }
        Ok(())
    }

    /// Runs everything; the floats are for [`Recorder::answer`].
    pub(super) fn ask(&mut self, part: Option<(&Buffer, usize, usize)>) -> Result<()> {
        let wanted = part.map_or(0, |(_, _, n)| 4 * n as u64);
        let bytes = wanted + 4 * SIGNED;
        let staging = match self.staging.pop().filter(|staging| staging.bytes >= bytes) {
            Some(staging) => staging,
            None => {
                let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
                self.device.buffer(bytes, usage, "reading back")?
            }
        };
        let reading = Reading {
            from: part.map(|(buffer, at, _)| (buffer.raw.clone(), 4 * at as u64)),
            bytes: wanted,
            staging: staging.raw.clone(),
        };
        let after = self.hand_over(Some(reading))?;
        self.asked.push_back(Asked {
            staging,
            bytes: wanted,
            signed: 4 * self.n_ran,
            pass: self.pass,
            after,
        });
        Ok(())
    }

    /// Takes what was asked for first, when it is there.
    pub(super) fn answer(&mut self, take: impl FnOnce(&[u8])) -> Result<()> {
        let asked = self.asked.pop_front().expect("it was asked for");
        let (pass, mut all_ran) = (asked.pass as u32, Ok(()));
        let device = Arc::clone(&self.device);
        let bytes = asked.bytes + asked.signed;
        device.read_back(&asked.staging.raw, bytes, asked.after, |view| {
            let (view, ran) = view.split_at(asked.bytes as usize);
            all_ran = device.must_have_run(bytemuck::cast_slice(ran), pass);
            take(view);
        })?;
        self.staging.push(asked.staging);
        all_ran
    }
}
