// Sixteen bytes of a unit: weight i in the low half of byte i, weight i + 16 in the high half.

fn nibbles(q: vec4<u32>) -> array<u32, 8> {
    let low = q & vec4(0x0f0f0f0fu);
    let high = (q >> vec4(4u)) & vec4(0x0f0f0f0fu);
    return array<u32, 8>(low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w);
}
