//! Experts that stay on the host: the rest of a layer runs on the device, and for them its rows come and go.

use std::collections::HashMap;
use std::sync::Arc;

use super::device::Buffer;
use super::{Gpu, Rows, Tensor, Value, Vector};
use crate::backend::cpu::{self, Cpu};
use crate::backend::{Backend, LinearOf, Moe, MoeOf, Step};
use crate::cancel::Cancel;
use crate::error::Result;
use crate::profile::Work;
use crate::quant::Tensor as FileTensor;

/// The CPU, for the experts of a session.
pub(super) struct Host {
    cpu: Cpu,
    /// Layers by the names of their routers.
    layers: HashMap<Arc<str>, Arc<Moe<Cpu>>>,
    /// What was read last, and where it lies on the device: a router often reads what its experts will.
    seen: Option<(Arc<Buffer>, usize, cpu::Tensor)>,
    /// The routes that the layer's experts will be asked for.
    routes: Option<cpu::Tensor>,
}

/// Whether a tensor is one of experts, or chooses them.
pub fn is_of_experts(name: &str) -> bool {
    name.contains("_exps.") || name.contains("ffn_gate_inp.")
}

impl Host {
    pub(super) fn new(cpu: Cpu) -> Self {
        Self {
            cpu,
            layers: HashMap::new(),
            seen: None,
            routes: None,
        }
    }

    pub(super) fn begin(&mut self, step: Step) {
        (self.seen, self.routes) = (None, None);
        self.cpu.begin(step);
    }

    pub(super) fn set_cancel(&mut self, cancel: &Cancel) {
        self.cpu.set_cancel(cancel);
    }

    pub(super) fn work(&self) -> Work {
        self.cpu.work()
    }

    pub(super) fn scratch_bytes(&self) -> usize {
        self.cpu.scratch_bytes()
    }
}

impl Gpu {
    /// The same, with a CPU that has the experts.
    pub fn with_host(self, cpu: Cpu) -> Self {
        Self {
            host: Some(Box::new(Host::new(cpu))),
            ..self
        }
    }

    /// The experts of a layer on the CPU.
    fn host_layer(&self, host: &mut Host, moe: &Moe<Self>) -> Result<Arc<Moe<Cpu>>> {
        if let Some(layer) = host.layers.get(&moe.router.name) {
            return Ok(Arc::clone(layer));
        }
        let matrix = |weights: &super::Matrix| {
            let tensor: &FileTensor = weights.0.host().expect("a layer as a whole is on the host");
            host.cpu.matrix(tensor)
        };
        let vector = |vector: &Vector| -> Result<Vec<f32>> {
            let bytes = (vector.n * size_of::<f32>()) as u64;
            let bytes = self.device.download(&vector.buffer, 0, bytes)?;
            let floats = bytes.as_chunks::<4>().0.iter();
            Ok(host
                .cpu
                .vector(floats.map(|x| f32::from_le_bytes(*x)).collect()))
        };
        let linear = |layer: &crate::backend::Linear<Self>| -> Result<crate::backend::Linear<Cpu>> {
            Ok(LinearOf {
                name: Arc::clone(&layer.name),
                weight: matrix(&layer.weight)?,
                bias: layer.bias.as_ref().map(vector).transpose()?,
            })
        };
        let layer = Arc::new(MoeOf {
            router: linear(&moe.router)?,
            selection_bias: moe.selection_bias.as_ref().map(vector).transpose()?,
            routing: moe.routing,
            gate: linear(&moe.gate)?,
            up: linear(&moe.up)?,
            down: linear(&moe.down)?,
            down_by_neuron: moe.down_by_neuron,
            n_ffn: moe.n_ffn,
            activation: moe.activation,
        });
        let name = Arc::clone(&moe.router.name);
        host.layers.insert(name, Arc::clone(&layer));
        Ok(layer)
    }

    /// The rows of a tensor, on the host.
    fn pull(&mut self, host: &mut Host, x: &Tensor) {
        self.settle();
        let rows = self.rows(x);
        let is_seen = |(buffer, at, _): &&(Arc<Buffer>, usize, cpu::Tensor)| {
            Arc::ptr_eq(buffer, &rows.buffer) && *at == rows.at
        };
        if host.seen.as_ref().filter(is_seen).is_some() {
            return;
        }
        let mut pulled = None;
        let take = |bytes: &[u8]| {
            pulled = Some(host.cpu.import(bytemuck::cast_slice(bytes), x.n_cols));
        };
        let part = Some((&*rows.buffer, rows.at, x.n_tokens * x.n_cols));
        let read = self.recorder.get_mut().read(part, take);
        self.done(read);
        let pulled = pulled.expect("what was read was taken");
        host.seen = Some((rows.buffer, rows.at, pulled));
    }

    /// [`Backend::route`] for experts on the host; the routes stay there.
    pub(super) fn route_on_host(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        let mut host = self.host.take().expect("experts on the host");
        let layer = self.host_layer(&mut host, moe);
        let layer = self.done(layer);
        self.pull(&mut host, x);
        let Host { cpu, seen, .. } = &mut *host;
        let (_, _, rows) = seen.as_ref().expect("just pulled");
        host.routes = Some(cpu.route(rows, from, &layer));
        self.host = Some(host);
        let nothing = self.take(1);
        Tensor::new(x.n_tokens - from, 0, Value::Rows(nothing))
    }

    /// [`Backend::moe`] likewise.
    pub(super) fn moe_on_host(&mut self, x: &Tensor, moe: &Moe<Self>) -> Tensor {
        let mut host = self.host.take().expect("experts on the host");
        let layer = self.host_layer(&mut host, moe);
        let layer = self.done(layer);
        self.pull(&mut host, x);
        let routes = host
            .routes
            .take()
            .expect("a layer routes before its experts");
        let Host { cpu, seen, .. } = &mut *host;
        let (_, _, rows) = seen.as_ref().expect("just pulled");
        let out = cpu.moe(rows, routes, &layer);
        let mut numbers = Vec::new();
        let read = cpu.read(&out, &mut numbers);
        self.done(read);
        host.seen = None;
        self.host = Some(host);
        let rows: Rows = self.upload(bytemuck::cast_slice(&numbers));
        Tensor::new(x.n_tokens, x.n_cols, Value::Rows(rows))
    }
}
