//! Bindings to ggml, made by `build.rs`.

#![allow(
    unsafe_code,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    clippy::all,
    reason = "machine-made, in the spelling of C"
)]

extern crate llama_cpp_sys_2 as _; // its build script links the library

include!(concat!(env!("OUT_DIR"), "/ggml.rs"));
