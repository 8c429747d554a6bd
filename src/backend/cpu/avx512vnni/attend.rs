//! Attention over one span of keys with running softmax sums.

use std::ops::Range;

use super::floats as v;
use crate::backend::cpu::avx2::attend as below;
use crate::backend::cpu::table::{AttendSpan, Rows};

crate::backend::cpu::x86::attend_few::attend_few!("avx512bw,avx512dq,avx512vl,avx512vnni");
crate::backend::cpu::x86::attend::attend!("avx512bw,avx512dq,avx512vl,avx512vnni", below);
