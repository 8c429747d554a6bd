//! Mixtures of experts, of prompts and of replies, against sums in f64 over the same weights.

use std::sync::Arc;

use kinglet::backend::gpu::{self, Device, Gpu};
use kinglet::backend::{Activation, Backend, GatedFfnOf, Gating, LinearOf, MoeOf, Routing, Step};
use kinglet::profile::{Label, Operation};
use kinglet::quant::{self, DType, Tensor};

use super::common::Random;
use super::{adapter, cpu, gpu as new_gpu, largest, near, random_tensor, read, tensor, upload};

const N_EXPERTS: usize = 5;

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    hidden: usize,
    n_ffn: usize,
    n_used: usize,
    gating: Gating,
    /// Whether a bias gives the first expert all tokens and the fourth none.
    biased: bool,
    activation: Activation,
}

/// Weights, and what a mixture makes of tokens.
struct Net {
    case: Case,
    router: Vec<f32>,
    bias: Vec<f32>,
    /// Gate, up, down: bytes of the file, and their numbers.
    experts: [(Vec<u8>, Vec<f32>); 3],
}

impl Net {
    fn new(case: Case) -> Self {
        let mut random = Random::new(800 + case.dtype as u64);
        let Case { hidden, n_ffn, .. } = case;
        let n = N_EXPERTS * hidden * n_ffn;
        let experts = [hidden, hidden, n_ffn].map(|n_in| {
            let scale = 1.0 / (n_in as f32).sqrt();
            let bytes = match case.dtype.can_quantize() {
                true => {
                    let mut bytes = vec![0; n / case.dtype.block_len() * case.dtype.block_bytes()];
                    quant::quantize(case.dtype, &random.floats(n, scale), &mut bytes);
                    bytes
                }
                false => {
                    let mut bytes = random_tensor(case.dtype, n, 1, &mut random).data.to_vec();
                    // Where the scale is, and one by which weights are about as large.
                    let (at, d) = match case.dtype {
                        DType::TQ1_0 => (52, 0.04),
                        _ => (0, 4e-4),
                    };
                    let d = quant::f32_to_f16(d);
                    for block in bytes.chunks_exact_mut(case.dtype.block_bytes()) {
                        block[at..at + 2].copy_from_slice(&d.to_le_bytes());
                    }
                    bytes
                }
            };
            let mut numbers = vec![0.0; n];
            quant::dequantize(case.dtype, &bytes, &mut numbers);
            (bytes, numbers)
        });
        Self {
            case,
            router: random.floats(N_EXPERTS * hidden, 1.0),
            bias: vec![100.0, 0.5, 0.0, -100.0, -0.5],
            experts,
        }
    }

    fn moe<B: Backend>(&self, b: &B) -> MoeOf<B::Matrix, B::Vector> {
        let Case { hidden, n_ffn, .. } = self.case;
        let linear = |name: &str, tensor: Tensor| LinearOf {
            name: name.into(),
            weight: b.matrix(&tensor).expect("a known format"),
            bias: None,
        };
        let of_experts = |name: &str, n_in: usize, n_out: usize, (bytes, _): &(Vec<u8>, _)| {
            linear(name, stacked(self.case.dtype, n_in, n_out, bytes.clone()))
        };
        let [gate, up, down] = &self.experts;
        let router: Vec<u8> = self.router.iter().flat_map(|x| x.to_le_bytes()).collect();
        MoeOf {
            router: linear("router", tensor(DType::F32, hidden, N_EXPERTS, router)),
            selection_bias: self.case.biased.then(|| b.vector(self.bias.clone())),
            routing: Routing {
                n_experts: N_EXPERTS,
                n_used: self.case.n_used,
                gating: self.case.gating,
                sum_eps: self.sum_eps(),
            },
            gate: of_experts("gate", hidden, n_ffn, gate),
            up: of_experts("up", hidden, n_ffn, up),
            down: of_experts("down", n_ffn, hidden, down),
            down_by_neuron: false,
            n_ffn,
            activation: self.case.activation,
        }
    }

    /// Shares do not depend on the scale of scores without it.
    fn sum_eps(&self) -> f32 {
        match self.case.gating {
            Gating::Sigmoid => 1e-6,
            Gating::Softmax => 0.0,
        }
    }

    /// The experts of a token, and their weights.
    fn routes(&self, x: &[f32]) -> Vec<(usize, f64)> {
        let Case { gating, biased, .. } = self.case;
        let z = times(&self.router, &widened(x));
        let score = |z: f64| match gating {
            Gating::Sigmoid => 1.0 / (1.0 + (-z).exp()),
            Gating::Softmax => z.exp(),
        };
        let key = |e: usize| match (biased, gating) {
            (false, _) => z[e],
            (true, Gating::Softmax) => z[e] + f64::from(self.bias[e]),
            (true, Gating::Sigmoid) => score(z[e]) + f64::from(self.bias[e]),
        };
        let mut order: Vec<usize> = (0..N_EXPERTS).collect();
        order.sort_by(|&a, &b| key(b).total_cmp(&key(a)));
        order.truncate(self.case.n_used);
        let sum: f64 = order.iter().map(|e| score(z[*e])).sum::<f64>();
        let sum = sum + f64::from(self.sum_eps());
        order.into_iter().map(|e| (e, score(z[e]) / sum)).collect()
    }

    fn outputs(&self, x: &[f32]) -> Vec<f32> {
        let [gate, up, down] = &self.experts;
        let n = self.case.hidden * self.case.n_ffn;
        let of = |(_, all): &(_, Vec<f32>), e: usize, x: &[f64]| times(&all[e * n..][..n], x);
        let mut out = vec![0.0; self.case.hidden];
        for (e, weight) in self.routes(x) {
            let x = widened(x);
            let unit = |(g, u): (f64, f64)| match self.case.activation {
                Activation::Relu => g.max(0.0) * u,
                _ => g / (1.0 + (-g).exp()) * u,
            };
            let pairs = of(gate, e, &x).into_iter().zip(of(up, e, &x));
            let h: Vec<f64> = pairs.map(unit).collect();
            let y = of(down, e, &h);
            out.iter_mut()
                .zip(y)
                .for_each(|(out, y)| *out += weight * y);
        }
        out.into_iter().map(|x| x as f32).collect()
    }
}

/// The matrices of all experts.
fn stacked(dtype: DType, n_in: usize, n_out: usize, bytes: Vec<u8>) -> Tensor {
    Tensor {
        shape: [n_in, n_out, N_EXPERTS, 1],
        ..tensor(dtype, n_in, n_out, bytes)
    }
}

fn widened(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn times(rows: &[f32], x: &[f64]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
    rows.chunks_exact(x.len()).map(dot).collect()
}

fn run<B: Backend>(
    b: &mut B,
    moe: &MoeOf<B::Matrix, B::Vector>,
    step: Step,
    x: &[f32],
    hidden: usize,
) -> Vec<f32> {
    b.begin(step);
    let x = upload(b, x, hidden);
    let routes = b.route(&x, 0, moe);
    let y = b.moe(&x, routes, moe);
    read(b, &y)
}

/// Every format, then other shapes and routers.
fn cases() -> impl Iterator<Item = Case> {
    let of = |dtype, hidden, n_ffn| Case {
        dtype,
        hidden,
        n_ffn,
        n_used: 2,
        gating: Gating::Sigmoid,
        biased: true,
        activation: Activation::Silu,
    };
    let formats = DType::ALL.iter().map(move |dtype| of(*dtype, 256, 256));
    let shapes = [
        Case {
            gating: Gating::Softmax,
            ..of(DType::Q4_0, 96, 160)
        },
        Case {
            biased: false,
            activation: Activation::Relu,
            n_used: 3,
            ..of(DType::Q8_0, 160, 96)
        },
        Case {
            biased: false,
            gating: Gating::Softmax,
            n_used: N_EXPERTS,
            // Rows that end inside of a unit.
            ..of(DType::F32, 36, 44)
        },
    ];
    formats.chain(shapes)
}

#[test]
fn mixtures_of_every_format_and_router() {
    if !adapter() {
        return;
    }
    let mut gpu = new_gpu();
    for case in cases() {
        let net = Net::new(case);
        let moe = net.moe(&gpu);
        let mut random = Random::new(900);
        let n = if case.hidden == 256 { 33 } else { 257 };
        let x = random.floats(n * case.hidden, 2.0);
        let rows = x.chunks_exact(case.hidden);
        let expected: Vec<f32> = rows.flat_map(|x| net.outputs(x)).collect();
        if case.biased {
            let mut routes = x.chunks_exact(case.hidden).map(|x| net.routes(x));
            let all_or_none =
                |routes: Vec<(usize, f64)>| routes[0].0 == 0 && routes.iter().all(|r| r.0 != 3);
            assert!(routes.all(all_or_none));
        }
        // Half floats on both sides, or eight bits of what is multiplied, twice; floats are exact.
        let share = |step| match (case.dtype, step) {
            (DType::F32, _) | (DType::F16 | DType::BF16, Step::Decode) => 2e-5,
            (_, Step::Prefill) => 1e-3,
            (_, Step::Decode) => 2e-2,
        };
        let whole = run(&mut gpu, &moe, Step::Prefill, &x, case.hidden);
        near(
            &whole,
            &expected,
            share(Step::Prefill),
            &format!("{case:?}"),
        );
        assert!(largest(&expected) > 0.01, "{case:?}");
        // A token's outputs are the same whoever came with it.
        let mut first = 0;
        for n in [1, 7, 25, 33, 191] {
            if (first + n) * case.hidden <= x.len() {
                let x = &x[first * case.hidden..][..n * case.hidden];
                let part = run(&mut gpu, &moe, Step::Prefill, x, case.hidden);
                let whole = &whole[first * case.hidden..][..n * case.hidden];
                assert_eq!(part, whole, "{n} tokens from {first}, {case:?}");
                first += n;
            }
        }
        for n in [1, 3] {
            let (x, expected) = (&x[..n * case.hidden], &expected[..n * case.hidden]);
            let found = run(&mut gpu, &moe, Step::Decode, x, case.hidden);
            let what = format!("{n} tokens one by one, {case:?}");
            near(&found, expected, share(Step::Decode), &what);
        }
    }
}

/// A layer of a reply, whose products take from each other what is packed: after a convolution, experts between two norms,
/// then a gated unit.
fn layer<B: Backend>(b: &mut B, net: &Net, n_tokens: usize, routes_first: bool) -> Vec<f32> {
    let Case { hidden: n, .. } = net.case;
    let mut random = Random::new(1000 + n_tokens as u64);
    let moe = net.moe(b);
    let mut floats = |n: usize, scale: f32| random.floats(n, scale);
    let taps = b.vector(floats(3 * n, 1.0));
    let [gain, last] = [(); 2].map(|()| b.vector(floats(n, 1.0)));
    let mut bytes = vec![0; n * n / 32 * DType::Q8_0.block_bytes()];
    quant::quantize(DType::Q8_0, &floats(n * n, 0.1), &mut bytes);
    let square = || LinearOf {
        name: "square".into(),
        weight: b
            .matrix(&tensor(DType::Q8_0, n, n, bytes.clone()))
            .expect("a known format"),
        bias: None,
    };
    let ffn = GatedFfnOf {
        gate: square(),
        up: square(),
        down: square(),
        activation: net.case.activation,
    };
    let square = square();
    let [x, bcx] = [1, 3].map(|rows| floats(n_tokens * rows * n, 2.0));
    let mut conv = b.conv(2, n);
    b.begin(Step::Decode);
    let mut x = upload(b, &x, n);
    let bcx = upload(b, &bcx, 3 * n);
    let h = b.short_conv(&bcx, &taps, &mut conv);
    let [h] = b.linear(&h, [&square]);
    b.add(&mut x, &h);
    let h = b.rms_norm(&x, &gain, 1e-5);
    let routes = b.route(if routes_first { &x } else { &h }, 0, &moe);
    let h = b.moe(&h, routes, &moe);
    b.add(&mut x, &h);
    let h = b.rms_norm(&x, &last, 1e-5);
    let h = b.gated_ffn(&h, &ffn);
    b.add(&mut x, &h);
    read(b, &x)
}

#[test]
fn replies_take_experts_from_what_is_packed() {
    if !adapter() {
        return;
    }
    let of = |dtype: &DType, hidden, n_ffn| Case {
        dtype: *dtype,
        hidden,
        n_ffn,
        n_used: 2,
        gating: Gating::Sigmoid,
        biased: true,
        activation: Activation::Relu,
    };
    let formats = DType::ALL.iter().map(|dtype| of(dtype, 256, 256));
    // Two teams share what the rows of all slots have, 86 units, or 3 have less than a lane each.
    let shapes = [of(&DType::Q4_0, 96, 2080), of(&DType::Q5_0, 96, 32)];
    for (i, case) in formats.chain(shapes).enumerate() {
        let mut net = Net::new(case);
        net.bias.rotate_right(i % N_EXPERTS);
        for n_tokens in [1, 3] {
            let first = i % 2 == 0;
            let expected = layer(&mut cpu(), &net, n_tokens, first);
            let mut gpu = Gpu::timing(gpu::shared(None).expect("an adapter")).expect("memory");
            let found = layer(&mut gpu, &net, n_tokens, first);
            let what = format!("{n_tokens} tokens, {case:?}");
            near(&found, &expected, 3e-2, &what);
            let trace = gpu.take_trace().unwrap_or_default();
            let has_clock = gpu.device().info().timestamps;
            assert_eq!(trace.spans.is_empty(), !has_clock, "{what}");
            let mut labels = trace.spans.iter().map(|span| trace.label(span));
            let is_float = matches!(case.dtype, DType::F32 | DType::F16 | DType::BF16);
            let fits = |label: &Label| label.kernel.ends_with("_packed") != is_float;
            let all_fit = labels.all(|l| l.operation != Operation::Moe || fits(l));
            assert!(all_fit, "{what}: {:?}", trace.labels);
        }
    }
}

#[test]
fn mixtures_in_several_bindings_are_whole_ones_to_the_bit() {
    if !adapter() {
        return;
    }
    let device = Arc::new(Device::open(None).expect("an adapter"));
    let new_gpu = || Gpu::new(Arc::clone(&device)).expect("memory");
    let wide = Case {
        hidden: 96,
        n_ffn: 2080,
        ..cases().next().expect("a case")
    };
    for case in cases().chain([Case {
        dtype: DType::Q4_0,
        ..wide
    }]) {
        let net = Net::new(case);
        let Case { hidden, n_ffn, .. } = case;
        let x = Random::new(1100).floats(257 * hidden, 2.0);
        // Of experts with a whole number of rows in each binding but the last.
        let rows = hidden.min(n_ffn) / 3 / 8 * 8;
        let small = gpu::device_bytes(case.dtype, hidden.max(n_ffn), N_EXPERTS * rows);
        let [whole, split] = [u64::MAX, small].map(|bytes| {
            device.limit_parts(bytes);
            let mut gpu = new_gpu();
            let before = device.n_made();
            let moe = net.moe(&gpu);
            let n_made = device.n_made() - before;
            let mut found: Vec<Vec<f32>> = [257, 25, 7, 1]
                .map(|n| run(&mut gpu, &moe, Step::Prefill, &x[..n * hidden], hidden))
                .into();
            for n_tokens in [1, 3] {
                let x = &x[..n_tokens * hidden];
                found.push(run(&mut gpu, &moe, Step::Decode, x, hidden));
                if hidden.is_multiple_of(32) {
                    found.extend([false, true].map(|first| layer(&mut gpu, &net, n_tokens, first)));
                }
            }
            (n_made, found)
        });
        // Of each matrix at least one part more, which is two buffers.
        assert!(
            split.0 >= whole.0 + 6,
            "{} and {} buffers, {case:?}",
            whole.0,
            split.0
        );
        for (i, (split, whole)) in split.1.iter().zip(&whole.1).enumerate() {
            assert!(largest(whole) > 0.01, "{i}, {case:?}");
            assert_eq!(split, whole, "{i}, {case:?}");
        }
    }
    // Eight rows of each expert, a byte and a scale in sixteen for a weight, are what a part has at least.
    let of = |bytes| {
        device.limit_parts(bytes);
        let bytes = vec![0; N_EXPERTS * 16 * 64 / 32 * DType::Q8_0.block_bytes()];
        new_gpu().matrix(&stacked(DType::Q8_0, 64, 16, bytes))
    };
    let least = (N_EXPERTS * 8 * 64) as u64;
    assert!(of(least).is_ok());
    let error = of(least - 1).map(drop).expect_err("too small a binding");
    assert!(error.to_string().contains("8 of 5 experts"), "{error}");
}
