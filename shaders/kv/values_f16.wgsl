// Cached values as half floats, four elements at a time.

@group(0) @binding(3) var<storage, read> values: array<vec2<u32>>;

fn value4(at: u32) -> vec4<f32> {
    let w = values[at];
    return vec4(unpack2x16float(w.x), unpack2x16float(w.y));
}
