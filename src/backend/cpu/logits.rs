//! Passes over all logits: the largest, and the weights of a draw. One body for all levels, the same bits from each.

/// The smallest argument of [`exp`] whose result is a normal number; below it the result is 0.
const LOWEST: f32 = -87.0;

/// `exp(x)` for `x <= 0`, in plain arithmetic of single precision, so that it runs in vectors.
///
/// `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)`, `|r| <= ln 2 / 2`, and the Taylor polynomial of degree 7 for
/// `exp(r)`: at most 2e-7 of relative error for `x` in [-87, 0].
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: adding it rounds to a whole number, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first of so few bits that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let rounded = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (clamped - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x < LOWEST { 0.0 } else { p * power }
}

/// `weights[i] = exp(logits[i] - max)`.
#[inline(always)]
pub(super) fn weigh(logits: &[f32], max: f32, weights: &mut [f32]) {
    for (weight, logit) in weights.iter_mut().zip(logits) {
        *weight = exp(logit - max);
    }
}

/// What a pass over logits finds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Largest {
    /// The largest that is a number; minus infinity if there is none.
    pub max: f32,
    /// Whether one is no number.
    pub has_nan: bool,
}

impl Default for Largest {
    /// Of no logits.
    fn default() -> Self {
        Self {
            max: f32::NEG_INFINITY,
            has_nan: false,
        }
    }
}

/// Finds the largest.
#[inline(always)]
pub(super) fn largest(logits: &[f32], found: &mut Largest) {
    const WIDE: usize = 64; // so that the latency of a maximum is hidden
    let (lanes, rest) = logits.as_chunks::<WIDE>();
    let mut max = [f32::NEG_INFINITY; WIDE];
    let mut bad = [0u32; WIDE];
    for x in lanes {
        for i in 0..WIDE {
            max[i] = if x[i] > max[i] { x[i] } else { max[i] };
            bad[i] |= u32::from(x[i].is_nan());
        }
    }
    let max = max.iter().chain(rest).copied();
    *found = Largest {
        max: max.fold(f32::NEG_INFINITY, f32::max),
        has_nan: bad.iter().any(|bad| *bad > 0) || rest.iter().any(|x| x.is_nan()),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_to_the_exact_one() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) / exact - 1.0).abs();
            assert!(error < 2.5e-7, "exp({x}): {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(-87.1), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
    }
}
