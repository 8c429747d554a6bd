// w = d * q. main: 32 bytes a unit; aux: half floats d, two units to a word.

struct Unit {
    low: vec4<u32>,
    high: vec4<u32>,
    d: u32,
}

fn load_0(unit: u32) -> Unit {
    let d = aux_0[unit / 2u] >> (unit % 2u * 16u);
    return Unit(main_0[2u * unit], main_0[2u * unit + 1u], d);
}

fn codes(w: Unit) -> array<u32, 8> {
    return array<u32, 8>(w.low.x, w.low.y, w.low.z, w.low.w, w.high.x, w.high.y, w.high.z, w.high.w);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    return vec4(d, 0.0, d, 0.0);
}
