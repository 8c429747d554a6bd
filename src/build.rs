//! Build script of the package: names the commit, without which results of `kinglet bench` cannot be compared, and
//! makes bindings to the ggml that `llama-cpp-sys-2` has built if the feature `ggml` asks for them.

use std::process::Command;

fn main() {
    // Not on each commit: what was built is what the sources were.
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rustc-env=KINGLET_COMMIT={}", commit());
    // Dependencies have interfaces for C of their own, which are none of ours.
    let system = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if ["linux", "android"].contains(&&*system) {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--exclude-libs,ALL");
    }
    #[cfg(feature = "ggml")]
    bindings();
}

/// The commit of the working tree, with `-dirty` if sources differ from it; `unknown` outside a repository.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    // A package that lies in somebody else's repository is not of its commit.
    let ours = git(&["ls-files", "src/build.rs"]).is_some_and(|name| name == "src/build.rs");
    match git(&["rev-parse", "--short=9", "HEAD"]) {
        Some(commit) if ours => match git(&["status", "--porcelain", "--", "src"]) {
            Some(changes) if changes.is_empty() => commit,
            _ => format!("{commit}-dirty"),
        },
        _ => "unknown".to_owned(),
    }
}

/// Writes `ggml.rs`: the functions that `backend/ggml` calls, and the types of their arguments.
#[cfg(feature = "ggml")]
fn bindings() {
    use std::env;
    use std::path::PathBuf;

    let folder = |variable| PathBuf::from(env::var(variable).expect("cargo sets it"));
    let root = folder("DEP_LLAMA_ROOT");
    let include = root.join("include");
    // GCC 12 drops the stores of the tile configuration: ggml's AMX kernels then crash.
    let cache = std::fs::read_to_string(root.join("build/CMakeCache.txt")).unwrap_or_default();
    let compiler = cache
        .lines()
        .find(|line| line.starts_with("CMAKE_CXX_COMPILER:"));
    println!("cargo::rustc-check-cfg=cfg(ggml_amx)");
    if compiler.is_some_and(|line| line.contains("clang")) {
        println!("cargo::rustc-cfg=ggml_amx");
    }
    let headers = ["ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpu.h"];
    let lines = headers.map(|header| format!("#include <{header}>\n"));
    let functions = [
        "add|argsort_top_k|build_forward_expand|concat|cont|cpy|div|flash_attn_ext|geglu_split|get_rows|mul|mul_mat",
        "mul_mat_id|nbytes|new_tensor_2d|permute|reglu_split|reshape_2d|reshape_3d|rms_norm|rope_ext|scale|scale_bias",
        "set_output|sigmoid|soft_max|ssm_conv|sum_rows|swiglu_split|transpose",
        "view_2d|view_3d",
        "free|get_mem_size|init|log_set|new_graph_custom|reset|used_mem",
        "gallocr_(alloc_graph|free|get_buffer_size|new|reserve)|graph_(compute|overhead_custom|plan)|tensor_overhead",
        "backend_buffer_(clear|free|get_base|get_size)|backend_cpu_(buffer_type|reg)|backend_dev_supports_op",
        "backend_buft_(alloc_buffer|get_alloc_size|name)|backend_reg_(dev_get|get_proc_address)|backend_tensor_(alloc|set)",
        "threadpool_(free|new|params_default)|cpu_has_.*",
    ];
    bindgen::builder()
        .header_contents("ggml.h", &lines.concat())
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_function(format!("ggml_({})", functions.join("|")))
        .allowlist_type("ggml_backend_dev_get_extra_bufts_t")
        .allowlist_var("GGML_MAX_N_THREADS|GGML_ROPE_TYPE_NEOX")
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(false)
        .generate()
        .expect("clang reads the headers that were just installed")
        .write_to_file(folder("OUT_DIR").join("ggml.rs"))
        .expect("cargo made the folder");
}
