//! Norms, rotary embedding, gated units, conversions, short convolution: the scalar bodies compiled for this level, and
//! vector exponentials and conversions where the compiler finds none.

use super::floats as v;
use crate::backend::Activation;
use crate::backend::cpu::acts::{Q8_LEN, Q8RowMut};
use crate::backend::cpu::logits::{self, Largest};
use crate::backend::cpu::ranking;
use crate::backend::cpu::scalar::{elementwise as scalar, short_conv};
use crate::backend::cpu::table::ShortConvRows;

crate::backend::cpu::x86::elementwise::elementwise!("avx512bw,avx512dq,avx512vl,avx512vnni");
