// w = d * (q - 16). main: nibbles; aux: per two units their fifth bits, a word each, and half floats d, d.

struct Unit {
    q: vec4<u32>,
    bits: u32,
    d: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 2u * 3u;
    return Unit(main_0[unit], aux_0[at + unit % 2u], aux_0[at + 2u] >> (unit % 2u * 16u));
}

fn codes(w: Unit) -> array<u32, 8> {
    return with_bits(nibbles(w.q), w.bits, 4u);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    return vec4(d, -16.0 * d, d, -16.0 * d);
}
