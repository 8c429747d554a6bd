//! The loops that measure how fast memory is read.

/// Defines the loops for a level with `$features`. Its file has `V`, the vectors of a cache line, with `zero`, `xor` of
/// a line into them, and `fold` to 64 bits.
macro_rules! reads {
    ($features:literal) => {
        /// From start to end; the hardware fetches ahead.
        #[target_feature(enable = $features)]
        pub(crate) fn read_stream(x: &[Line], sum: &mut u64) {
            let mut sums = [zero(); 4];
            let (runs, rest) = x.as_chunks::<4>();
            for run in runs {
                for (sum, line) in sums.iter_mut().zip(run) {
                    *sum = xor(*sum, line);
                }
            }
            for line in rest {
                sums[0] = xor(sums[0], line);
            }
            for sums in sums {
                *sum ^= fold(sums);
            }
        }

        /// From four places at once, each asked for ahead: more reads are under way than one stream has.
        #[target_feature(enable = $features)]
        pub(crate) fn read_streams(x: &[Line], sum: &mut u64) {
            let quarter = x.len() / 4;
            let (ab, cd) = x.split_at(2 * quarter);
            let ((a, b), (c, d)) = (ab.split_at(quarter), cd.split_at(quarter));
            let mut sums = [zero(); 4];
            for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
                for (sum, line) in sums.iter_mut().zip([a, b, c, d]) {
                    crate::backend::cpu::x86::prefetch(
                        line,
                        crate::backend::cpu::x86::roofline::AHEAD,
                    );
                    *sum = xor(*sum, line);
                }
            }
            for sums in sums {
                *sum ^= fold(sums);
            }
            read_stream(&x[4 * quarter..], sum);
        }
    };
}

pub(in crate::backend::cpu) use reads;

/// Bytes that each of several streams is asked for ahead.
pub(in crate::backend::cpu) const AHEAD: usize = 1024;
