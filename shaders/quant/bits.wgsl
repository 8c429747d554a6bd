// One more bit a weight: weight 4k + b of a unit in bit 8b + k, to stand at bit `at` of its code.

fn with_bits(low: array<u32, 8>, bits: u32, at: u32) -> array<u32, 8> {
    var c = low;
    for (var k = 0u; k < 8u; k++) {
        c[k] |= ((bits >> k) & 0x01010101u) << at;
    }
    return c;
}
