//! A model in two parts: the first layers on the CPU, the last and the head on a GPU. What is between, a row a token, goes
//! over once a pass; nothing comes back but the output.

use std::ops::Range;

use super::engine::{self, Engine, Memory};
use crate::backend::planner::Tally;
use crate::backend::select::KvOptions;
use crate::cancel::Cancel;
use crate::error::Result;
use crate::model::Pass;
use crate::model::config::Config;
use crate::profile::{Trace, Work};

/// Both parts of a network.
pub(super) struct Loaded {
    pub(super) first: Box<dyn engine::Loaded>,
    pub(super) last: Box<dyn engine::Loaded>,
}

struct Split {
    first: Box<dyn Engine>,
    last: Box<dyn Engine>,
    /// What the first part made of the tokens.
    rows: Vec<f32>,
}

impl engine::Loaded for Loaded {
    fn config(&self) -> &Config {
        self.first.config()
    }

    fn engine(&self, kv: &KvOptions) -> Result<Box<dyn Engine>> {
        Ok(Box::new(Split {
            first: self.first.engine(kv)?,
            last: self.last.engine(kv)?,
            rows: Vec::new(),
        }))
    }
}

impl Engine for Split {
    fn reserve(&mut self, positions: Range<usize>) -> Result<()> {
        self.first.reserve(positions.clone())?;
        self.last.reserve(positions)
    }

    fn forward_top(
        &mut self,
        pass: &Pass,
        k: usize,
        top: &mut Vec<(u32, f32)>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        self.first.forward(pass, &mut self.rows)?;
        let rest = Pass {
            input: Some(&self.rows),
            ..*pass
        };
        self.last.forward_top(&rest, k, top, logits)
    }

    fn set_cancel(&mut self, cancel: &Cancel) {
        self.first.set_cancel(cancel);
        self.last.set_cancel(cancel);
    }

    fn reset_convs(&mut self) {
        self.first.reset_convs();
        self.last.reset_convs();
    }

    fn rewind_convs(&mut self, n: usize) -> bool {
        // Where one part cannot, both are restored or rebuilt.
        self.first.rewind_convs(n) && self.last.rewind_convs(n)
    }

    fn conv_rows(&self) -> Result<Vec<f32>> {
        let mut rows = self.first.conv_rows()?;
        rows.extend(self.last.conv_rows()?);
        Ok(rows)
    }

    fn set_conv_rows(&mut self, rows: &[f32]) {
        let n = self.first.conv_rows().map_or(0, |rows| rows.len());
        let (first, last) = rows.split_at(n);
        self.first.set_conv_rows(first);
        self.last.set_conv_rows(last);
    }

    fn memory(&self) -> Result<Memory> {
        let parts = [self.first.memory()?, self.last.memory()?];
        Ok(Memory(Box::new(parts)))
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<bool> {
        let Some([first, last]) = memory.0.downcast_ref::<[Memory; 2]>() else {
            return Ok(false);
        };
        // The GPU first: where it fails nothing has changed.
        Ok(self.last.set_memory(last)? && self.first.set_memory(first)?)
    }

    fn save(&self, n: usize, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        self.first.save(n, sink)?;
        self.last.save(n, sink)
    }

    fn load(&mut self, n: usize, source: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        self.first.load(n, source)?;
        self.last.load(n, source)
    }

    fn state_bytes(&self) -> (usize, usize) {
        let ((kv, conv), (more_kv, more_conv)) =
            (self.first.state_bytes(), self.last.state_bytes());
        (kv + more_kv, conv + more_conv)
    }

    fn scratch_bytes(&self) -> usize {
        self.first.scratch_bytes()
            + self.last.scratch_bytes()
            + size_of::<f32>() * self.rows.capacity()
    }

    fn work(&self) -> Work {
        let mut work = self.first.work();
        work += self.last.work();
        work
    }

    fn take_trace(&mut self) -> Option<Trace> {
        let mut trace = self.first.take_trace()?;
        if let Some(rest) = self.last.take_trace() {
            trace.append(rest);
        }
        Some(trace)
    }

    fn tallies(&self) -> Vec<Tally> {
        let mut tallies = self.first.tallies();
        tallies.extend(self.last.tallies());
        tallies
    }
}
