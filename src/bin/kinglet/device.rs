//! `--device`: the processor, or a GPU.

use std::str::FromStr;

use clap::Args;
use kinglet::profile::roofline::cache_folder;
use kinglet::{BackendKind, LoadOptions};

#[cfg(not(feature = "gpu"))]
use crate::failure::Failure;
use crate::failure::Outcome;

/// Who computes.
#[derive(Args, Clone, Copy)]
pub struct DeviceArgs {
    /// Where it is computed: cpu, gpu (the first), auto (the first that is no software, else the processor), or the number
    /// of a GPU as `kinglet doctor` lists them
    #[arg(long, value_name = "WHICH")]
    device: Option<Device>,
    /// Layers on the GPU, the last ones and the head; also `-ngl` [default: all, or as many as --gpu-memory has room for]
    #[arg(long, value_name = "N", alias = "n-gpu-layers")]
    gpu_layers: Option<usize>,
    /// Keep the experts of a model, and the routers that choose them, on the CPU where the rest runs on the GPU
    #[arg(long)]
    cpu_moe: bool,
    /// Memory of the GPU that may be used: 800M, 2G
    #[arg(long, value_name = "SIZE", value_parser = crate::args::size)]
    gpu_memory: Option<u64>,
}

#[derive(Clone, Copy)]
enum Device {
    Cpu,
    Gpu,
    Auto,
    Index(#[cfg_attr(not(feature = "gpu"), expect(dead_code, reason = "an error there"))] usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cpu" => Ok(Device::Cpu),
            "gpu" => Ok(Device::Gpu),
            "auto" => Ok(Device::Auto),
            _ => match text.parse() {
                Ok(index) => Ok(Device::Index(index)),
                Err(_) => Err("expected cpu, gpu, auto or a number".into()),
            },
        }
    }
}

impl DeviceArgs {
    /// Adds what goes to the GPU.
    pub fn share(&self, load: &mut LoadOptions) {
        load.gpu_layers = self.gpu_layers;
        load.cpu_moe = self.cpu_moe;
        load.gpu_memory = self.gpu_memory;
        load.gpu_cache = cache_folder();
    }

    /// The backend and the number of its device, if the arguments say.
    #[cfg(feature = "gpu")]
    pub fn chosen(&self) -> Outcome<Option<(BackendKind, Option<usize>)>> {
        use kinglet::backend::gpu::adapters;
        Ok(self.device.map(|device| match device {
            Device::Cpu => (BackendKind::Cpu, None),
            Device::Gpu => (BackendKind::Gpu, None),
            Device::Index(index) => (BackendKind::Gpu, Some(index)),
            Device::Auto => match adapters().iter().find(|adapter| !adapter.is_software()) {
                Some(adapter) => (BackendKind::Gpu, Some(adapter.index)),
                None => (BackendKind::Cpu, None),
            },
        }))
    }

    /// The same in a build without a GPU.
    #[cfg(not(feature = "gpu"))]
    pub fn chosen(&self) -> Outcome<Option<(BackendKind, Option<usize>)>> {
        match self.device {
            None => Ok(None),
            Some(Device::Cpu | Device::Auto) => Ok(Some((BackendKind::Cpu, None))),
            Some(Device::Gpu | Device::Index(_)) => Err(Failure::usage(
                "--device: this build has no GPU: it wants the feature `gpu`".to_owned(),
            )),
        }
    }
}
