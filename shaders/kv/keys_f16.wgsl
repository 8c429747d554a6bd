// Cached keys as half floats, four elements at a time.

@group(0) @binding(2) var<storage, read> keys: array<vec2<u32>>;

fn key4(at: u32) -> vec4<f32> {
    let w = keys[at];
    return vec4(unpack2x16float(w.x), unpack2x16float(w.y));
}
