// w = d * scale * table[q]. main: nibbles; aux, per 8 units: half float d in a word; 8 signed bytes scale.

struct Unit {
    q: vec4<u32>,
    d: u32,
    scale: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 3u;
    let scale = aux_0[at + 1u + unit % 8u / 4u] >> (unit % 4u * 8u);
    return Unit(main_0[unit], aux_0[at], scale);
}

fn codes(w: Unit) -> array<u32, 8> {
    return looked_up(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let a = unpack2x16float(w.d).x * f32(unpack4xI8(w.scale).x);
    return vec4(a, 0.0, a, 0.0);
}
