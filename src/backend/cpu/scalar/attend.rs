//! Attention over one span of keys with running softmax sums.

use crate::backend::cpu::table::{AttendSpan, Rows};
use crate::quant::{Block, BlockF16, BlockF32};

/// The longest block of a cache type.
const LEN: usize = 32;

/// See [`AttendSpan`].
pub(crate) fn attend(span: &mut AttendSpan) {
    match span.k {
        Rows::F32(k) => to_keys(bytemuck::cast_slice::<_, BlockF32>(k), span),
        Rows::F16(k) => to_keys(bytemuck::cast_slice::<_, BlockF16>(k), span),
        Rows::Q8_0(k) => to_keys(k, span),
        Rows::Q4_0(k) => to_keys(k, span),
    }
}

fn to_keys<K: Block>(k: &[K], span: &mut AttendSpan) {
    match span.v {
        Rows::F32(v) => to_both(k, bytemuck::cast_slice::<_, BlockF32>(v), span),
        Rows::F16(v) => to_both(k, bytemuck::cast_slice::<_, BlockF16>(v), span),
        Rows::Q8_0(v) => to_both(k, v, span),
        Rows::Q4_0(v) => to_both(k, v, span),
    }
}

fn to_both<K: Block, V: Block>(k: &[K], v: &[V], span: &mut AttendSpan) {
    let n = span.head_dim;
    let mut floats = [0.0; LEN];
    for (i, q) in span.q.chunks_exact(n).enumerate() {
        let out = &mut span.out[i * n..][..n];
        let (mut max, mut sum) = (span.max[i], span.sum[i]);
        for key in span.visible[i].0..span.visible[i].1 {
            let row = &k[key * (n / K::LEN)..][..n / K::LEN];
            let mut score = 0.0;
            for (q, block) in q.chunks_exact(K::LEN).zip(row) {
                let k = &mut floats[..K::LEN];
                block.dequantize(k);
                q.iter().zip(k).for_each(|(q, k)| score += q * *k);
            }
            if score > max {
                let shrink = (max - score).exp();
                sum *= shrink;
                out.iter_mut().for_each(|o| *o *= shrink);
                max = score;
            }
            let weight = (score - max).exp();
            sum += weight;
            let row = &v[key * (n / V::LEN)..][..n / V::LEN];
            for (out, block) in out.chunks_exact_mut(V::LEN).zip(row) {
                let v = &mut floats[..V::LEN];
                block.dequantize(v);
                out.iter_mut().zip(v).for_each(|(o, v)| *o += weight * *v);
            }
        }
        (span.max[i], span.sum[i]) = (max, sum);
    }
}
