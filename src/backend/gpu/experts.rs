//! Mixtures of experts: who reads what, and the products of those. A prompt's tokens are grouped by expert, so that each
//! expert's weights serve all of its tokens at once; a reply's are multiplied one by one.

use std::sync::Arc;

use super::ops::vec4;
use super::pipeline::{Experts, Shader};
use super::products::{Gemm, Gemv};
use super::weights::Weights;
use super::{Gpu, Input, Product, Rows, Tensor, Value, Vector};
use crate::backend::{Gating, Moe, Step};

/// What a router chose, `(n_tokens, 2 * n_used)`.
#[derive(Clone)]
pub(super) struct Routes {
    pub(super) rows: Rows,
    pub(super) n_experts: usize,
    pub(super) n_used: usize,
}

/// The tokens of each expert, as `shaders/group.wgsl` puts them down.
pub(super) struct Groups {
    pub(super) rows: Rows,
    pub(super) n_tiles: usize,
    pub(super) n_experts: usize,
    pub(super) n_used: usize,
}

impl Gpu {
    /// [`Backend::route`](crate::backend::Backend::route).
    pub(super) fn choose(&mut self, x: &Tensor, from: usize, moe: &Moe<Self>) -> Tensor {
        let n_tokens = x.n_tokens - from;
        let router = &*moe.router.weight.0;
        let shape = (moe.routing.n_experts, x.n_cols);
        assert_eq!((router.n_out, router.n_in), shape, "a router");
        // A norm that others may join stays one.
        let input = match from {
            0 => self.input(x),
            _ => {
                let rows = self.rows(x);
                let at = rows.at + from * x.n_cols;
                Input::Rows(rows.from(at))
            }
        };
        // Token by token in prompts too: a router has so few rows that tiles of them would leave most of a device idle.
        let layer = (router, moe.router.bias.as_ref());
        let [logits] = self.gemv(&input, [layer], n_tokens, None);
        let routing = &moe.routing;
        let out = self.take(n_tokens * 2 * routing.n_used);
        let params = [
            routing.n_experts as u32,
            routing.n_used as u32,
            routing.sum_eps.to_bits(),
        ];
        let shader = Shader::Route {
            bias: moe.selection_bias.is_some(),
            sigmoid: routing.gating == Gating::Sigmoid,
        };
        let buffers = [
            Some(logits.span()),
            moe.selection_bias.as_ref().map(Vector::span),
            Some(out.span()),
        ];
        self.dispatch(shader, &params, &buffers, [n_tokens, 1, 1]);
        Tensor::new(n_tokens, 2 * routing.n_used, Value::Rows(out))
    }

    /// [`Backend::moe`](crate::backend::Backend::moe).
    pub(super) fn mixture(&mut self, x: &Tensor, routes: &Tensor, moe: &Moe<Self>) -> Tensor {
        if let Some((what, found)) = self.cannot_mix(moe) {
            self.unsupported(
                what,
                found,
                "gate and up in one format, neurons of down side by side",
            );
        }
        let [gate, up, down] = moe.layers().map(|layer| &*layer.weight.0);
        let n_all = moe.routing.n_experts * moe.n_ffn;
        let reads = |weights: &Weights| (weights.n_in, weights.n_out) == (x.n_cols, n_all);
        let down_fits = down.n_in == moe.n_ffn && down.n_out.is_multiple_of(moe.routing.n_experts);
        let splits = |weights: &Weights| {
            weights.whole().is_some() || weights.split_experts == moe.routing.n_experts
        };
        let fit = [gate, up, down].into_iter().all(splits) && gate.splits_as(up);
        assert!(
            reads(gate) && reads(up) && down_fits && fit,
            "experts of a layer"
        );
        let chosen = (x.n_tokens, 2 * moe.routing.n_used);
        assert_eq!((routes.n_tokens, routes.n_cols), chosen, "routes");
        let routes = Routes {
            rows: self.rows(routes),
            n_experts: moe.routing.n_experts,
            n_used: moe.routing.n_used,
        };
        let n_out = down.n_out / routes.n_experts;
        let value = match self.step {
            Step::Prefill => Value::Rows(self.mix_groups(x, &routes, moe)),
            Step::Decode => self.mix_one_by_one(x, routes, moe),
        };
        Tensor::new(x.n_tokens, n_out, value)
    }

    /// What there is no shader for.
    fn cannot_mix(&self, moe: &Moe<Self>) -> Option<(&'static str, String)> {
        let layers = moe.layers().map(|layer| &*layer.weight.0);
        if moe.down_by_neuron {
            return Some(("experts on the GPU", "down by neuron".to_owned()));
        }
        if layers[0].dtype != layers[1].dtype {
            let found = format!("gate in {}, up in {}", layers[0].dtype, layers[1].dtype);
            return Some(("experts on the GPU", found));
        }
        // Counts of pairs, and of what each lane has found.
        let n = moe.routing.n_experts;
        if 4 * (n + 256) > self.device.info.workgroup_memory as usize {
            return Some(("experts on this GPU", format!("{n} in a layer")));
        }
        None
    }

    fn mix_groups(&self, x: &Tensor, routes: &Routes, moe: &Moe<Self>) -> Rows {
        let [gate, up, down] = moe.layers().map(|layer| &*layer.weight.0);
        let x_rows = self.rows(x);
        let n_pairs = x.n_tokens * routes.n_used;
        let n_out = down.n_out / routes.n_experts;
        let of_expert = n_pairs.div_ceil(routes.n_experts);
        let n_rows = moe.n_ffn.min(n_out);
        let tile = self.gemm_tile(&[gate, up, down], n_rows, of_expert, routes.n_experts);
        let groups = self.group(routes, n_pairs, tile.tokens());
        let product = |weights: &Weights, x: &Rows, experts: Experts| {
            let n_read = n_pairs.min(routes.n_experts);
            self.count_read(weights, (n_read, routes.n_experts));
            self.count_products(weights, n_pairs, routes.n_experts);
            let out = self.take(n_pairs * (weights.n_out / routes.n_experts));
            self.run_gemm(&Gemm {
                x,
                weights,
                bias: None,
                residual: None,
                out: &out,
                tile,
                n_tokens: n_pairs,
                groups: Some((&groups, experts)),
            });
            out
        };
        let [gate, up] = [gate, up].map(|weights| product(weights, &x_rows, Experts::Each));
        let h = self.unit(&gate, &up, n_pairs * moe.n_ffn, moe.activation);
        let y = product(down, &h, Experts::Sum);
        let out = self.take(x.n_tokens * n_out);
        let params = [vec4(n_out), routes.n_used as u32, routes.rows.at as u32];
        let buffers = [Some(y.span()), Some(routes.rows.span()), Some(out.span())];
        let grid = [(n_out / 4).div_ceil(64), x.n_tokens, 1];
        self.dispatch(Shader::Slots, &params, &buffers, grid);
        out
    }

    /// Sorts pairs of tokens and slots by expert, and cuts those of each into tiles.
    fn group(&self, routes: &Routes, n_pairs: usize, tile: usize) -> Groups {
        let &Routes {
            ref rows,
            n_experts,
            n_used,
        } = routes;
        // Each expert that has any may have one tile that is not full.
        let n_chosen = n_experts.min(n_pairs);
        let n_tiles = (n_pairs - n_chosen) / tile + n_chosen;
        let groups = self.take(3 * n_tiles + n_pairs);
        let params = [n_pairs, n_used, rows.at, tile, n_tiles].map(|n| n as u32);
        let buffers = [Some(rows.span()), Some(groups.span())];
        let shader = Shader::Group {
            n_experts: n_experts as u32,
        };
        self.dispatch(shader, &params, &buffers, [n_experts, 1, 1]);
        Groups {
            rows: groups,
            n_tiles,
            n_experts,
            n_used,
        }
    }

    fn mix_one_by_one(&self, x: &Tensor, routes: Routes, moe: &Moe<Self>) -> Value {
        let layers = moe.layers().map(|layer| &*layer.weight.0);
        let [gate, up, down] = layers;
        let k = routes.n_used;
        let input = self.input(x);
        if let Some(h) = self.glu_packed(&input, layers, moe.activation, x.n_tokens, Some(&routes))
        {
            return Value::Product(Product {
                x: Input::Packed(h),
                weights: Arc::clone(&moe.down.weight.0),
                bias: None,
                routes: Some(routes),
            });
        }
        let h = self.take(x.n_tokens * k * moe.n_ffn);
        let call = Gemv {
            x: &input,
            layers: &[(gate, None), (up, None)],
            outs: std::slice::from_ref(&h),
            residual: None,
            glu: Some(moe.activation),
            experts: Experts::Each,
            routes: Some(&routes),
        };
        self.run_gemv(&call, [k, x.n_tokens]);
        let out = self.take(x.n_tokens * (down.n_out / routes.n_experts));
        let call = Gemv {
            x: &Input::Rows(h.clone()),
            layers: &[(down, None)],
            outs: std::slice::from_ref(&out),
            glu: None,
            experts: Experts::Sum,
            ..call
        };
        self.run_gemv(&call, [x.n_tokens, 1]);
        Value::Rows(out)
    }
}
