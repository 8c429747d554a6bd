//! Attention over spans of keys, against the softmax in `f64`.

use kinglet::backend::cpu::pool::OutCols;
use kinglet::backend::cpu::table::{self, Attend, AttendBatch, AttendSpan, Ready, Rows};
use kinglet::backend::{KvType, KvTypes};
use kinglet::quant;

use crate::common::{Random, assert_near, bf16, scalar_row, vector_rows};

struct Case {
    head_dim: usize,
    n_keys: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    visible: Vec<(usize, usize)>,
}

impl Case {
    /// `scale`: of the queries; 1 gives scores of some units, 30 a softmax of one key.
    fn random(
        head_dim: usize,
        n_keys: usize,
        visible: Vec<(usize, usize)>,
        scale: f32,
        random: &mut Random,
    ) -> Self {
        Self {
            head_dim,
            n_keys,
            q: random.floats(visible.len() * head_dim, scale),
            k: random.floats(n_keys * head_dim, 1.0),
            v: random.floats(n_keys * head_dim, 2.0),
            visible,
        }
    }

    /// The attention in spans of `span` keys: `out / sum` of each query, NaN where it sees nothing.
    fn run(&self, kernel: Ready<Attend>, kv: KvTypes, span: usize) -> Vec<f32> {
        let n = self.head_dim;
        let n_queries = self.visible.len();
        let (k, v) = (cached(kv.keys, &self.k), cached(kv.values, &self.v));
        let mut max = vec![f32::NEG_INFINITY; n_queries];
        let mut sum = vec![0.0; n_queries];
        let mut out = vec![0.0; n_queries * n];
        for start in (0..self.n_keys).step_by(span) {
            let keys = start..(start + span).min(self.n_keys);
            let inside = |p: usize| p.clamp(keys.start, keys.end) - keys.start;
            let visible: Vec<_> = self
                .visible
                .iter()
                .map(|(a, b)| (inside(*a), inside(*b)))
                .collect();
            let bytes = |kind: KvType| kind.row_bytes(n * keys.start)..kind.row_bytes(n * keys.end);
            let (k, v) = (&k[bytes(kv.keys)], &v[bytes(kv.values)]);
            let words = [aligned(k), aligned(v)];
            let [ka, va] = words.each_ref().map(|words| bytemuck::cast_slice(words));
            kernel.run(&mut AttendSpan {
                q: &self.q,
                k: Rows::new(kv.keys, &ka[..k.len()]),
                v: Rows::new(kv.values, &va[..v.len()]),
                next: &[],
                head_dim: n,
                decode: visible.iter().all(|keys| *keys == visible[0]),
                visible: &visible,
                max: &mut max,
                sum: &mut sum,
                out: &mut out,
            });
        }
        out.iter()
            .enumerate()
            .map(|(i, out)| out / sum[i / n])
            .collect()
    }

    /// All rows, with every type of keys and values that such heads can have; what is done with keys does not depend on
    /// the type of values, so one pair stands for the mixed ones.
    fn check(&self, spans: &[usize]) {
        let n = self.head_dim;
        let mixed = KvTypes {
            keys: KvType::Q8_0,
            values: KvType::Q4_0,
        };
        let pairs = KvType::ALL.map(KvTypes::from).into_iter().chain([mixed]);
        let whole = |kind: KvType| n.is_multiple_of(kind.dtype().block_len());
        for kv in pairs.filter(|kv| whole(kv.keys) && whole(kv.values)) {
            let exact = self.exact(kv);
            let rows = vector_rows(table::ATTEND).map(|(_, kernel)| kernel);
            for kernel in rows.chain([scalar_row(table::ATTEND)]) {
                for span in spans {
                    let y = self.run(kernel, kv, *span);
                    for (i, exact) in exact.iter().enumerate() {
                        let y = &y[i * n..][..n];
                        let what = format!(
                            "{} {kv} head_dim {n} n_keys {} span {span} query {i} sees {:?}",
                            kernel.name(),
                            self.n_keys,
                            self.visible[i]
                        );
                        let Some((exact, error)) = exact else {
                            assert!(y.iter().all(|y| y.is_nan()), "{what}");
                            continue;
                        };
                        for (y, exact) in y.iter().zip(exact) {
                            assert_near(*y, *exact, *error, &what);
                        }
                    }
                }
            }
        }
    }

    /// What each query gets, and how far off floats may be; nothing for one that sees nothing.
    fn exact(&self, kv: KvTypes) -> Vec<Option<(Vec<f64>, f64)>> {
        let n = self.head_dim;
        let (k, v) = (rounded(kv.keys, &self.k), rounded(kv.values, &self.v));
        let exact = |(q, &(first, end)): (&[f32], &(usize, usize))| {
            if first >= end {
                return None;
            }
            let score = |key: usize| -> f64 {
                q.iter()
                    .zip(&k[key * n..])
                    .map(|(q, k)| f64::from(*q) * f64::from(*k))
                    .sum()
            };
            let scores: Vec<f64> = (first..end).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            // A score is a sum of n products: its error is that of the exponent.
            let size: f64 = q.iter().map(|q| f64::from(q.abs())).sum();
            let epsilon = f64::from(f32::EPSILON) / 2.0;
            let relative = epsilon * (2.0 * n as f64 * size.min(1e9) + (end - first) as f64 + 32.0);
            let element = |j: usize| {
                let terms = weights.iter().zip(first..end);
                let terms = terms.map(|(w, key)| w * f64::from(v[key * n + j]));
                terms.sum::<f64>() / sum
            };
            Some(((0..n).map(element).collect(), 2.0 * relative))
        };
        self.q
            .chunks_exact(n)
            .zip(&self.visible)
            .map(exact)
            .collect()
    }
}

/// `x` as it is cached.
fn cached(kind: KvType, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; kind.row_bytes(x.len())];
    quant::quantize(kind.dtype(), x, &mut bytes);
    bytes
}

/// What is left of `x` then.
fn rounded(kind: KvType, x: &[f32]) -> Vec<f32> {
    let mut rounded = vec![0.0; x.len()];
    quant::dequantize(kind.dtype(), &cached(kind, x), &mut rounded);
    rounded
}

/// `x`, aligned as pages are, and up to three bytes.
fn aligned(x: &[u8]) -> Vec<u32> {
    let mut words = vec![0u32; x.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..x.len()].copy_from_slice(x);
    words
}

#[test]
fn heads_of_every_length() {
    let mut random = Random::new(11);
    for head_dim in [
        3, 8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 192, 256, 288,
    ] {
        for n_keys in [1, 15, 33, 70] {
            let case = Case::random(head_dim, n_keys, vec![(0, n_keys); 3], 0.3, &mut random);
            case.check(&[256]);
        }
    }
}

/// As in decode: a group of queries at one position, with the end of the keys and of a window anywhere in a span.
#[test]
fn queries_that_see_the_same_keys() {
    let mut random = Random::new(14);
    for (head_dim, n_queries) in [(64, 1), (64, 3), (128, 7), (256, 4), (64, 16)] {
        for (first, end) in [(0, 256), (0, 1), (3, 4), (5, 230), (0, 600), (77, 513)] {
            let visible = vec![(first, end); n_queries];
            let case = Case::random(head_dim, end, visible, 0.4, &mut random);
            case.check(&[256, 1024]);
        }
    }
}

#[test]
fn causal_windowed_and_empty_ranges() {
    let mut random = Random::new(12);
    for n_queries in [1usize, 2, 3, 4, 5, 9, 64] {
        for n_keys in [1, 31, 32, 33, 100, 256] {
            let causal = (0..n_queries).map(|i| (0, (i * n_keys / n_queries + 1).min(n_keys)));
            let window = (0..n_queries).map(|i| {
                let end = (i * n_keys / n_queries + 1).min(n_keys);
                (end.saturating_sub(20), end)
            });
            let any = (0..n_queries).map(|i| {
                let (a, b) = ((i * 37) % (n_keys + 1), (i * 61 + 5) % (n_keys + 1));
                if i % 4 == 3 {
                    (a, a)
                } else {
                    (a.min(b), a.max(b))
                }
            });
            for visible in [causal.collect(), window.collect(), any.collect::<Vec<_>>()] {
                let case = Case::random(64, n_keys, visible, 0.5, &mut random);
                case.check(&[256, 40, 7]);
            }
        }
    }
}

#[test]
fn large_scores() {
    let mut random = Random::new(13);
    for scale in [30.0, 1000.0] {
        let case = Case::random(
            64,
            90,
            vec![(0, 90), (10, 80), (89, 90)],
            scale,
            &mut random,
        );
        case.check(&[256, 13]);
    }
}

/// Attention of a batch in tiles, over pages of 128 keys. Bounds: a weight is rounded to bf16 once; queries, keys and
/// values are rounded in the reference too.
#[test]
fn batches_in_tiles() {
    const PAGE: usize = 128;
    let mut random = Random::new(14);
    let cases = [
        (64, 1, 16, 0, None, 0.5),
        (64, 3, 50, 0, None, 0.5),
        (64, 2, 33, 300, None, 0.5),
        (64, 4, 17, 127, Some(20), 0.5),
        (128, 2, 200, 64, Some(130), 0.3),
        (256, 4, 31, 500, Some(512), 0.3),
        (64, 1, 160, 40, None, 30.0),
        (64, 2, 16, 128, Some(1), 0.5),
    ];
    for (n, group, n_tokens, start, window, size) in cases {
        let window_start = |p: usize| (p + 1).saturating_sub(window.unwrap_or(usize::MAX));
        let end = start + n_tokens;
        let first = window_start(start) / PAGE * PAGE;
        let n_pages = (end - first).div_ceil(PAGE);
        let scale = 0.125;
        let stride = group * n + 64;
        let q = random.floats((n_tokens - 1) * stride + group * n, size / scale);
        let mut keys = random.floats(n_pages * PAGE * n, 1.0);
        let mut values = random.floats(n_pages * PAGE * n, 2.0);
        // What was never written may hold anything.
        keys[(end - first) * n..].fill(f32::NAN);
        values[(end - first) * n..].fill(f32::INFINITY);
        let kinds = [KvType::F16, KvType::Q8_0, KvType::Q4_0];
        let kinds = kinds
            .iter()
            .flat_map(|&keys| kinds.map(|values| KvTypes { keys, values }));
        let rows = vector_rows(table::ATTEND_TILES);
        for ((_, kernel), kv) in rows.flat_map(|row| kinds.clone().map(move |kv| (row, kv))) {
            let (k, v) = (cached(kv.keys, &keys), cached(kv.values, &values));
            let pages = |kind: KvType, bytes| -> Vec<Vec<u32>> {
                let pages = <[u8]>::chunks_exact(bytes, kind.row_bytes(PAGE * n));
                pages.map(aligned).collect()
            };
            let (k_pages, v_pages) = (pages(kv.keys, &k), pages(kv.values, &v));
            let rows = |kind| move |page| Rows::new(kind, bytemuck::cast_slice::<u32, u8>(page));
            let k_rows: Vec<_> = k_pages
                .iter()
                .map(Vec::as_slice)
                .map(rows(kv.keys))
                .collect();
            let v_rows: Vec<_> = v_pages
                .iter()
                .map(Vec::as_slice)
                .map(rows(kv.values))
                .collect();
            let (k, v) = (rounded(kv.keys, &keys), rounded(kv.values, &values));
            let mut y = vec![f32::NAN; n_tokens * group * n];
            kernel.run(&mut AttendBatch {
                q: &q,
                q_stride: stride,
                group,
                head_dim: n,
                scale,
                start,
                window,
                first,
                page: PAGE,
                keys: &k_rows,
                values: &v_rows,
                out: OutCols::whole(&mut y, group * n),
            });
            let key = |x: &[f32], p: usize, i: usize| f64::from(bf16(x[(p - first) * n + i]));
            for (t, y) in y.chunks_exact(group * n).enumerate() {
                for (head, y) in y.chunks_exact(n).enumerate() {
                    let q = &q[t * stride + head * n..][..n];
                    let score = |p: usize| -> f64 {
                        let q = q
                            .iter()
                            .map(|q| bf16(q * (scale * std::f32::consts::LOG2_E)));
                        q.enumerate()
                            .map(|(i, q)| f64::from(q) * key(&k, p, i))
                            .sum()
                    };
                    let sees = window_start(start + t)..start + t + 1;
                    let scores: Vec<f64> = sees.clone().map(score).collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp2()).collect();
                    let sum: f64 = weights.iter().sum();
                    for (i, y) in y.iter().enumerate() {
                        let terms = weights
                            .iter()
                            .zip(sees.clone())
                            .map(|(w, p)| w / sum * key(&v, p, i));
                        let terms: Vec<f64> = terms.collect();
                        let size: f64 = terms.iter().map(|t| t.abs()).sum();
                        let exact = terms.iter().sum();
                        let what = format!(
                            "{} {kv} n {n} group {group} tokens {n_tokens} start {start} token {t} head {head} element {i}",
                            kernel.name()
                        );
                        assert_near(*y, exact, size / 256.0 + 1e-5, &what);
                    }
                }
            }
        }
    }
}
