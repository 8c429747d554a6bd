// Activations for packed integer products: bytes, and d = max|x| / 127 per group of eight. A row of n_units units of 32 is
// four planes of a vec4 a unit: the bytes of its first half, of its second, d of its groups, sums of squares of them.

fn pack(base: u32, n_units: u32, group: u32, low: vec4<f32>, high: vec4<f32>) {
    let most = max(abs(low), abs(high));
    let largest = max(max(most.x, most.y), max(most.z, most.w));
    let inverse = select(0.0, 127.0 / largest, largest > 0.0);
    let unit = group / 4u;
    let part = group % 4u;
    let at = 4u * (base + part / 2u * n_units + unit) + part % 2u * 2u;
    packed[at] = pack4xI8(vec4<i32>(round(low * inverse)));
    packed[at + 1u] = pack4xI8(vec4<i32>(round(high * inverse)));
    packed[4u * (base + 2u * n_units + unit) + part] = bitcast<u32>(largest / 127.0);
}

fn pack_squares(base: u32, n_units: u32, group: u32, sum: f32) {
    packed[4u * (base + 3u * n_units + group / 4u) + group % 4u] = bitcast<u32>(sum);
}
