// Cached values in blocks of 32: nine words, of which the first has the scale, a half float, and the others four codes each.

@group(0) @binding(3) var<storage, read> values: array<u32>;

fn value4(at: u32) -> vec4<f32> {
    let block = at / 8u * 9u;
    let scale = unpack2x16float(values[block]).x;
    return scale * vec4<f32>(unpack4xI8(values[block + 1u + at % 8u]));
}
