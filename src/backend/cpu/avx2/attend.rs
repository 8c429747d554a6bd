//! Attention over one span of keys with running softmax sums.

use std::ops::Range;

use super::floats as v;
use crate::backend::cpu::scalar::attend as below;
use crate::backend::cpu::table::AttendSpan;
use crate::backend::cpu::x86::attend::Rows;

crate::backend::cpu::x86::attend_few::attend_few!("avx2,fma,f16c", few_f16, u16, v::load_f16);
crate::backend::cpu::x86::attend_few::attend_few!("avx2,fma,f16c", few_f32, f32, v::load);
crate::backend::cpu::x86::attend::attend!("avx2,fma,f16c", below);
