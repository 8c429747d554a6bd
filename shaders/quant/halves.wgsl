// Units of formats with 16 bits a weight. main: 64 bytes a unit. No aux.

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
