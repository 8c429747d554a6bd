//! Attention of a batch with queries in the lanes, scores from differences of keys where asked.

use std::ops::Range;

use super::attend::widen;
use super::attend_chosen as chosen;
use super::floats as v;
use crate::backend::cpu::avx2::attend_lanes as below;
use crate::backend::cpu::table::{AttendBatch, LanesBatch};
use crate::profile::DeltaWork;

crate::backend::cpu::x86::attend_lanes::attend_lanes!(
    "avx512bw,avx512dq,avx512vl,avx512vnni",
    below
);
