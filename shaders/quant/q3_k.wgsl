// w = d * scale * (q - 4), a signed byte scale per 16. aux, per 8 units: half float d in a word; 16 scales; per unit
// two words of the lower two bits; per unit a word of third bits. No main.

struct Unit {
    q: vec2<u32>,
    bits: u32,
    d: u32,
    scale: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 29u;
    let q = at + 5u + unit % 8u * 2u;
    let scale = aux_0[at + 1u + unit % 8u / 2u] >> (unit % 2u * 16u);
    return Unit(vec2(aux_0[q], aux_0[q + 1u]), aux_0[at + 21u + unit % 8u], aux_0[at], scale);
}

fn codes(w: Unit) -> array<u32, 8> {
    return with_bits(pairs(w.q), w.bits, 2u);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    let s = d * vec4<f32>(unpack4xI8(w.scale)).xy;
    return vec4(s.x, -4.0 * s.x, s.y, -4.0 * s.y);
}
