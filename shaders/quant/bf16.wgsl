// w = q, the upper halves of floats.

fn unpack(w: Unit) -> array<vec4<f32>, 8> {
    var v: array<vec4<f32>, 8>;
    var q = w.q;
    for (var i = 0u; i < 4u; i++) {
        let low = bitcast<vec4<f32>>(q[i] << vec4(16u));
        let high = bitcast<vec4<f32>>(q[i] & vec4(0xffff0000u));
        v[2u * i] = vec4(low.x, high.x, low.y, high.y);
        v[2u * i + 1u] = vec4(low.z, high.z, low.w, high.w);
    }
    return v;
}
