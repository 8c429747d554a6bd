//! Means, deviations, percentiles.

use std::time::Duration;

/// The mean.
pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// The standard deviation of a sample, n - 1 in the denominator; 0 for one value, as llama-bench has it.
pub fn deviation(x: &[f64]) -> f64 {
    if x.len() < 2 {
        return 0.0;
    }
    let mean = mean(x);
    let squares: f64 = x.iter().map(|x| (x - mean) * (x - mean)).sum();
    (squares / (x.len() - 1) as f64).sqrt()
}

/// The value that `share` (0 to 1) of the sorted `x` do not exceed: the nearest rank.
pub fn percentile(x: &[Duration], share: f64) -> Option<Duration> {
    let mut sorted = x.to_vec();
    sorted.sort_unstable();
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The middle value.
pub fn median(x: &[Duration]) -> Option<Duration> {
    percentile(x, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviation_of_a_sample() {
        assert_eq!(deviation(&[3.0]), 0.0);
        // mean 5, squares 16 + 4 + 4 + 16 = 40, n - 1 = 3
        assert!((deviation(&[1.0, 3.0, 7.0, 9.0]) - (40.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn percentiles_are_values_of_the_sample() {
        let ms = |n| Duration::from_millis(n);
        let x: Vec<Duration> = (1..=100).rev().map(ms).collect();
        assert_eq!(percentile(&x, 0.5), Some(ms(50)));
        assert_eq!(percentile(&x, 0.95), Some(ms(95)));
        assert_eq!(percentile(&x, 0.99), Some(ms(99)));
        assert_eq!(percentile(&x, 1.0), Some(ms(100)));
        assert_eq!(percentile(&x[..1], 0.01), Some(ms(100)));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
