//! Small models with experts that can be told apart by every byte.

use kinglet::experts::disk::{FakeDisk, Pace};
use kinglet::experts::{Budget, ExpertStore, LayerExperts, Layout, Options, Part, Request};

/// Numbers that look random (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `k` different numbers below `n`; with `skew`, small ones more often.
    pub fn choose(&mut self, k: usize, n: usize, skew: f64) -> Vec<u32> {
        let mut chosen = Vec::new();
        while chosen.len() < k {
            let id = (self.unit().powf(skew) * n as f64) as u32;
            if !chosen.contains(&id) {
                chosen.push(id);
            }
        }
        chosen
    }
}

/// The shape of a model.
#[derive(Clone)]
pub struct Shape {
    pub n_layers: usize,
    pub n_experts: usize,
    pub n_used: usize,
    /// Bytes of the parts of an expert.
    pub parts: Vec<usize>,
    /// What the tensors begin at, modulo 4096.
    pub residue: usize,
    /// By how much that grows with each layer.
    pub step: usize,
}

impl Shape {
    pub fn layout(&self) -> Layout {
        let (bytes, layers) = self.plan();
        Layout::new(vec![bytes], layers).expect("a sound layout")
    }

    fn plan(&self) -> (u64, Vec<LayerExperts>) {
        let mut at = 0usize;
        let layers = (0..self.n_layers)
            .map(|layer| LayerExperts {
                n_experts: self.n_experts,
                n_used: self.n_used,
                parts: self
                    .parts
                    .iter()
                    .map(|bytes| {
                        let offset =
                            at.next_multiple_of(4096) + (self.residue + layer * self.step) % 4096;
                        at = offset + bytes * self.n_experts;
                        Part {
                            file: 0,
                            offset: offset as u64,
                            expert_bytes: *bytes as u64,
                        }
                    })
                    .collect(),
            })
            .collect();
        (at as u64, layers)
    }

    /// A file of it: no two aligned words are equal but by chance.
    pub fn image(&self) -> Vec<u8> {
        let (bytes, _) = self.plan();
        let mut random = Random(self.residue as u64);
        let mut image = vec![0; bytes as usize];
        for word in image.chunks_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
        }
        image
    }

    /// The bytes of a part of an expert in `image`.
    pub fn expert<'a>(&self, image: &'a [u8], layer: usize, expert: u32, part: usize) -> &'a [u8] {
        let (_, layers) = self.plan();
        let Part {
            offset,
            expert_bytes,
            ..
        } = layers[layer].parts[part];
        let start = offset as usize + expert as usize * expert_bytes as usize;
        &image[start..start + expert_bytes as usize]
    }

    /// A store in imagined time.
    pub fn fake(&self, pace: Pace, options: &Options) -> ExpertStore {
        let disk = FakeDisk::new(vec![self.image()], Some(pace));
        ExpertStore::with_disk(Box::new(disk), self.layout(), options).expect("a store")
    }

    /// Waits for all of `request` and compares every byte.
    pub fn check(&self, image: &[u8], request: &Request) {
        for j in 0..request.len() {
            for part in 0..self.parts.len() {
                let bytes = request.wait(j, part).expect("no fault");
                let expected = self.expert(image, request.layer(), request.expert(j), part);
                assert!(bytes == expected, "expert {j}, part {part}");
            }
        }
    }
}

/// With so many slots.
pub fn slots(n: usize) -> Options {
    Options {
        budget: Budget::Slots(n),
        ..Options::default()
    }
}

/// Weights that do not matter.
pub fn ones(ids: &[u32]) -> Vec<f32> {
    vec![1.0; ids.len()]
}

/// A drive without latency.
pub fn pace(lanes: usize, bytes_per_ms: usize) -> Pace {
    Pace {
        lanes,
        latency: std::time::Duration::ZERO,
        bytes_per_second: bytes_per_ms as f64 * 1e3,
        jitter: std::time::Duration::ZERO,
        tick: std::time::Duration::ZERO,
        seed: 1,
    }
}
