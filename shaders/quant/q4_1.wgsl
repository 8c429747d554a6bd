// w = d * q + m. main: nibbles; aux: half floats d, m, a word a unit.

struct Unit {
    q: vec4<u32>,
    d: u32,
}

fn load_0(unit: u32) -> Unit {
    return Unit(main_0[unit], aux_0[unit]);
}

fn codes(w: Unit) -> array<u32, 8> {
    return nibbles(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d);
    return d.xyxy;
}
