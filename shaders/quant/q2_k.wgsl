// w = d * scale * q - dmin * min, a byte of both per 16. aux, per 8 units: half floats d, dmin; 16 bytes; per unit
// two words of codes. No main.

struct Unit {
    q: vec2<u32>,
    d: u32,
    scale: u32,
}

fn load_0(unit: u32) -> Unit {
    let at = unit / 8u * 21u;
    let q = at + 5u + unit % 8u * 2u;
    let scale = aux_0[at + 1u + unit % 8u / 2u] >> (unit % 2u * 16u);
    return Unit(vec2(aux_0[q], aux_0[q + 1u]), aux_0[at], scale);
}

fn codes(w: Unit) -> array<u32, 8> {
    return pairs(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    let d = unpack2x16float(w.d);
    let s = vec2(w.scale, w.scale >> 8u);
    let a = d.x * vec2<f32>(s & vec2(15u));
    let b = -d.y * vec2<f32>((s >> vec2(4u)) & vec2(15u));
    return vec4(a.x, b.x, a.y, b.y);
}
