// w = q. main: 128 bytes a unit. No aux.

struct Unit {
    q: array<vec4<u32>, 8>,
}

fn load_0(unit: u32) -> Unit {
    var w: Unit;
    for (var i = 0u; i < 8u; i++) {
        w.q[i] = main_0[8u * unit + i];
    }
    return w;
}

fn unpack(w: Unit) -> array<vec4<f32>, 8> {
    var v: array<vec4<f32>, 8>;
    var q = w.q;
    for (var i = 0u; i < 8u; i++) {
        v[i] = bitcast<vec4<f32>>(q[i]);
    }
    return v;
}
