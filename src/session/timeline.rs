//! Going back, and going apart: cuts at any position, marks, copies of a timeline.
//!
//! A cut leaves keys and values as they are. Convolutions remember inputs of the newest tokens alone, so theirs are
//! rewound where they reach as far, else restored from a mark, else rebuilt. For that bounded replay the tokens before
//! the cut run once more through the network, from zeroed convolutions, against the cached keys and values and without
//! writing any: an output depends on `L - 1` earlier inputs in each layer, so after `(L - 1) * n_convolutions` tokens
//! nothing is left of the zeros, and what the convolutions hold is exact to the bit. Each token takes the kernels that
//! it was first computed with.

use std::collections::VecDeque;
use std::sync::Arc;

use super::budget::Claim;
use super::engine::Memory;
use super::{Model, Session};
use crate::backend::delta::Delta;
use crate::backend::predictor::Predictor;
use crate::backend::{KvTypes, Step};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::model::{Output, Pass};
use crate::sparsity::Sparsity;

/// Marks that are kept: two a turn, where its prompt begins and where it ends.
const MARKS: usize = 4;

/// What a session holds beside the memory of the layers.
#[derive(Clone)]
pub(super) struct Timeline {
    pub(super) tokens: Vec<u32>,
    /// The step each token was computed in.
    pub(super) steps: Vec<Step>,
    /// After the last token, or none.
    pub(super) logits: Vec<f32>,
    /// The largest of them, where no more are known.
    pub(super) top: Vec<(u32, f32)>,
    /// From this position on convolutions can be rewound; `None`: what they hold is of no use.
    pub(super) exact_from: Option<usize>,
    /// In the order of positions.
    marks: VecDeque<Mark>,
}

/// A position to which going back costs nothing.
#[derive(Clone)]
struct Mark {
    position: usize,
    /// What all convolutions remember there.
    convs: Arc<[f32]>,
    /// Empty if they were not known.
    logits: Arc<[f32]>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            steps: Vec::new(),
            logits: Vec::new(),
            top: Vec::new(),
            exact_from: Some(0),
            marks: VecDeque::new(),
        }
    }
}

impl Timeline {
    /// What a file held; `exact`: the convolutions are as they were.
    pub(super) fn resumed(
        tokens: Vec<u32>,
        steps: Vec<Step>,
        logits: Vec<f32>,
        exact: bool,
    ) -> Self {
        Self {
            exact_from: exact.then_some(tokens.len()),
            tokens,
            steps,
            logits,
            top: Vec::new(),
            marks: VecDeque::new(),
        }
    }

    /// Bytes of logits and marks.
    pub(super) fn bytes(&self) -> usize {
        let marks = self.marks.iter().map(|m| m.convs.len() + m.logits.len());
        size_of::<f32>() * (self.logits.len() + marks.sum::<usize>())
    }
}

/// What a session held at some time: cheap to take and to keep, since keys and values are shared until one side writes
/// where the other has some. Of a budget it takes what it holds, since in the end all of that may be its own.
pub struct Snapshot {
    model: Model,
    kv: KvTypes,
    sparsity: Sparsity,
    predictor: Option<Arc<Predictor>>,
    delta: Option<Arc<Delta>>,
    memory: Memory,
    line: Timeline,
    _claim: Option<Claim>,
}

impl Snapshot {
    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.line.tokens
    }
}

impl Session {
    /// Forgets all tokens from position `n` on. What remains is exactly what a session would hold that had computed
    /// these tokens alone, in the same steps.
    ///
    /// # Errors
    /// If the backend fails; the next call tries again.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        self.cut(n);
        self.rebuild()
    }

    /// Computes the logits after the last token once more where [`Session::truncate`] forgot them, as they were
    /// computed first.
    ///
    /// # Errors
    /// If the backend fails; the last token is gone then.
    pub fn recall_logits(&mut self) -> Result<()> {
        let (Some(&token), Some(&step)) = (self.line.tokens.last(), self.line.steps.last()) else {
            return Ok(());
        };
        if self.line.logits.is_empty() {
            self.cut(self.line.tokens.len() - 1);
            self.forward(step, &[token], 0)?;
        }
        Ok(())
    }

    /// Remembers convolutions and logits as they are now, so that going back here costs nothing. The newest marks
    /// are kept.
    ///
    /// # Errors
    /// If the backend fails.
    pub fn mark(&mut self) -> Result<()> {
        let convs = self.or_on_cpu(|session| {
            session.rebuild()?;
            session.engine.conv_rows()
        })?;
        let position = self.line.tokens.len();
        while self
            .line
            .marks
            .back()
            .is_some_and(|m| m.position >= position)
        {
            self.line.marks.pop_back();
        }
        if self.line.marks.len() == MARKS {
            self.line.marks.pop_front();
        }
        self.line.marks.push_back(Mark {
            position,
            convs: convs.into(),
            logits: self.line.logits.as_slice().into(),
        });
        Ok(())
    }

    /// Another session that holds the same.
    ///
    /// # Errors
    /// If memory is missing, the model's budget does not suffice, or the backend cannot be had once more.
    pub fn fork(&self) -> Result<Self> {
        let kv = self.options().kv_options()?;
        let (engine, fault) = match &self.fault {
            Some(fault) => (self.model.cpu()?.engine(&kv)?, Some(fault.clone())),
            None => self.model.engine(&kv)?,
        };
        let mut fork = Self {
            model: self.model.clone(),
            engine,
            fault,
            is_behind: false,
            line: Timeline::default(),
            n_replayed: 0,
            cancel: Cancel::default(),
            claim: self.claim.as_ref().map(Claim::again).transpose()?,
            predictor: self.predictor.clone(),
            delta: self.delta.clone(),
            ..*self
        };
        // What the fork has of its own it has claimed.
        match self.engine.memory() {
            Ok(memory) if !self.is_behind => fork.restore(&self.held(memory, None))?,
            // This one has to be asked again before it knows that it has left its GPU.
            Ok(_) => {
                fork.line = self.line.clone();
                fork.is_behind = true;
            }
            Err(fault @ Error::Device { .. }) => {
                fork.line = self.line.clone();
                fork.leave_device(&fault)?;
            }
            Err(error) => return Err(error),
        }
        Ok(fork)
    }

    /// What this session holds now.
    ///
    /// # Errors
    /// If memory is missing, or the model's budget does not suffice.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let (kv, conv) = self.engine.state_bytes();
        let bytes = (kv + conv + self.line.bytes()) as u64;
        let claim = self.claim.as_ref().map(|claim| claim.another(bytes));
        self.hold(claim.transpose()?)
    }

    fn hold(&self, claim: Option<Claim>) -> Result<Snapshot> {
        match self.engine.memory() {
            Ok(memory) if !self.is_behind => Ok(self.held(memory, claim)),
            Ok(_) | Err(Error::Device { .. }) => {
                let mut fork = self.fork()?;
                fork.rebuild()?;
                Ok(fork.held(fork.engine.memory()?, claim))
            }
            Err(error) => Err(error),
        }
    }

    fn held(&self, memory: Memory, claim: Option<Claim>) -> Snapshot {
        Snapshot {
            model: self.model.clone(),
            kv: self.kv,
            sparsity: self.sparsity,
            predictor: self.predictor.clone(),
            delta: self.delta.clone(),
            memory,
            line: self.line.clone(),
            _claim: claim,
        }
    }

    /// Holds what `snapshot` does, whatever it held before.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is of another model or cache type, [`Error::ContextFull`] if it does not fit; nothing
    /// has changed then.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if !Arc::ptr_eq(&self.model.0, &snapshot.model.0)
            || self.kv != snapshot.kv
            || self.sparsity != snapshot.sparsity
            || self.predictor != snapshot.predictor
            || self.delta != snapshot.delta
        {
            return Err(Error::Invalid(
                "snapshot: expected one of this model, cache type and sparsity, found another"
                    .into(),
            ));
        }
        let (needed, n_ctx) = (snapshot.line.tokens.len(), self.n_ctx);
        if needed > n_ctx {
            return Err(Error::ContextFull { needed, n_ctx });
        }
        match self.engine.set_memory(&snapshot.memory) {
            Ok(true) => self.is_behind = false,
            // It is of a GPU that this session, or the other, has left.
            Ok(false) => {
                self.line = snapshot.line.clone();
                self.is_behind = true;
                return self.rebuild();
            }
            Err(fault @ Error::Device { .. }) => {
                self.line = snapshot.line.clone();
                return self.leave_device(&fault);
            }
            Err(error) => return Err(error),
        }
        self.line = snapshot.line.clone();
        // The copy has the rows that convolutions read, and none to rewind by.
        self.line.exact_from = self.line.exact_from.map(|_| needed);
        Ok(())
    }

    /// Tokens that were run once more to rebuild convolutions, in all.
    pub fn n_replayed(&self) -> usize {
        self.n_replayed
    }

    /// Forgets all tokens from position `n` on; convolutions that cannot be rewound wait for [`Session::rebuild`].
    pub(super) fn cut(&mut self, n: usize) {
        let line = &mut self.line;
        let Some(back) = line.tokens.len().checked_sub(n).filter(|back| *back > 0) else {
            return;
        };
        line.tokens.truncate(n);
        line.steps.truncate(n);
        line.logits.clear();
        line.top.clear();
        line.marks.retain(|mark| mark.position <= n);
        let reaches = line.exact_from.is_some_and(|from| from <= n);
        if !reaches || !self.engine.rewind_convs(back) {
            line.exact_from = None;
        }
        if let Some(mark) = line.marks.back().filter(|mark| mark.position == n) {
            line.logits.extend_from_slice(&mark.logits);
        }
    }

    /// Makes convolutions remember what they must at the end of the tokens.
    pub(super) fn rebuild(&mut self) -> Result<()> {
        self.or_on_cpu(Self::rebuild_once)
    }

    fn rebuild_once(&mut self) -> Result<()> {
        if self.is_behind {
            return self.replay();
        }
        if self.line.exact_from.is_some() {
            return Ok(());
        }
        let n = self.line.tokens.len();
        let mut start = n.saturating_sub(self.model.info().config.conv_reach);
        match self.line.marks.back().filter(|mark| mark.position >= start) {
            Some(mark) => {
                start = mark.position;
                self.engine.set_conv_rows(&mark.convs);
            }
            None => self.engine.reset_convs(),
        }
        self.n_replayed += n - start;
        for same in self.line.steps[start..].chunk_by(|a, b| a == b) {
            let pass = Pass {
                tokens: &self.line.tokens[start..start + same.len()],
                input: None,
                start,
                output: Output::Logits,
                output_from: same.len(),
                step: same[0],
                write_kv: false,
                follows: false,
            };
            self.engine.forward(&pass, &mut Vec::new())?;
            start += same.len();
        }
        self.line.exact_from = Some(n);
        Ok(())
    }

    /// Runs all tokens once more, each with the kernels that it was first computed with: the engine holds none of them.
    fn replay(&mut self) -> Result<()> {
        let line = &mut self.line;
        line.exact_from = None;
        // What convolutions held elsewhere differs in its last bits.
        line.marks.clear();
        self.engine.reset_convs();
        self.engine.reserve(0..line.tokens.len())?;
        let mut start = 0;
        for same in line.steps.chunk_by(|a, b| a == b) {
            for part in same.chunks(self.batch) {
                let pass = Pass {
                    tokens: &line.tokens[start..start + part.len()],
                    input: None,
                    start,
                    output: Output::Logits,
                    output_from: part.len(),
                    step: part[0],
                    write_kv: true,
                    follows: false,
                };
                self.engine.forward(&pass, &mut Vec::new())?;
                start += part.len();
            }
        }
        self.n_replayed += start;
        line.exact_from = Some(0);
        self.is_behind = false;
        Ok(())
    }
}
