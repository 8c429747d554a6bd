// Cached values as floats, four elements at a time.

@group(0) @binding(3) var<storage, read> values: array<vec4<f32>>;

fn value4(at: u32) -> vec4<f32> {
    return values[at];
}
