//! The searches for a group's scale (and minimum) that decide what the K formats store.
//!
//! A format fixes what its bits mean, not which bits a weight gets. These searches make the choices of ggml's reference
//! quantizers without an importance matrix, so that a file made here equals one made by llama.cpp. Floats are therefore
//! summed one by one from the first weight to the last, each operation rounded to `f32`: neither may change.
//!
//! Input of any kind is accepted: infinities and NaN give codes without meaning, never a panic.

/// The nearest whole number, ties to even, for |x| < 2^22; beyond that the low 23 bits of the mantissa, as ggml has it.
/// Adding 1.5 · 2^23 leaves no bits for a fraction.
#[inline]
pub(super) fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

/// The nearest whole number, ties away from zero. Adding the number below 1/2 rather than 1/2 keeps 0.49999997 at 0.
#[inline]
pub(super) fn nearest_away(x: f32) -> i32 {
    (x + 0.499_999_97_f32.copysign(x)) as i32
}

/// The weight with the greatest magnitude, the first of equals; 0 if all are.
pub(super) fn extreme(x: &[f32]) -> f32 {
    x.iter().fold(
        0.0,
        |top: f32, v| if top.abs() < v.abs() { *v } else { top },
    )
}

/// The greatest magnitude; 0 if all are NaN.
pub(super) fn magnitude(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |top: f32, v| top.max(v.abs()))
}

/// The least and the greatest weight.
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    x.iter().fold((f32::MAX, f32::MIN), |(min, max), &v| {
        (if v < min { v } else { min }, if v > max { v } else { max })
    })
}

/// `1 / x`, and 0 for 0.
#[inline]
pub(super) fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// Groups whose magnitudes stay below are taken for zero.
pub(super) const ZERO: f32 = 1e-15;

/// Least squares with weights `x²`: sums of `w·x·q` and `w·q²`. The best scale for the codes q is their quotient.
#[derive(Clone, Copy, Default)]
struct Fit {
    xq: f32,
    qq: f32,
}

impl Fit {
    fn add(&mut self, x: f32, q: i32) {
        let (w, q) = (x * x, q as f32);
        self.xq += w * x * q;
        self.qq += w * q * q;
    }

    fn without(self, x: f32, q: i32) -> Self {
        let (w, q) = (x * x, q as f32);
        Fit {
            xq: self.xq - w * x * q,
            qq: self.qq - w * q * q,
        }
    }

    fn scale(self) -> f32 {
        if self.qq == 0.0 {
            0.0
        } else {
            self.xq / self.qq
        }
    }
}

/// Codes `-n..n` for a symmetric group, stored as `code + n`, and the scale (Q6_K: n = 32). Tries 19 step sizes around
/// the one that maps the extreme weight to `-n` and keeps the one with the least squared error, weighted by x².
pub(super) fn symmetric<const N: usize>(x: &[f32; N], n: i32, codes: &mut [u8; N]) -> f32 {
    let top = extreme(x);
    if top.abs() < ZERO {
        *codes = [0; N];
        return 0.0;
    }
    let code = |inverse: f32, x: f32| nearest(inverse * x).clamp(-n, n - 1);
    let fit = |inverse: f32| {
        let mut fit = Fit::default();
        for &x in x {
            fit.add(x, code(inverse, x));
        }
        fit
    };
    let mut chosen = -(n as f32) / top;
    let first = fit(chosen);
    let mut scale = first.scale();
    let mut best = scale * first.xq;
    for step in (-9..=9).filter(|step| *step != 0) {
        let inverse = -(n as f32 + 0.1 * step as f32) / top;
        let fit = fit(inverse);
        if fit.qq > 0.0 && fit.xq * fit.xq > best * fit.qq {
            chosen = inverse;
            scale = fit.xq / fit.qq;
            best = scale * fit.xq;
        }
    }
    for (to, x) in codes.iter_mut().zip(x) {
        *to = (code(chosen, *x) + n) as u8;
    }
    scale
}

/// As [`symmetric`], by descent (Q3_K: n = 4): starts from the extreme weight at `-n` and moves one code at a time to
/// where the others' best scale would put it, as long as that lessens the error, in at most five rounds.
pub(super) fn descent<const N: usize>(x: &[f32; N], n: i32, codes: &mut [u8; N]) -> f32 {
    let top = extreme(x);
    if top.abs() < ZERO {
        *codes = [0; N];
        return 0.0;
    }
    let inverse = -(n as f32) / top;
    let mut fit = Fit::default();
    let mut q = x.map(|x| nearest(inverse * x).clamp(-n, n - 1));
    for (x, q) in x.iter().zip(q) {
        fit.add(*x, q);
    }
    for _ in 0..5 {
        let mut changed = false;
        for (x, q) in x.iter().zip(&mut q) {
            let mut other = fit.without(*x, *q);
            if other.xq <= 0.0 || other.xq.is_nan() {
                continue;
            }
            let moved = nearest(x * other.qq / other.xq).clamp(-n, n - 1);
            if moved == *q {
                continue;
            }
            other.add(*x, moved);
            if other.qq > 0.0 && other.xq * other.xq * fit.qq > fit.xq * fit.xq * other.qq {
                (*q, fit, changed) = (moved, other, true);
            }
        }
        if !changed {
            break;
        }
    }
    *codes = q.map(|q| (q + n) as u8);
    if fit.qq > 0.0 { fit.xq / fit.qq } else { 0.0 }
}

/// The greatest of `values` that is above zero, else a positive zero: `f32::max` may return either zero of a pair.
pub(super) fn greatest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |top, v| if v > top { v } else { top })
}

/// Scale and minimum of a group: `x ≈ scale · code - min`.
pub(super) struct Affine {
    pub scale: f32,
    pub min: f32,
}

/// The step sizes that [`affine`] tries: `(n + first + step · i) / (max - min)` for i in `0..=last`, with the minimum that
/// is the best so far.
pub(super) struct Steps {
    pub first: f32,
    pub step: f32,
    pub last: u8,
}

/// Codes `0..=n` for a group with a minimum that is not positive (Q2_K, Q4_K, Q5_K). Each step size gives codes, the
/// codes give scale and minimum by least squares with `weights`; the one with the least weighted `loss` wins.
pub(super) fn affine<const N: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    n: u8,
    steps: &Steps,
    loss: impl Fn(f32) -> f32,
    codes: &mut [u8; N],
) -> Affine {
    let (mut low, mut high) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&x, &w) in x.iter().zip(weights).skip(1) {
        low = if x < low { x } else { low };
        high = if x > high { x } else { high };
        sum_w += w;
        sum_x += w * x;
    }
    low = if low > 0.0 { 0.0 } else { low };
    if high == low {
        *codes = [0; N];
        return Affine {
            scale: 0.0,
            min: -low,
        };
    }
    let encode = |inverse: f32, min: f32| {
        x.map(|x| nearest(inverse * (x - min)).clamp(0, i32::from(n)) as u8)
    };
    let error = |codes: &[u8; N], scale: f32, min: f32| {
        let mut sum = 0.0;
        for ((&x, &w), &q) in x.iter().zip(weights).zip(codes) {
            sum += w * loss(scale * f32::from(q) + min - x);
        }
        sum
    };

    let inverse = f32::from(n) / (high - low);
    let (mut scale, mut min) = (1.0 / inverse, low);
    *codes = encode(inverse, min);
    let mut best = error(codes, scale, min);
    for i in 0..=steps.last {
        let inverse = (steps.first + steps.step * f32::from(i) + f32::from(n)) / (high - min);
        let tried = encode(inverse, min);
        let (mut sum_q, mut sum_qq, mut sum_xq) = (0.0, 0.0, 0.0);
        for ((&x, &w), &q) in x.iter().zip(weights).zip(&tried) {
            let q = f32::from(q);
            sum_q += w * q;
            sum_qq += w * q * q;
            sum_xq += w * q * x;
        }
        let det = sum_w * sum_qq - sum_q * sum_q;
        if det <= 0.0 || det.is_nan() {
            continue;
        }
        let mut new_scale = (sum_w * sum_xq - sum_x * sum_q) / det;
        let mut new_min = (sum_qq * sum_x - sum_q * sum_xq) / det;
        if new_min > 0.0 {
            new_min = 0.0;
            new_scale = sum_xq / sum_qq;
        }
        let new_error = error(&tried, new_scale, new_min);
        if new_error < best {
            best = new_error;
            (*codes, scale, min) = (tried, new_scale, new_min);
        }
    }
    Affine { scale, min: -min }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding() {
        for i in -2000..=2000 {
            let x = i as f32 / 8.0;
            assert_eq!(nearest(x), x.round_ties_even() as i32, "{x}");
            assert_eq!(nearest_away(x), x.round() as i32, "{x}");
        }
        for x in [0.5_f32, 1.5, 2.5, 100.5, 126.5] {
            for x in [x.next_down(), x.next_up(), -x.next_down(), -x.next_up()] {
                assert_eq!(nearest(x), x.round_ties_even() as i32, "{x}");
                assert_eq!(nearest_away(x), x.round() as i32, "{x}");
            }
        }
    }
}
