//! What becomes of a session whose GPU fails: it goes on on the CPU, from the tokens that it holds. What was on the device
//! is gone, so they are read once more, each with the kernels of the step that it was first computed in.

use super::engine::{self, Engine, Loaded};
use super::{LoadOptions, Model, Session};
use crate::backend::BackendKind;
use crate::backend::select::KvOptions;
use crate::error::{DeviceFault, Error, Result};

impl Model {
    /// An engine on its backend; on the CPU, and why, where that is a GPU that fails.
    pub(super) fn engine(&self, kv: &KvOptions) -> Result<(Box<dyn Engine>, Option<String>)> {
        match self.0.network.engine(kv) {
            Err(fault @ Error::Device { .. }) => {
                Ok((self.cpu()?.engine(kv)?, Some(fault.to_string())))
            }
            engine => Ok((engine?, None)),
        }
    }

    /// Its network on the CPU, which is made with the first session that needs it.
    pub(super) fn cpu(&self) -> Result<&dyn Loaded> {
        if let Some(network) = self.0.cpu.get() {
            return Ok(&**network);
        }
        let options = LoadOptions {
            backend: BackendKind::Cpu,
            ..self.0.options.clone()
        };
        let (threads, residency) = (self.0.threads, &self.0.residency);
        let network = engine::load(self.gguf(), &options, threads, residency, None)?;
        Ok(&**self.0.cpu.get_or_init(|| network))
    }
}

impl Session {
    /// Why it left the GPU that it was made for; `None` as long as it has not. It goes on on the CPU, with the same tokens.
    pub fn device_fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Does `work`; where the GPU fails at it, once more on the CPU.
    pub(super) fn or_on_cpu<T>(&mut self, work: impl Fn(&mut Self) -> Result<T>) -> Result<T> {
        match work(self) {
            Err(fault @ Error::Device { .. }) if self.fault.is_none() => {
                self.leave_device(&fault)?;
                work(self)
            }
            done => done,
        }
    }

    /// Goes on on the CPU.
    pub(super) fn leave_device(&mut self, fault: &Error) -> Result<()> {
        let kv = self.options().kv_options()?;
        self.engine = self.model.cpu()?.engine(&kv)?;
        self.engine.set_cancel(&self.cancel);
        self.fault = Some(fault.to_string());
        self.is_behind = true;
        self.rebuild()
    }

    /// That its engine holds what the timeline does: not where reading it again was cancelled.
    pub(super) fn check_behind(&self) -> Result<()> {
        match self.is_behind {
            false => Ok(()),
            true => Err(Error::Device {
                fault: DeviceFault::Lost,
                what: "its tokens were not read again yet".into(),
            }),
        }
    }
}
