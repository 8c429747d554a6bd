//! Products of quantized weights and 8-bit activations, by widening multiplications.

use super::{dot16, dot32};

super::gemv_rows!("neon": q4_0, q4_1, q5_0, q8_0, q4_k, q5_k, q6_k);
