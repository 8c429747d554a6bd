//! The gradient of a [`Predictor`].

use crate::backend::predictor::{Predictor, Run, SIDE, dot, norms};

/// Rows that a gap sees.
const SEEN: usize = 2 * SIDE;

/// `y += a x`.
fn add(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

/// Adds to `grads` the gradient by all parameters of what has the gradient `slopes` by the logits of `run`, which were
/// computed from `keys`.
pub(super) fn backward(
    predictor: &Predictor,
    keys: &[f32],
    run: &mut Run,
    slopes: &[f32],
    grads: &mut [f32],
) {
    let shape = predictor.shape();
    let (width, n, n_heads) = (shape.width, shape.head_dim(), shape.n_heads);
    let (n_rows, n_features) = (run.n + SEEN - 1, shape.n_features());
    let [_, _, out, _, norm, _, up, _, down, _] = shape.split(predictor.params());
    let mut rest = grads;
    let mut part = |range: std::ops::Range<usize>| {
        let part = rest.split_off_mut(..range.len());
        part.expect("as long as all parameters")
    };
    let [
        to_qkv,
        to_qkv_bias,
        to_out,
        to_out_bias,
        to_norm,
        to_norm_bias,
        to_up,
        to_up_bias,
        to_down,
        to_down_bias,
    ] = shape.ranges().map(&mut part);

    // Both layers, an output at a time: its weights stay near while gaps pass by.
    let mut by_features = vec![0.0; run.n * n_features];
    let n_hidden = run.hidden.len() / run.n;
    for o in 0..shape.n_hidden {
        let (up, to_up) = (&up[o * n_features..], &mut to_up[o * n_features..]);
        for (gap, slope) in slopes.iter().enumerate() {
            let hidden = run.hidden[gap * n_hidden + o];
            if hidden > 0.0 {
                to_down[o] += slope * hidden;
                let d = slope * down[o];
                to_up_bias[o] += d;
                add(
                    &mut to_up[..n_features],
                    d,
                    &run.features[gap * n_features..],
                );
                add(&mut by_features[gap * n_features..][..n_features], d, up);
            }
        }
    }
    to_down_bias[0] += slopes.iter().sum::<f32>();

    // `(n_rows, n_heads, width)` and `(n_rows, 3 width)`.
    let mixed = run.mixed_rows(shape);
    let mut by_mixed = vec![0.0; n_rows * n_heads * width];
    let mut by_qkv = vec![0.0; n_rows * 3 * width];
    let n_qkv = run.qkv.len() / n_rows;
    let scale = 1.0 / (n as f32).sqrt();
    for (gap, d) in by_features.chunks_exact(n_features).enumerate() {
        let [by_a, by_b] = of_sides(&run.features[gap * n_features..][..n_features], d, width);
        let inverse = predictor.attend(run, gap);
        for (i, row) in run.rows.chunks_exact(width).enumerate() {
            let by_mean = if i < SIDE { &by_a } else { &by_b };
            let mut by_row = vec![0.0; width];
            for c in 0..width {
                let d = by_mean[c] / SIDE as f32;
                to_norm[c] += d * row[c];
                to_norm_bias[c] += d;
                by_row[c] = d * norm[c];
            }
            let mean = by_row.iter().sum::<f32>() / width as f32;
            let along = dot(&by_row, row) / width as f32;
            for (d, x) in by_row.iter_mut().zip(row) {
                *d = inverse[i] * (*d - mean - x * along);
            }
            add(to_out_bias, 1.0, &by_row);
            for head in 0..n_heads {
                let weight = |j: usize| run.weights[(i * SEEN + j) * n_heads + head];
                let at = |j: usize| ((gap + j) * n_heads + head) * width;
                let by_weight: [f32; SEEN] =
                    std::array::from_fn(|j| dot(&by_row, &mixed[at(j)..][..width]));
                let sum: f32 = (0..SEEN).map(|j| weight(j) * by_weight[j]).sum();
                for j in 0..SEEN {
                    add(&mut by_mixed[at(j)..][..width], weight(j), &by_row);
                    let by_score = weight(j) * (by_weight[j] - sum) * scale;
                    let column = |row: usize, part: usize| (gap + row, part * width + head * n);
                    let ((q, q_at), (k, k_at)) = (column(i, 0), column(j, 1));
                    let query = &run.qkv[q * n_qkv + q_at..][..n];
                    let key = &run.qkv[k * n_qkv + k_at..][..n];
                    add(&mut by_qkv[q * 3 * width + q_at..][..n], by_score, key);
                    add(&mut by_qkv[k * 3 * width + k_at..][..n], by_score, query);
                }
            }
        }
    }

    for head in 0..n_heads {
        for o in 0..width {
            let at = (head * width + o) * n;
            let (out, to_out) = (&out[at..][..n], &mut to_out[at..][..n]);
            for row in 0..n_rows {
                let d = by_mixed[(row * n_heads + head) * width + o];
                let value = 2 * width + head * n;
                add(to_out, d, &run.qkv[row * n_qkv + value..][..n]);
                add(&mut by_qkv[row * 3 * width + value..][..n], d, out);
            }
        }
    }
    for o in 0..3 * width {
        for (row, key) in keys.chunks_exact(width).take(n_rows).enumerate() {
            let d = by_qkv[row * 3 * width + o];
            to_qkv_bias[o] += d;
            add(&mut to_qkv[o * width..][..width], d, key);
        }
    }
}

/// The gradient by `a` and `b`, from that by `[a, b, |a - b|, a b, cos(a, b)]`.
fn of_sides(features: &[f32], d: &[f32], width: usize) -> [Vec<f32>; 2] {
    let (a, b) = (&features[..width], &features[width..2 * width]);
    let (cosine, by_cosine) = (features[4 * width], d[4 * width]);
    let part = |of: usize| &d[of * width..][..width];
    let (by_difference, by_product) = (part(2), part(3));
    let inverse = 1.0 / norms(a, b);
    let side = |x: &[f32], other: &[f32], own: &[f32]| {
        let along = cosine / dot(x, x).max(1e-16);
        let by = |c: usize| {
            let difference = x[c] - other[c];
            let sign = if difference == 0.0 {
                0.0
            } else {
                difference.signum()
            };
            own[c]
                + by_difference[c] * sign
                + by_product[c] * other[c]
                + by_cosine * (other[c] * inverse - x[c] * along)
        };
        (0..width).map(by).collect()
    };
    [side(a, b, part(0)), side(b, a, part(1))]
}
