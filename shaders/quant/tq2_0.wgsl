// w = d * (q - 1), both ternary formats. aux, per 8 units: half float d in a word; per unit two words of codes. No
// main.

struct Unit {
    q: vec2<u32>,
    d: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 17u;
    let q = at + 1u + unit % 8u * 2u;
    return Unit(vec2(aux_0[q], aux_0[q + 1u]), aux_0[at]);
}

fn codes(w: Unit) -> array<u32, 8> {
    return pairs(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    return vec4(d, -d, d, -d);
}
