//! Vectors of floats: what a level defines for the kernels of this folder.

/// Defines operations on vectors for a level.
macro_rules! operations {
    ($features:literal: $($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:expr;)*) => {$(
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::backend::cpu) fn $name($($arg: $ty),*) $(-> $out)? {
            $body
        }
    )*};
}
pub(in crate::backend::cpu) use operations;

/// Defines `sums` on vectors: the sum of each.
macro_rules! sums {
    ($features:literal) => {
        /// The sum of each vector; in the same order whether there are four or fewer.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::backend::cpu) fn sums<const R: usize>(x: [V; R]) -> [f32; R] {
            let mut four = [splat(0.0); 4];
            four[..R].copy_from_slice(&x);
            let mut out = [0.0; R];
            out.copy_from_slice(&sum_of_4(four)[..R]);
            out
        }
    };
}
pub(in crate::backend::cpu) use sums;

/// Defines `exp` and `sigmoid` on vectors.
macro_rules! exponentials {
    ($features:literal) => {
        /// `e^x` with a relative error below 1.5e-7; 0 below -87.3, infinite above 88.7.
        ///
        /// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, ln 2 in two parts so that the difference is exact; then the
        /// minimax polynomial of Cephes (Moshier, `expf`).
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::backend::cpu) fn exp(x: V) -> V {
            // In this order a NaN stays.
            let x = min(splat(89.0), x);
            let n = round(mul(x, splat(std::f32::consts::LOG2_E)));
            let r = fma(n, splat(-0.693_359_4), x);
            let r = fma(n, splat(2.121_944_4e-4), r);
            let p = fma(splat(1.987_569_1e-4), r, splat(1.398_2e-3));
            let p = fma(p, r, splat(8.333_452e-3));
            let p = fma(p, r, splat(4.166_579_6e-2));
            let p = fma(p, r, splat(1.666_666_5e-1));
            let p = fma(p, r, splat(0.5));
            let p = add(fma(mul(r, r), p, r), splat(1.0));
            times_power_of_two(p, n, x)
        }

        /// `1 / (1 + e^-x)`.
        #[inline]
        #[target_feature(enable = $features)]
        pub(in crate::backend::cpu) fn sigmoid(x: V) -> V {
            let one = splat(1.0);
            div(one, add(one, exp(sub(splat(0.0), x))))
        }
    };
}
pub(in crate::backend::cpu) use exponentials;
