//! Products of weights and activations: those of many tokens by tiles, those of one row by row.

use super::experts::{Groups, Routes};
use super::ops::vec4;
use super::pipeline::{Experts, GEMV_LANES, MatrixTile, Shader, UnitsOf, is_float};
use super::record::Bindings;
use super::weights::{UNIT, Weights};
use super::{Gpu, Input, Product, Rows, Vector};
use crate::backend::{Activation, Step};
use crate::quant::DType;

/// Workgroups of a GEMV that fill every device.
const MANY_GROUPS: usize = 512;

/// Workgroups of a GEMM by matrix units below which smaller tiles are faster: an H100 runs 132 at once.
const MATRIX_GROUPS: usize = 112;

/// A dispatch of `gemm.wgsl` or `gemm_matrix.wgsl` for each part of a matrix.
pub(super) struct Gemm<'a> {
    pub(super) x: &'a Rows,
    pub(super) weights: &'a Weights,
    pub(super) bias: Option<&'a Vector>,
    pub(super) residual: Option<&'a Rows>,
    pub(super) out: &'a Rows,
    pub(super) tile: Tile,
    /// Or pairs of tokens and slots.
    pub(super) n_tokens: usize,
    pub(super) groups: Option<(&'a Groups, Experts)>,
}

/// What a workgroup of a GEMM makes.
#[derive(Clone, Copy)]
pub(super) enum Tile {
    Plain { tm: u32, tn: u32 },
    Matrix(MatrixTile),
}

impl Tile {
    fn rows(self) -> usize {
        match self {
            Tile::Plain { tm, .. } => 16 * tm as usize,
            Tile::Matrix(tile) => tile.rows(),
        }
    }

    pub(super) fn tokens(self) -> usize {
        match self {
            Tile::Plain { tn, .. } => 16 * tn as usize,
            Tile::Matrix(tile) => tile.tokens(),
        }
    }

    fn shader(self, dtype: DType, bias: bool, residual: bool, experts: Experts) -> Shader {
        match self {
            Tile::Plain { tm, tn } => Shader::Gemm {
                dtype,
                tm,
                tn,
                bias,
                residual,
                experts,
            },
            Tile::Matrix(tile) => Shader::GemmMatrix {
                dtype,
                tile,
                bias,
                residual,
                experts,
            },
        }
    }
}

/// A dispatch of `gemv.wgsl` for each part of matrices, which are split alike.
pub(super) struct Gemv<'a> {
    pub(super) x: &'a Input,
    pub(super) layers: &'a [(&'a Weights, Option<&'a Vector>)],
    pub(super) outs: &'a [Rows],
    pub(super) residual: Option<&'a Rows>,
    pub(super) glu: Option<Activation>,
    pub(super) experts: Experts,
    pub(super) routes: Option<&'a Routes>,
}

impl Gpu {
    /// `x W^T + bias + residual`.
    pub(super) fn product(
        &self,
        product: &Product,
        n_tokens: usize,
        residual: Option<&Rows>,
    ) -> Rows {
        if product.routes.is_some() {
            return self.sum_of_experts(product, n_tokens, residual);
        }
        if self.step == Step::Decode {
            let layer = (&*product.weights, product.bias.as_ref());
            let [out] = self.gemv(&product.x, [layer], n_tokens, residual);
            return out;
        }
        let x = match &product.x {
            Input::Rows(rows) => rows.clone(),
            Input::Normed(norm) => self.norm(norm, n_tokens, product.weights.n_in, None),
            Input::Packed(_) => unreachable!("a prompt is not packed"),
        };
        let weights = &*product.weights;
        self.count(weights, n_tokens);
        let out = self.take(n_tokens * weights.n_out);
        self.run_gemm(&Gemm {
            x: &x,
            weights,
            bias: product.bias.as_ref(),
            residual,
            out: &out,
            tile: self.gemm_tile(&[weights], weights.n_out, n_tokens, 1),
            n_tokens,
            groups: None,
        });
        out
    }

    pub(super) fn run_gemm(&self, call: &Gemm) {
        let Gemm { x, weights, .. } = *call;
        let (groups, experts) = call.groups.unzip();
        let experts = experts.unwrap_or(Experts::None);
        let (bias, residual) = (call.bias.is_some(), call.residual.is_some());
        let shader = call.tile.shader(weights.dtype, bias, residual, experts);
        let n_experts = groups.map_or(1, |groups| groups.n_experts);
        let n_tiles = match groups {
            Some(groups) => groups.n_tiles,
            None => call.n_tokens.div_ceil(call.tile.tokens()),
        };
        for part in &weights.parts {
            let n_rows = part.n_rows / n_experts;
            let params = [
                weights.n_in.div_ceil(UNIT) as u32,
                vec4(x.at),
                part.first as u32,
                call.residual.map_or(0, |r| r.at as u32),
                n_rows as u32,
                (weights.n_out / n_experts) as u32,
                call.n_tokens as u32,
                vec4(weights.n_in),
                groups.map_or(1, |groups| groups.n_used as u32),
                n_tiles as u32,
            ];
            let buffers = [
                Some(x.span()),
                call.residual.map(Rows::span),
                Some(part.main()),
                Some(part.aux()),
                call.bias.map(Vector::span),
                Some(call.out.span()),
                groups.map(|groups| groups.rows.span()),
            ];
            let grid = [n_rows.div_ceil(call.tile.rows()), n_tiles, 1];
            self.dispatch_of(&[&weights.name], shader, &params, &buffers, grid);
        }
    }

    /// What a workgroup makes of products of so many tokens, of which each of `n_experts` has as many, and with `n_out` rows of
    /// each. By matrix units all prompts, however short, so that a token's sums do not depend on how many came with it.
    pub(super) fn gemm_tile(
        &self,
        weights: &[&Weights],
        n_out: usize,
        n_tokens: usize,
        n_experts: usize,
    ) -> Tile {
        let tile = Tile::Matrix(matrix_tile(n_out, n_tokens, n_experts));
        let runs = |weights: &&Weights| {
            let shader = tile.shader(weights.dtype, false, false, Experts::None);
            shader.runs_on(&self.device.target)
        };
        if weights.iter().all(runs) {
            return tile;
        }
        let has_floats = weights.iter().any(|weights| weights.dtype == DType::F32);
        let bytes = match self.device.target.f16 && !has_floats {
            true => 8,
            false => 16,
        };
        // The largest tile that tokens and rows fill, and that the memory of a workgroup holds.
        let wanted: &[(u32, u32)] = match (n_tokens, n_out) {
            (0..=16, _) => &[(4, 1)],
            (17..=64, _) | (_, 0..=1024) => &[(4, 4), (4, 1)],
            _ => &[(8, 8), (4, 4), (4, 1)],
        };
        let fits = |(tm, tn): &(u32, u32)| {
            // 16 rows and 16 tokens each, of nine vectors.
            let held = 16 * 9 * bytes * (tm + tn);
            let is_full = n_experts == 1 || 16 * *tn as usize <= n_tokens;
            held <= self.device.info.workgroup_memory && is_full
        };
        let smallest = *wanted.last().expect("some tiles");
        let (tm, tn) = wanted.iter().copied().find(fits).unwrap_or(smallest);
        Tile::Plain { tm, tn }
    }

    /// Products of tokens one by one, of up to three matrices at once where they are alike.
    pub(super) fn gemv<const N: usize>(
        &self,
        x: &Input,
        layers: [(&Weights, Option<&Vector>); N],
        n_tokens: usize,
        residual: Option<&Rows>,
    ) -> [Rows; N] {
        let outs = layers.map(|(weights, _)| self.take(n_tokens * weights.n_out));
        if let Some(x) = Self::packed_input(x, &layers) {
            self.gemv_packed(x, &layers, &outs, n_tokens, residual);
            return outs;
        }
        let alike = |a: &(&Weights, Option<&Vector>), b: &(&Weights, Option<&Vector>)| {
            let kind = |(weights, bias): &(&Weights, Option<&Vector>)| {
                (weights.dtype, weights.n_in, bias.is_some())
            };
            kind(a) == kind(b) && a.0.whole().is_some() && b.0.whole().is_some()
        };
        let mut i = 0;
        while i < N {
            let same = layers[i..].iter().take_while(|l| alike(&layers[i], l));
            let n = same.count().clamp(1, self.most_matrices());
            let (layers, outs) = (&layers[i..i + n], &outs[i..i + n]);
            let call = Gemv {
                x,
                layers,
                outs,
                residual,
                glu: None,
                experts: Experts::None,
                routes: None,
            };
            self.run_gemv(&call, [n_tokens, 1]);
            i += n;
        }
        outs
    }

    /// Matrices whose bindings fit a shader.
    pub(super) fn most_matrices(&self) -> usize {
        let most = self.device.limits.max_storage_buffers_per_shader_stage as usize;
        (most.saturating_sub(4) / 4).clamp(1, 3)
    }

    pub(super) fn run_gemv(&self, call: &Gemv, others: [usize; 2]) {
        for (weights, _) in call.layers {
            let Some(&Routes {
                n_experts, n_used, ..
            }) = call.routes
            else {
                self.count(weights, others[0]);
                continue;
            };
            let n_tokens = match call.experts {
                Experts::Each => others[1],
                _ => others[0],
            };
            self.count_read(weights, (n_used, n_experts));
            self.count_products(weights, n_used * n_tokens, n_experts);
        }
        for part in 0..call.layers[0].0.parts.len() {
            self.run_gemv_part(call, part, others);
        }
    }

    fn run_gemv_part(&self, call: &Gemv, part: usize, others: [usize; 2]) {
        let (weights, bias) = call.layers[0];
        let n_units = weights.n_in.div_ceil(UNIT);
        let first = weights.parts[part].first;
        let parts = call.layers.iter().map(|(weights, _)| &weights.parts[part]);
        let n_rows: usize = parts.clone().map(|part| part.n_rows).sum();
        let is_float = is_float(weights.dtype);
        // More rows of a team are more loads on their way, until they are too few teams for the device.
        let rows = match (is_float, call.glu.is_some()) {
            (true, _) => 2,
            (false, true) => 2,
            (false, false) if n_rows >= 16384 => 4,
            (false, false) => 2,
        };
        let (norm, x) = match call.x {
            Input::Rows(x) => (None, x),
            Input::Normed(norm) => (Some(norm), &norm.x),
            Input::Packed(_) => unreachable!("these shaders pack what they read"),
        };
        let shader = Shader::Gemv {
            dtype: weights.dtype,
            matrices: call.layers.len() as u32,
            rows,
            units: UnitsOf::new(n_units),
            norm: norm.is_some(),
            bias: bias.is_some(),
            residual: call.residual.is_some(),
            glu: call.glu,
            experts: call.experts,
        };
        let per_group = (GEMV_LANES / self.device.target.team() * rows) as usize;
        let of_expert = |n_rows: usize| match call.routes {
            Some(routes) => n_rows / routes.n_experts,
            None => n_rows,
        };
        // What is prepared for some rows serves more where there are plenty: the head, wide layers.
        let n_blocks = (of_expert(n_rows) / per_group / MANY_GROUPS).clamp(1, 8);
        let per_group = per_group * n_blocks;
        let mut n_out = [0; 3];
        let mut stride = [0; 3];
        let mut first_wg = [0; 3];
        let mut n_groups = 0;
        for (i, (part, (weights, _))) in parts.clone().zip(call.layers).enumerate() {
            n_out[i] = of_expert(part.n_rows) as u32;
            stride[i] = of_expert(weights.n_out) as u32;
            first_wg[i] = n_groups as u32;
            if call.glu.is_none() || i == 0 {
                n_groups += of_expert(part.n_rows).div_ceil(per_group);
            }
        }
        let params = [
            n_units as u32,
            vec4(x.at),
            first as u32,
            call.residual.map_or(0, |r| r.at as u32),
            n_out[0],
            n_out[1],
            n_out[2],
            call.routes.map_or(0, |routes| routes.n_used as u32),
            stride[0],
            stride[1],
            stride[2],
            norm.map_or(0, |norm| norm.eps.to_bits()),
            first_wg[0],
            first_wg[1],
            first_wg[2],
            call.routes.map_or(0, |routes| routes.rows.at as u32),
            vec4(weights.n_in),
            n_blocks as u32,
        ];
        let mut buffers = Bindings::new();
        buffers.push(Some(x.span()));
        buffers.push(norm.map(|norm| norm.gain.span()));
        buffers.push(call.residual.map(Rows::span));
        buffers.push(call.routes.map(|routes| routes.rows.span()));
        // The second matrix of a gated unit has no output of its own.
        let spare = self.take(1);
        for (i, (part, (_, bias))) in parts.zip(call.layers).enumerate() {
            buffers.push(Some(part.main()));
            buffers.push(Some(part.aux()));
            buffers.push(bias.map(Vector::span));
            buffers.push(Some(call.outs.get(i).unwrap_or(&spare).span()));
        }
        let grid = [n_groups, others[0], others[1]];
        let mut names = [""; 3];
        for (name, (weights, _)) in names.iter_mut().zip(call.layers) {
            *name = &weights.name;
        }
        let names = &names[..call.layers.len()];
        self.dispatch_of(names, shader, &params, &buffers, grid);
    }

    /// That a matrix is read, and multiplied by so many tokens.
    pub(super) fn count(&self, weights: &Weights, n_tokens: usize) {
        self.count_read(weights, (1, 1));
        self.count_products(weights, n_tokens, 1);
    }

    /// That of so many experts of a matrix some are read.
    pub(super) fn count_read(&self, weights: &Weights, (n, n_experts): (usize, usize)) {
        let mut work = self.work.get();
        work.weight_bytes += (weights.file_bytes / n_experts * n) as u64;
        self.work.set(work);
    }

    /// That one of so many experts of a matrix, or all of it, is multiplied by each of so many tokens.
    pub(super) fn count_products(&self, weights: &Weights, n_tokens: usize, n_experts: usize) {
        let mut work = self.work.get();
        work.matmul_ops += 2 * (weights.n_in * weights.n_out / n_experts * n_tokens) as u64;
        self.work.set(work);
    }
}

/// The largest tile of which there are enough to fill a large device; for few tokens no wider than they are, and for experts
/// no wider than the tokens of one.
fn matrix_tile(n_out: usize, n_tokens: usize, n_experts: usize) -> MatrixTile {
    let [.., small, least] = MatrixTile::ALL;
    let fills = |tile: &&MatrixTile| {
        let of_expert = n_out.div_ceil(tile.rows()) * n_tokens.div_ceil(tile.tokens());
        let is_full = n_experts == 1 || tile.tokens() <= n_tokens;
        of_expert * n_experts >= MATRIX_GROUPS && is_full
    };
    if n_tokens <= least.tokens() {
        return least;
    }
    *MatrixTile::ALL.iter().find(fills).unwrap_or(&small)
}
