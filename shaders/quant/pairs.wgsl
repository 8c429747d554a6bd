// Two bits a weight: weight 4k + b of a unit in byte b of word k / 4, at bit 2 * (k % 4).

fn pairs(q: vec2<u32>) -> array<u32, 8> {
    var c: array<u32, 8>;
    for (var k = 0u; k < 4u; k++) {
        c[k] = (q.x >> (2u * k)) & 0x03030303u;
        c[k + 4u] = (q.y >> (2u * k)) & 0x03030303u;
    }
    return c;
}
