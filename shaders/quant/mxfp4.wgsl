// w = 2^(e - 128) * table[q], the table twice E2M1. main: nibbles; aux: e, four units to a word.

struct Unit {
    q: vec4<u32>,
    e: u32,
}

fn load_0(unit: u32) -> Unit {
    return Unit(main_0[unit], (aux_0[unit / 4u] >> (unit % 4u * 8u)) & 0xffu);
}

fn codes(w: Unit) -> array<u32, 8> {
    return looked_up(w.q);
}

fn scales(w: Unit) -> vec4<f32> {
    // Below e = 2 the power is subnormal, which shaders may take for 0: so do we, everywhere.
    let d = select(bitcast<f32>((w.e - 1u) << 23u), 0.0, w.e < 2u);
    return vec4(d, 0.0, d, 0.0);
}
