//! Attention over one span of keys with running softmax sums.

use bytemuck::Pod;

use crate::backend::cpu::table::AttendSpan;
use crate::quant::f16_to_f32;

/// An element of the cache.
trait Cached: Pod {
    /// As a float.
    fn to_f32(self) -> f32;
}

impl Cached for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
}

impl Cached for u16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f16_to_f32(self)
    }
}

/// See [`AttendSpan`].
fn attend<T: Cached>(span: &mut AttendSpan) {
    let n = span.head_dim;
    let (k, v): (&[T], &[T]) = (bytemuck::cast_slice(span.k), bytemuck::cast_slice(span.v));
    for (i, q) in span.q.chunks_exact(n).enumerate() {
        let out = &mut span.out[i * n..][..n];
        let (mut max, mut sum) = (span.max[i], span.sum[i]);
        for key in span.visible[i].0..span.visible[i].1 {
            let row = &k[key * n..][..n];
            let score: f32 = q.iter().zip(row).map(|(q, k)| q * k.to_f32()).sum();
            if score > max {
                let shrink = (max - score).exp();
                sum *= shrink;
                out.iter_mut().for_each(|o| *o *= shrink);
                max = score;
            }
            let weight = (score - max).exp();
            sum += weight;
            let row = &v[key * n..][..n];
            out.iter_mut()
                .zip(row)
                .for_each(|(o, v)| *o += weight * v.to_f32());
        }
        (span.max[i], span.sum[i]) = (max, sum);
    }
}

/// Over half floats.
pub(crate) fn f16(span: &mut AttendSpan) {
    attend::<u16>(span);
}

/// Over floats.
pub(crate) fn f32(span: &mut AttendSpan) {
    attend::<f32>(span);
}
