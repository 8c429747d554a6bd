//! Tensors of a file, checked for their shape and given to a backend.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::{Backend, Linear, LinearOf};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::model::Part;
use crate::quant::{Bytes, DType, Tensor};

/// Where an architecture takes its weights from.
pub struct Weights<'a, B> {
    /// The file.
    pub gguf: &'a Gguf,
    /// Who runs them.
    pub backend: &'a B,
    /// The prefix of the architecture's keys.
    pub architecture: &'a str,
    /// Ends the loading, between two tensors.
    pub cancel: &'a Cancel,
    /// Those that are wanted; `None`: all.
    pub layers: Option<Range<usize>>,
}

impl<B: Backend> Weights<'_, B> {
    /// The layers that are wanted, of as many.
    pub fn part(&self, n_layers: usize) -> Part {
        Part {
            layers: self.layers.clone().unwrap_or(0..n_layers),
            n_layers,
        }
    }

    /// Whether the file has a tensor.
    pub fn has(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.cancel.check()?;
        let tensor = self.gguf.load(name)?;
        let mut expected = [1; 4];
        expected[..shape.len()].copy_from_slice(shape);
        if tensor.shape == expected {
            return Ok(tensor);
        }
        let found = &tensor.shape[..shape.len().max(
            tensor
                .shape
                .iter()
                .rposition(|n| *n != 1)
                .map_or(1, |i| i + 1),
        )];
        Err(Error::BadModel(format!(
            "tensor {name}: expected shape {shape:?}, found {found:?}"
        )))
    }

    /// The matrix `name`, `[n_in, n_out]` in the order of the file.
    ///
    /// # Errors
    /// If it is missing, of another shape, or in a format that the backend cannot run.
    pub fn matrix(&self, name: &str, n_in: usize, n_out: usize) -> Result<B::Matrix> {
        self.backend.matrix(&self.tensor(name, &[n_in, n_out])?)
    }

    /// The same of a table whose rows are looked up one by one.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn table(&self, name: &str, n_in: usize, n_out: usize) -> Result<B::Matrix> {
        self.backend.table(&self.tensor(name, &[n_in, n_out])?)
    }

    /// The floats of a tensor.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.backend.floats(&self.tensor(name, shape)?))
    }

    /// The vector `name` of `n`.
    ///
    /// # Errors
    /// If it is missing or of another shape.
    pub fn vector(&self, name: &str, n: usize) -> Result<B::Vector> {
        Ok(self.backend.vector(self.floats(name, &[n])?))
    }

    /// The vector `name` of `n`, if the file has it.
    ///
    /// # Errors
    /// If it is of another shape.
    pub fn opt_vector(&self, name: &str, n: usize) -> Result<Option<B::Vector>> {
        self.has(name).then(|| self.vector(name, n)).transpose()
    }

    /// The linear layer `name.weight` with `name.bias` if there is one.
    ///
    /// # Errors
    /// As [`Weights::matrix`] and [`Weights::vector`].
    pub fn linear(&self, name: &str, n_in: usize, n_out: usize) -> Result<Linear<B>> {
        Ok(LinearOf {
            name: name.into(),
            weight: self.matrix(&format!("{name}.weight"), n_in, n_out)?,
            bias: self.opt_vector(&format!("{name}.bias"), n_out)?,
        })
    }

    /// The linear layer `name.weight` as floats, whatever the file has: for a router, whose choice a rounded weight changes.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn float_linear(&self, name: &str, n_in: usize, n_out: usize) -> Result<Linear<B>> {
        let mut tensor = self.tensor(&format!("{name}.weight"), &[n_in, n_out])?;
        if tensor.dtype != DType::F32 {
            let floats = Floats(self.backend.floats(&tensor));
            let n_bytes = floats.as_ref().len();
            tensor.data = Bytes::new(Arc::new(floats), 0..n_bytes);
            tensor.dtype = DType::F32;
        }
        Ok(LinearOf {
            name: name.into(),
            weight: self.backend.matrix(&tensor)?,
            bias: None,
        })
    }

    /// The linear layers `name.weight`, `[n_in, n_out, n]` in the order of the file, as one with the outputs of all.
    ///
    /// # Errors
    /// As [`Weights::matrix`].
    pub fn stacked(&self, name: &str, shape: [usize; 3]) -> Result<Linear<B>> {
        let tensor = self.tensor(&format!("{name}.weight"), &shape)?;
        Ok(LinearOf {
            name: name.into(),
            weight: self.backend.matrix(&tensor)?,
            bias: None,
        })
    }
}

/// Weights in memory of our own.
struct Floats(Vec<f32>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}
