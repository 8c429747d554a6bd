//! What queries leave in a cache for those after them: a row of numbers for every so many positions. Unlike sums of keys
//! these do not follow from keys and values, so they are saved and loaded with them.

use std::ops::Range;

use super::Attention;
use super::select::{Chunking, Select};
use crate::error::{Error, Result};

/// How many there are, and how long they are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NoteShape {
    /// From one position that leaves a row to the next; 0: none does.
    pub every: usize,
    /// Floats of a row.
    pub n: usize,
}

impl NoteShape {
    /// What tells a query how far another before it was off: see [`Select::corrects_every`].
    pub fn of_differences(select: Option<&dyn Select>, attention: &Attention) -> Self {
        let every = select.and_then(Select::corrects_every);
        every.map_or(Self::default(), |every| Self {
            every,
            n: attention.n_heads * attention.head_dim,
        })
    }

    /// What tells where chunks end: see [`Chunking::samples`].
    pub fn of_samples(select: Option<&dyn Select>) -> Self {
        let chunking = select.and_then(Select::chunking);
        chunking.map_or(Self::default(), Chunking::samples)
    }

    /// All that queries leave.
    pub fn all(select: Option<&dyn Select>, attention: &Attention) -> [Self; 2] {
        [
            Self::of_samples(select),
            Self::of_differences(select, attention),
        ]
    }

    /// Floats of the rows of the first `n_positions`.
    fn floats(self, n_positions: usize) -> usize {
        match self.every {
            0 => 0,
            every => n_positions.div_ceil(every) * self.n,
        }
    }

    /// Their bytes.
    pub fn bytes(self, n_positions: usize) -> usize {
        self.floats(n_positions) * size_of::<f32>()
    }

    /// Those of `positions` that leave a row.
    pub(in crate::backend) fn among(
        self,
        positions: Range<usize>,
    ) -> std::iter::StepBy<Range<usize>> {
        let every = self.every.max(1);
        let first = positions.start.next_multiple_of(every);
        let end = if self.every == 0 { 0 } else { positions.end };
        (first..end.max(first)).step_by(every)
    }
}

/// The rows.
#[derive(Debug, Default)]
pub struct Notes {
    shape: NoteShape,
    rows: Vec<f32>,
}

impl Notes {
    /// None yet.
    pub(in crate::backend) fn new(shape: NoteShape) -> Self {
        let rows = Vec::new();
        Self { shape, rows }
    }

    /// How many there are.
    pub(in crate::backend) fn shape(&self) -> NoteShape {
        self.shape
    }

    /// The row that is left at `position`, or was at the last before it; zeros if nobody left one there.
    pub(in crate::backend) fn row(&self, position: usize) -> &[f32] {
        &self.rows[position / self.shape.every * self.shape.n..][..self.shape.n]
    }

    /// The same, to be written.
    pub(in crate::backend) fn row_mut(&mut self, position: usize) -> &mut [f32] {
        &mut self.rows[position / self.shape.every * self.shape.n..][..self.shape.n]
    }

    /// Makes room for the rows of the first `n_positions`.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(in crate::backend) fn reserve(&mut self, n_positions: usize) -> Result<()> {
        let n = self.shape.floats(n_positions);
        let more = n.saturating_sub(self.rows.len());
        let reserved = self.rows.try_reserve_exact(more);
        reserved.map_err(|_| no_memory(n))?;
        self.rows.resize(n.max(self.rows.len()), 0.0);
        Ok(())
    }

    /// A copy.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(in crate::backend) fn try_clone(&self) -> Result<Self> {
        let (mut rows, n) = (Vec::new(), self.rows.len());
        let reserved = rows.try_reserve_exact(n);
        reserved.map_err(|_| no_memory(n))?;
        rows.extend_from_slice(&self.rows);
        Ok(Self { rows, ..*self })
    }

    /// Bytes held.
    pub(in crate::backend) fn bytes(&self) -> usize {
        self.rows.capacity() * size_of::<f32>()
    }

    /// The rows of the first `n_positions`, as they are saved.
    pub(in crate::backend) fn saved(&self, n_positions: usize) -> &[u8] {
        bytemuck::cast_slice(&self.rows[..self.shape.floats(n_positions)])
    }

    /// The same, to be filled.
    pub(in crate::backend) fn saved_mut(&mut self, n_positions: usize) -> &mut [u8] {
        let n = self.shape.floats(n_positions);
        bytemuck::cast_slice_mut(&mut self.rows[..n])
    }
}

fn no_memory(n: usize) -> Error {
    Error::OutOfMemory {
        what: "what queries leave".into(),
        bytes: n * size_of::<f32>(),
    }
}
