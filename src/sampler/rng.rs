//! SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, the same numbers on every platform.

/// A seeded generator of uniform numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rng(u64);

impl Rng {
    /// The generator that `seed` names.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// What [`Rng::new`] takes to go on from here.
    pub fn state(&self) -> u64 {
        self.0
    }

    /// A seed from the clock and the process, for when the user names none.
    pub fn random_seed() -> u64 {
        use std::hash::{BuildHasher, RandomState};
        // 32 bits: short enough to read off a screen and type again.
        RandomState::new().hash_one(std::process::id()) & 0xffff_ffff
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A uniform number in `[0, 1)`, of 53 bits.
    pub fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_numbers_of_seed_1234567() {
        // From the reference implementation of SplitMix64.
        let mut rng = Rng::new(1_234_567);
        assert_eq!(rng.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next_u64(), 3_203_168_211_198_807_973);
        assert_eq!(rng.next_u64(), 9_817_491_932_198_370_423);
    }

    #[test]
    fn uniform_numbers_stay_below_one() {
        let mut rng = Rng::new(7);
        let mean = (0..100_000)
            .map(|_| {
                let x = rng.next_f64();
                assert!((0.0..1.0).contains(&x));
                x
            })
            .sum::<f64>()
            / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "mean {mean}");
    }
}
