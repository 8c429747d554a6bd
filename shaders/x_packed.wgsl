// Activations for packed integer products: 8 bits, d = max|x| / 127 per unit of 32, the sums of its halves.
// A lane has a unit: eight words of four bytes, and (d, d * sum of the first half, of the second).

var<workgroup> x_low: array<vec4<u32>, SEG>;
var<workgroup> x_high: array<vec4<u32>, SEG>;
var<workgroup> x_scale: array<vec4<f32>, SEG>;

struct X {
    low: vec4<u32>,
    high: vec4<u32>,
    scale: vec4<f32>,
}

fn x_of(u: u32) -> X {
    return X(x_low[u], x_high[u], x_scale[u]);
}

// Makes the units from..end of the vector at x_at; the sum of squares before gains.
fn prepare(x_at: u32, from_unit: u32, end: u32, tid: u32) -> f32 {
    var squares = 0.0;
    for (var u = from_unit + tid; u < end; u += WG) {
        var v: array<vec4<f32>, 8>;
        var most = vec4(0.0);
        for (var i = 0u; i < 8u; i++) {
            v[i] = x[x_at + u * 8u + i];
            if NORM {
                squares += dot(v[i], v[i]);
                v[i] *= gain[u * 8u + i];
            }
            most = max(most, abs(v[i]));
        }
        let largest = max(max(most.x, most.y), max(most.z, most.w));
        let d = largest / 127.0;
        var inverse = 0.0;
        if largest > 0.0 {
            inverse = 127.0 / largest;
        }
        var words: array<u32, 8>;
        var sums = vec2<i32>();
        for (var i = 0u; i < 8u; i++) {
            let q = vec4<i32>(round(v[i] * inverse));
            words[i] = pack4xI8(q);
            if i < 4u {
                sums.x += q.x + q.y + q.z + q.w;
            } else {
                sums.y += q.x + q.y + q.z + q.w;
            }
        }
        let at = u - from_unit;
        x_low[at] = vec4(words[0], words[1], words[2], words[3]);
        x_high[at] = vec4(words[4], words[5], words[6], words[7]);
        x_scale[at] = vec4(d, d * f32(sums.x), d * f32(sums.y), 0.0);
    }
    return squares;
}

// w[i] = a * code[i] + b in each half of a unit, so their sum of products is a * d * (code . q) + b * d * sum(q).
fn dot_unit(w: Unit, xs: X) -> f32 {
    let c = codes(w);
    let s = scales(w);
    let low = dot4I8Packed(c[0], xs.low.x) + dot4I8Packed(c[1], xs.low.y)
        + dot4I8Packed(c[2], xs.low.z) + dot4I8Packed(c[3], xs.low.w);
    let high = dot4I8Packed(c[4], xs.high.x) + dot4I8Packed(c[5], xs.high.y)
        + dot4I8Packed(c[6], xs.high.z) + dot4I8Packed(c[7], xs.high.w);
    let products = s.x * f32(low) + s.z * f32(high);
    return products * xs.scale.x + s.y * xs.scale.y + s.w * xs.scale.z;
}
