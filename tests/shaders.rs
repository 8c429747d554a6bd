//! Every shader in every way that it is put together, without a GPU: parsed, validated, and written for Vulkan, Metal
//! and DirectX.

use std::collections::HashSet;

use kinglet::backend::gpu::pipeline::{Shader, Target};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};

#[test]
fn shaders_hold_for_every_target() {
    let mut seen = HashSet::new();
    for f16 in [false, true] {
        for subgroup in [None, Some(8), Some(32), Some(64)] {
            let matrices = subgroup == Some(32);
            let target = Target {
                f16,
                subgroup,
                matrices,
            };
            for shader in Shader::all().iter().filter(|s| s.runs_on(&target)) {
                let source = shader.source(&target);
                if seen.insert(source.clone()) {
                    check(&source, &format!("{shader:?} {target:?}"));
                }
            }
        }
    }
    println!("{} shaders", seen.len());
    assert!(seen.len() > 500, "{}", seen.len());
}

fn check(source: &str, what: &str) {
    let module = naga::front::wgsl::parse_str(source)
        .unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(source)));
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::SUBGROUP
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP_BARRIER;
    let mut validator = Validator::new(ValidationFlags::all(), capabilities);
    validator
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .subgroup_operations(naga::valid::SubgroupOperationSet::all());
    let info = validator
        .validate(&module)
        .unwrap_or_else(|e| panic!("{what}: {}", e.emit_to_string(source)));

    let options = spv::Options {
        lang_version: (1, 3),
        ..spv::Options::default()
    };
    let words = spv::write_vec(&module, &info, &options, None);
    assert!(
        words
            .unwrap_or_else(|e| panic!("{what}: SPIR-V: {e}"))
            .len()
            > 100
    );

    // Matrices of this size are Vulkan's.
    if source.contains("coop_mat16x16") {
        return;
    }
    let options = msl::Options {
        lang_version: (2, 4),
        fake_missing_bindings: true,
        ..msl::Options::default()
    };
    let written = msl::write_string(&module, &info, &options, &msl::PipelineOptions::default());
    let (text, _) = written.unwrap_or_else(|e| panic!("{what}: MSL: {e}"));
    assert!(text.contains("kernel void"), "{what}: MSL");

    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_4,
        fake_missing_bindings: true,
        ..hlsl::Options::default()
    };
    let mut text = String::new();
    let pipeline = hlsl::PipelineOptions::default();
    hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(&module, &info, None)
        .unwrap_or_else(|e| panic!("{what}: HLSL: {e}"));
    assert!(text.contains("numthreads"), "{what}: HLSL");
}
