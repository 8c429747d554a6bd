// Formats whose weights are w = a * code + b in each half of a unit: from what codes() and scales() give, the floats.

fn unpack(w: Unit) -> array<vec4<f32>, 8> {
    var c = codes(w);
    let s = scales(w);
    var v: array<vec4<f32>, 8>;
    for (var i = 0u; i < 4u; i++) {
        v[i] = fma(vec4<f32>(unpack4xI8(c[i])), vec4(s.x), vec4(s.y));
        v[i + 4u] = fma(vec4<f32>(unpack4xI8(c[i + 4u])), vec4(s.z), vec4(s.w));
    }
    return v;
}
