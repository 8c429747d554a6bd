// w = q, the upper halves of floats. main: 64 bytes a unit. No aux.

struct Unit {
    q: array<vec4<u32>, 4>,
}

fn load_0(unit: u32) -> Unit {
    var w: Unit;
    for (var i = 0u; i < 4u; i++) {
        w.q[i] = main_0[4u * unit + i];
    }
    return w;
}

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
