//! Attention of a batch to keys that each token chooses.

use super::attend::widen;
use super::floats as v;
use crate::backend::cpu::table::{Chosen, LanesBatch};

crate::backend::cpu::x86::attend_chosen::attend_chosen!("avx512bw,avx512dq,avx512vl,avx512vnni");
