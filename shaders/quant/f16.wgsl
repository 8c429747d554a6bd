// w = q, half floats.

fn unpack(w: Unit) -> array<vec4<f32>, 8> {
    var v: array<vec4<f32>, 8>;
    var q = w.q;
    for (var i = 0u; i < 4u; i++) {
        v[2u * i] = vec4(unpack2x16float(q[i].x), unpack2x16float(q[i].y));
        v[2u * i + 1u] = vec4(unpack2x16float(q[i].z), unpack2x16float(q[i].w));
    }
    return v;
}
