//! The largest logits, found on the device: a token costs the host some pairs to read, not a vocabulary.

use super::pipeline::{MAX_TOP, Shader};
use super::{Gpu, Rows, Tensor};
use crate::error::Result;

/// Numbers of a workgroup of `argmax.wgsl` and of `top_k.wgsl`.
const GROUP: [usize; 2] = [4096, 1024];

impl Gpu {
    /// See [`Backend::read_top`](crate::backend::Backend::read_top).
    pub(super) fn top(&mut self, x: &Tensor, k: usize, out: &mut Vec<(u32, f32)>) -> Result<bool> {
        let Some(rows) = self.choose_top(x, k) else {
            return Ok(false);
        };
        out.clear();
        let take = |bytes: &[u8]| out.extend(pairs(bytes).take(k));
        let part = Some((&*rows.buffer, rows.at, 2 * k));
        self.recorder.get_mut().read(part, take)?;
        Ok(true)
    }

    /// See [`Backend::ask_largest`](crate::backend::Backend::ask_largest).
    pub(super) fn ask(&mut self, x: &Tensor) -> Result<bool> {
        let recorder = self.recorder.get_mut();
        if !recorder.can_run_ahead() {
            return Ok(false);
        }
        let Some(rows) = self.choose_top(x, 1) else {
            return Ok(false);
        };
        let part = Some((&*rows.buffer, rows.at, 2));
        self.recorder.get_mut().ask(part)?;
        self.count_ahead();
        self.largest = Some(rows);
        Ok(true)
    }

    /// See [`Backend::answer`](crate::backend::Backend::answer).
    pub(super) fn answered(&mut self) -> Result<(u32, f32)> {
        let mut found = (0, 0.0);
        let take = |bytes: &[u8]| pairs(bytes).for_each(|pair| found = pair);
        self.recorder.get_mut().answer(take)?;
        Ok(found)
    }

    /// Where the device puts the `k` largest of a row: keys and indices; `None` where it has no shader for that.
    fn choose_top(&mut self, x: &Tensor, k: usize) -> Option<Rows> {
        if x.n_tokens != 1 || k == 0 || k > MAX_TOP.min(x.n_cols) {
            return None;
        }
        self.settle();
        // A few sizes, so that a window of penalties that fills does not bring a pipeline with every token.
        let width = match k {
            1 => 1,
            _ => k.next_power_of_two().max(64),
        };
        let group = GROUP[usize::from(width > 1)];
        let (mut rows, mut n, mut pairs) = (self.rows(x), x.n_cols, false);
        loop {
            let n_groups = n.div_ceil(group);
            let chosen = self.take(2 * n_groups * width);
            let shader = Shader::Top {
                k: width as u32,
                pairs,
            };
            let params = [n as u32, rows.at as u32];
            let buffers = [Some(rows.span()), Some(chosen.span())];
            self.dispatch(shader, &params, &buffers, [n_groups, 1, 1]);
            (rows, n, pairs) = (chosen, n_groups * width, true);
            if n_groups == 1 {
                return Some(rows);
            }
        }
    }
}

/// Indices and their floats.
fn pairs(bytes: &[u8]) -> impl Iterator<Item = (u32, f32)> {
    bytes.as_chunks::<8>().0.iter().map(|pair| {
        let [key, id]: [u32; 2] = bytemuck::cast(*pair);
        (id, number(key))
    })
}

/// The float of a key.
fn number(key: u32) -> f32 {
    f32::from_bits(match key >> 31 {
        1 => key & 0x7fff_ffff,
        _ => !key,
    })
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn keys_are_floats() {
        for x in [0.0, 1.5, -1.5, f32::MAX, f32::NEG_INFINITY, f32::INFINITY] {
            let bits = x.to_bits();
            let key = match bits >> 31 {
                0 => bits | 0x8000_0000,
                _ => !bits,
            };
            assert_eq!(number(key), x);
        }
        assert!(number(u32::MAX).is_nan(), "what the shaders say of NaN");
    }
}
