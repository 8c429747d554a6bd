// w = d * scale * (q - 32), a signed byte scale per 16. main: nibbles; aux, per 8 units: half float d in a word; 16
// scales; per unit two words of the upper two bits.

struct Unit {
    q: vec4<u32>,
    upper: vec2<u32>,
    d: u32,
    scale: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 21u;
    let upper = at + 5u + unit % 8u * 2u;
    let scale = aux_0[at + 1u + unit % 8u / 2u] >> (unit % 2u * 16u);
    return Unit(main_0[unit], vec2(aux_0[upper], aux_0[upper + 1u]), aux_0[at], scale);
}

fn codes(w: Unit) -> array<u32, 8> {
    var c = nibbles(w.q);
    var upper = pairs(w.upper);
    for (var k = 0u; k < 8u; k++) {
        c[k] |= upper[k] << 4u;
    }
    return c;
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d).x;
    let s = d * vec4<f32>(unpack4xI8(w.scale)).xy;
    return vec4(s.x, -32.0 * s.x, s.y, -32.0 * s.y);
}
