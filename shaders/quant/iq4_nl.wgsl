// w = d * table[q]. main: nibbles; aux: half floats d, two units to a word.

struct Unit {
    q: vec4<u32>,
    d: u32,
}

fn load_0(unit: u32) -> Unit {
    return Unit(main_0[unit], aux_0[unit / 2u] >> (unit % 2u * 16u));
}

fn codes(w: Unit) -> array<u32, 8> {
    return looked_up(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    return vec4(d, 0.0, d, 0.0);
}
