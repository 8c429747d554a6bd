// Cached keys as floats, four elements at a time.

@group(0) @binding(2) var<storage, read> keys: array<vec4<f32>>;

fn key4(at: u32) -> vec4<f32> {
    return keys[at];
}
