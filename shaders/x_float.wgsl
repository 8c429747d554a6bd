// Activations as floats, for weights that are floats: the i-th vec4 of every unit together, so that lanes read side by
// side.

var<workgroup> x_units: array<vec4<f32>, 8 * SEG>;

struct X {
    v: array<vec4<f32>, 8>,
}

fn x_of(u: u32) -> X {
    var xs: X;
    for (var i = 0u; i < 8u; i++) {
        xs.v[i] = x_units[i * SEG + u];
    }
    return xs;
}

// Makes the units from..end of the vector at x_at; the sum of squares before gains.
fn prepare(x_at: u32, from_unit: u32, end: u32, tid: u32) -> f32 {
    var squares = 0.0;
    for (var at = from_unit * 8u + tid; at < end * 8u; at += WG) {
        var v = vec4(0.0);
        if at < p.x_row {
            v = x[x_at + at];
        }
        if NORM {
            squares += dot(v, v);
            v *= gain[min(at, p.x_row - 1u)];
        }
        x_units[(at % 8u) * SEG + at / 8u - from_unit] = v;
    }
    return squares;
}

fn dot_unit(w: Unit, xs: X) -> f32 {
    var v = unpack(w);
    var x_v = xs.v;
    var sum = vec4(0.0);
    for (var i = 0u; i < 8u; i++) {
        sum = fma(v[i], x_v[i], sum);
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}
