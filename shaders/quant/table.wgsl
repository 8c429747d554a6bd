// Codes of four bits that stand for the bytes of TABLE, (16).

fn looked_up(q: vec4<u32>) -> array<u32, 8> {
    var c: array<u32, 8>;
    for (var k = 0u; k < 4u; k++) {
        c[k] = looked_up_word(q[k] & 0x0f0f0f0fu);
        c[k + 4u] = looked_up_word((q[k] >> 4u) & 0x0f0f0f0fu);
    }
    return c;
}

fn looked_up_word(q: u32) -> u32 {
    var word = 0u;
    for (var b = 0u; b < 4u; b++) {
        let n = (q >> (8u * b)) & 15u;
        let below = select(TABLE.x, TABLE.y, (n & 4u) != 0u);
        let above = select(TABLE.z, TABLE.w, (n & 4u) != 0u);
        let four = select(below, above, (n & 8u) != 0u);
        word |= ((four >> (8u * (n & 3u))) & 0xffu) << (8u * b);
    }
    return word;
}
