// w = d * scale * q - dmin * min. main: nibbles; aux, per 8 units: half floats d, dmin; per unit a byte scale and
// a byte min.

struct Unit {
    q: vec4<u32>,
    d: u32,
    scale: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 5u;
    let scale = aux_0[at + 1u + unit % 8u / 2u] >> (unit % 2u * 16u);
    return Unit(main_0[unit], aux_0[at], scale);
}

fn codes(w: Unit) -> array<u32, 8> {
    return nibbles(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d);
    let a = d.x * f32(w.scale & 0xffu);
    let b = -d.y * f32((w.scale >> 8u) & 0xffu);
    return vec4(a, b, a, b);
}
