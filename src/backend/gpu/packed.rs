//! Activations that are packed for integer products by whoever makes them, and products of them: the kernels of a token wait
//! for one trip to memory each.

use std::sync::Arc;

use super::device::{Buffer, Span};
use super::experts::Routes;
use super::ops::vec4;
use super::pipeline::{Experts, PackedShape, Shader, Then, is_float};
use super::record::Bindings;
use super::weights::{UNIT, Weights};
use super::{ConvState, Gpu, Input, Norm, Product, Rows, Sum, Vector};
use crate::backend::{Activation, Step};

/// Units of a row from which two teams share one.
const LONG: usize = 128;

/// Rows as `shaders/pack.wgsl` lays them out.
#[derive(Clone)]
pub(super) struct Packed {
    buffer: Arc<Buffer>,
}

impl Packed {
    pub(super) fn span(&self) -> Span<'_> {
        self.buffer.all()
    }
}

/// A dispatch of `gemv_packed.wgsl`.
struct Call<'a> {
    x: &'a Packed,
    /// Of the norm of x.
    eps: Option<f32>,
    layers: &'a [(&'a Weights, Option<&'a Vector>)],
    outs: &'a [Rows],
    residual: Option<&'a Rows>,
    glu: Option<Activation>,
    conv: Option<Conv<'a>>,
    next: Option<(&'a Packed, Then)>,
    /// Of the norm that comes next.
    gain: Option<&'a Vector>,
    routes: Option<(&'a Routes, Experts)>,
}

/// A convolution whose gates and input a product makes.
struct Conv<'a> {
    taps: &'a Vector,
    state: &'a ConvState,
}

impl Gpu {
    /// Room for rows of `n` that are packed.
    pub(super) fn take_packed(&self, n_tokens: usize, n: usize) -> Packed {
        // Four planes of a vec4 a unit.
        let Rows { buffer, .. } = self.take(n_tokens * n.div_ceil(UNIT) * 16);
        Packed { buffer }
    }

    /// Whether outputs of `n` columns are packed for what multiplies them: those of a token are.
    pub(super) fn packs(&self, n: usize) -> bool {
        self.step == Step::Decode && n.is_multiple_of(UNIT)
    }

    /// Whether a product with these weights reads what is packed.
    fn reads_packed(weights: &Weights) -> bool {
        !is_float(weights.dtype) && weights.n_out.is_multiple_of(8)
    }

    /// What is packed of an input, and the epsilon of its norm, if a product with these weights can do with that.
    pub(super) fn packed_input<'a>(
        input: &'a Input,
        layers: &[(&Weights, Option<&Vector>)],
    ) -> Option<(&'a Packed, Option<f32>)> {
        let (packed, eps) = match input {
            Input::Rows(rows) => (rows.packed.as_ref()?, None),
            Input::Normed(norm) => (norm.packed.as_ref()?, Some(norm.eps)),
            Input::Packed(packed) => (packed, None),
        };
        let fit = layers
            .iter()
            .all(|(weights, _)| Self::reads_packed(weights));
        fit.then_some((packed, eps))
    }

    /// Products of up to three matrices at once where they are alike.
    pub(super) fn gemv_packed(
        &self,
        (x, eps): (&Packed, Option<f32>),
        layers: &[(&Weights, Option<&Vector>)],
        outs: &[Rows],
        n_tokens: usize,
        residual: Option<&Rows>,
    ) {
        let kind = |(weights, bias): &(&Weights, Option<&Vector>)| {
            let whole = weights.whole().is_some();
            (weights.dtype, weights.n_in, bias.is_some(), whole)
        };
        let mut i = 0;
        while i < layers.len() {
            let same = |layer: &&(&Weights, Option<&Vector>)| {
                kind(layer) == kind(&layers[i]) && kind(layer).3
            };
            let n = layers[i..].iter().take_while(same).count();
            let n = n.clamp(1, self.most_matrices());
            let call = Call {
                x,
                eps,
                layers: &layers[i..i + n],
                outs: &outs[i..i + n],
                residual,
                glu: None,
                conv: None,
                next: None,
                gain: None,
                routes: None,
            };
            self.run_packed(&call, n_tokens);
            i += n;
        }
    }

    /// The outputs of experts, weighted and summed, `+ residual`.
    pub(super) fn sum_of_experts(
        &self,
        product: &Product,
        n_tokens: usize,
        residual: Option<&Rows>,
    ) -> Rows {
        let layers = [(&*product.weights, None)];
        let (packed, eps) =
            Self::packed_input(&product.x, &layers).expect("experts wait where they can be joined");
        let out = self.take(n_tokens * product.n_out());
        let call = Call {
            x: packed,
            eps,
            layers: &layers,
            outs: std::slice::from_ref(&out),
            residual,
            glu: None,
            conv: None,
            next: None,
            gain: None,
            routes: product.routes.as_ref().map(|r| (r, Experts::Sum)),
        };
        self.run_packed(&call, n_tokens);
        out
    }

    /// `x W^T + bias + residual` and its norm, of which the product that follows reads what is packed; nothing if the product
    /// cannot do that.
    pub(super) fn sum_for_norm(
        &self,
        sum: &Sum,
        n_tokens: usize,
        gain: &Vector,
        eps: f32,
    ) -> Option<Norm> {
        let product = &sum.product;
        let layers = [(&*product.weights, product.bias.as_ref())];
        let (packed, x_eps) = Self::packed_input(&product.x, &layers)?;
        let n_out = product.n_out();
        if !self.packs(n_out) {
            return None;
        }
        let out = self.take(n_tokens * n_out);
        let next = self.take_packed(n_tokens, n_out);
        let call = Call {
            x: packed,
            eps: x_eps,
            layers: &layers,
            outs: std::slice::from_ref(&out),
            residual: Some(&sum.residual),
            glu: None,
            conv: None,
            next: Some((&next, Then::Norm)),
            gain: Some(gain),
            routes: product.routes.as_ref().map(|r| (r, Experts::Sum)),
        };
        self.run_packed(&call, n_tokens);
        Some(Norm {
            x: out,
            gain: gain.clone(),
            eps,
            packed: Some(next),
        })
    }

    /// `activation(x W0^T) * (x W1^T)`, packed for `down`, or that of every slot of a route; nothing if they cannot do that.
    pub(super) fn glu_packed(
        &self,
        x: &Input,
        [gate, up, down]: [&Weights; 3],
        activation: Activation,
        n_tokens: usize,
        routes: Option<&Routes>,
    ) -> Option<Packed> {
        let layers = [(gate, None), (up, None)];
        let (packed, eps) = Self::packed_input(x, &layers)?;
        let (n_experts, n_used) = routes.map_or((1, 1), |r| (r.n_experts, r.n_used));
        let [n_ffn, n_out] = [gate, down].map(|weights| weights.n_out / n_experts);
        if !self.packs(n_ffn) || !Self::reads_packed(down) || !n_out.is_multiple_of(8) {
            return None;
        }
        let next = self.take_packed(n_tokens * n_used, n_ffn);
        let call = Call {
            x: packed,
            eps,
            layers: &layers,
            outs: &[],
            residual: None,
            glu: Some(activation),
            conv: None,
            next: Some((&next, Then::Product)),
            gain: None,
            routes: routes.map(|routes| (routes, Experts::Each)),
        };
        self.run_packed(&call, n_tokens);
        Some(next)
    }

    /// A short convolution of one token together with the product that makes its gates and input; nothing if they cannot be
    /// joined.
    pub(super) fn conv_packed(
        &self,
        product: &Product,
        taps: &Vector,
        state: &ConvState,
    ) -> Option<Rows> {
        let n = state.n_channels;
        let layers = [(&*product.weights, None)];
        let (packed, eps) = Self::packed_input(&product.x, &layers)?;
        let is_plain = product.bias.is_none() && product.routes.is_none();
        if !self.packs(n) || product.weights.whole().is_none() || !is_plain {
            return None;
        }
        let mut out = self.take(n);
        let next = self.take_packed(1, n);
        let call = Call {
            x: packed,
            eps,
            layers: &layers,
            outs: std::slice::from_ref(&out),
            residual: None,
            glu: None,
            conv: Some(Conv { taps, state }),
            next: Some((&next, Then::Either)),
            gain: None,
            routes: None,
        };
        self.run_packed(&call, 1);
        out.packed = Some(next);
        Some(out)
    }

    fn run_packed(&self, call: &Call, n_tokens: usize) {
        let (weights, bias) = call.layers[0];
        let n_units = weights.n_in.div_ceil(UNIT);
        let (routes, experts) = call.routes.unzip();
        let experts = experts.unwrap_or(Experts::None);
        let (n_experts, n_used) = routes.map_or((1, 1), |r| (r.n_experts, r.n_used));
        let (n_rows_of_x, n_rows_of_y) = match experts {
            Experts::None => (1, n_tokens),
            Experts::Each => (1, n_tokens * n_used),
            Experts::Sum => (n_used, n_tokens),
        };
        let n_all = n_units * n_rows_of_x;
        let team = self.device.target.team();
        let limits = &self.device.limits;
        let lanes = 2 * 8 * team.min(32);
        let splits = n_all >= LONG
            && team <= 32
            && lanes <= limits.max_compute_invocations_per_workgroup
            && lanes <= limits.max_compute_workgroup_size_x;
        let then = call.next.map_or(Then::Nothing, |(_, then)| then);
        let shader = Shader::GemvPacked {
            dtype: weights.dtype,
            matrices: call.layers.len() as u32,
            shape: PackedShape {
                team,
                deep: n_all > team as usize,
                split: splits,
            },
            norm: call.eps.is_some(),
            bias: bias.is_some(),
            residual: call.residual.is_some(),
            glu: call.glu,
            taps: call
                .conv
                .as_ref()
                .map_or(0, |conv| conv.state.n_rows as u32 + 1),
            then,
            experts,
        };
        for part in 0..weights.parts.len() {
            let parts = call.layers.iter().map(|(weights, _)| &weights.parts[part]);
            let mut n_out = [0; 3];
            let mut stride = [0; 3];
            let mut first_wg = [0; 3];
            let mut n_groups = 0;
            // Three rows make one channel, and of experts each has its own.
            let rows_of_y = if call.conv.is_some() { 3 } else { n_experts };
            for (i, (part, (weights, _))) in parts.clone().zip(call.layers).enumerate() {
                let n_rows = part.n_rows / rows_of_y;
                n_out[i] = n_rows as u32;
                stride[i] = vec4(weights.n_out / rows_of_y);
                first_wg[i] = n_groups as u32;
                if call.glu.is_none() || i == 0 {
                    n_groups += n_rows.div_ceil(8);
                }
            }
            let first = weights.parts[part].first;
            let [a, b, c] = n_out;
            let [d, e, f] = stride;
            let [g, h, i] = first_wg;
            let residual_at = call.residual.map_or(0, |r| vec4(r.at));
            let out_at = call.outs.first().map_or(0, |out| vec4(out.at));
            let eps = call.eps.map_or(0, f32::to_bits);
            let next_units = (weights.n_out / rows_of_y).div_ceil(UNIT) as u32;
            let [ring, ring_row] = call.conv.as_ref().map_or([0; 2], |conv| {
                let state = conv.state;
                [state.ring, state.count % state.ring].map(|n| n as u32)
            });
            let params = [
                n_units as u32,
                out_at,
                residual_at,
                eps,
                a,
                b,
                c,
                first as u32,
                d,
                e,
                f,
                next_units,
                g,
                h,
                i,
                ring,
                ring_row,
                n_used as u32,
                routes.map_or(0, |routes| routes.rows.at as u32),
            ];
            let mut buffers = Bindings::new();
            buffers.push(Some(call.x.span()));
            buffers.push_some(call.residual.map(Rows::span));
            buffers.push_some(call.gain.map(Vector::span));
            buffers.push_some(call.next.map(|(packed, _)| packed.span()));
            for (i, (part, (_, bias))) in parts.zip(call.layers).enumerate() {
                buffers.push(Some(part.main()));
                buffers.push(Some(part.aux()));
                buffers.push_some(bias.map(Vector::span));
                buffers.push_some(call.outs.get(i).map(Rows::span));
            }
            if let Some(conv) = &call.conv {
                buffers.push(Some(conv.taps.span()));
                buffers.push(Some(conv.state.memory.all()));
            }
            buffers.push_some(routes.map(|routes| routes.rows.span()));
            let mut names = [""; 3];
            for (name, (weights, _)) in names.iter_mut().zip(call.layers) {
                *name = &weights.name;
            }
            if part == 0 {
                for (weights, _) in call.layers {
                    self.count_read(weights, (n_used, n_experts));
                    self.count_products(weights, n_tokens * n_used, n_experts);
                }
            }
            let names = &names[..call.layers.len()];
            self.dispatch_of(names, shader, &params, &buffers, [n_groups, n_rows_of_y, 1]);
        }
    }
}
