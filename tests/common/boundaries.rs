//! DHSA's predictor of boundaries by its definition, in double precision: nothing of it is shared with the one that runs.

/// The logit of the gap between the first four of `keys`, `(8, width)`, and the last four, of a network with `parts`: the
/// weights and the bias of queries, keys and values, of the output (each head's columns apart), of the norm, of both layers.
pub fn logit(n_heads: usize, parts: &[Vec<f64>; 10], keys: &[Vec<f64>]) -> f64 {
    let [
        qkv,
        qkv_bias,
        out,
        out_bias,
        norm,
        norm_bias,
        up,
        up_bias,
        down,
        down_bias,
    ] = parts;
    let width = keys[0].len();
    let n = width / n_heads;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Rows of `weights`, and `bias`.
    let linear = |weights: &[f64], bias: &[f64], x: &[f64]| -> Vec<f64> {
        let rows = weights.chunks(x.len()).zip(bias);
        rows.map(|(row, bias)| dot(row, x) + bias).collect()
    };
    let projected: Vec<_> = keys.iter().map(|x| linear(qkv, qkv_bias, x)).collect();
    let normed: Vec<Vec<f64>> = (0..8)
        .map(|i| {
            let mut row = out_bias.clone();
            for head in 0..n_heads {
                let of = |part: usize, row: usize| &projected[row][part * width + head * n..][..n];
                let powers: Vec<f64> = (0..8)
                    .map(|j| (dot(of(0, i), of(1, j)) / (n as f64).sqrt()).exp())
                    .collect();
                let total: f64 = powers.iter().sum();
                let mean = |c: usize| (0..8).map(|j| powers[j] / total * of(2, j)[c]).sum();
                let mean: Vec<f64> = (0..n).map(mean).collect();
                for (c, x) in row.iter_mut().enumerate() {
                    *x += dot(&out[(head * width + c) * n..][..n], &mean);
                }
            }
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let normed =
                |c: usize| (row[c] - mean) / (variance + 1e-5).sqrt() * norm[c] + norm_bias[c];
            (0..width).map(normed).collect()
        })
        .collect();
    let side = |rows: &[Vec<f64>]| -> Vec<f64> {
        let mean = |c: usize| rows.iter().map(|row| row[c]).sum::<f64>() / 4.0;
        (0..width).map(mean).collect()
    };
    let (a, b) = (side(&normed[..4]), side(&normed[4..]));
    let pairs = || a.iter().zip(&b);
    let mut features = [a.clone(), b.clone()].concat();
    features.extend(pairs().map(|(a, b)| (a - b).abs()));
    features.extend(pairs().map(|(a, b)| a * b));
    features.push(dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt());
    let hidden = linear(up, up_bias, &features);
    let hidden: Vec<f64> = hidden.into_iter().map(|x| x.max(0.0)).collect();
    dot(down, &hidden) + down_bias[0]
}
