//! Attention over one span of keys with running softmax sums.

use std::ops::Range;

use super::floats as v;
use crate::backend::cpu::scalar::attend as below;
use crate::backend::cpu::table::{AttendSpan, Rows};

crate::backend::cpu::x86::attend_few::attend_few!("avx2,fma,f16c");
crate::backend::cpu::x86::attend::attend!("avx2,fma,f16c", below);
