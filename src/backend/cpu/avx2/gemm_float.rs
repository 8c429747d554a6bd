//! F16, BF16 and F32 by float activations, many tokens.

use super::floats as v;
use super::gemv_float::{widen_bf16, widen_f16, widen_f32};
use crate::backend::cpu::acts::Acts;
use crate::backend::cpu::pool::OutCols;
use crate::backend::cpu::x86::gemm_float::gemm_float;
use crate::quant::{Block, BlockBF16, BlockF16, BlockF32, blocks};

gemm_float!("avx2,fma,f16c", f16, BlockF16, widen_f16);
gemm_float!("avx2,fma,f16c", bf16, BlockBF16, widen_bf16);
gemm_float!("avx2,fma,f16c", f32, BlockF32, widen_f32);
