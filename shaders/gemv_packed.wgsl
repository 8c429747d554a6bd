// y = W x, for one to three matrices W, (n_out, n_in), that share x, which is packed as pack.wgsl says; a token at a time.
//
// Around it, where the constants say so: x is normed (NORM: the gain is in x, the scale follows from its sums of squares), a
// bias and a residual are added, two matrices become activation(W0 x) * (W1 x) (GLU). PACK: y, times the gain of the
// norm that comes next where there is one, is packed for the product that comes next. CONV: W has rows b, c and x of a short
// convolution (see short_conv.wgsl), whose output is y; a workgroup has eight channels of it.
//
// A workgroup has a group of eight rows, a team of lanes ROWS of them or, where rows are long, every SPLIT-th part of
// one; lane i reads units i, i + TEAM, ..., DEPTH at once. Nothing is prepared, so weights and x are on their way at
// once. The first lane then has all eight rows. Grid: (groups, tokens, or slots of all tokens with EACH).

struct Params {
    n_units: u32,
    out_at: u32, // vec4
    residual_at: u32, // vec4
    eps: f32,
    n_out: vec3<u32>, // rows of the matrices that are there
    row_at: u32, // the first row of a part of a matrix, or in it of an expert
    stride: vec3<u32>, // vec4 of a row of y
    next_units: u32, // of a row of y
    first_wg: vec3<u32>,
    ring: u32,
    ring_row: u32, // for this token
    n_used: u32,
    routes_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<u32>>;
// unroll i RESIDUAL
@group(0) @binding(2) var<storage, read> residual: array<vec4<f32>>;
// end
// unroll i GAIN
@group(0) @binding(3) var<storage, read> gain: array<vec4<f32>>;
// end
// unroll i PACK
@group(0) @binding(4) var<storage, read_write> packed: array<u32>;
// end
// unroll i CONV
@group(0) @binding(17) var<storage, read> taps: array<vec4<f32>>;
@group(0) @binding(18) var<storage, read_write> memory: array<vec4<f32>>;
// end
// unroll i ROUTES
@group(0) @binding(19) var<storage, read> routes: array<f32>;
// end

var<workgroup> shared_sums: array<f32, WG>;
// Of the teams: rows, or their parts.
var<workgroup> sums: array<f32, TEAMS * ROWS>;
var<workgroup> sums_up: array<f32, TEAMS * ROWS>;
var<workgroup> sums_third: array<f32, TEAMS * ROWS>;
var<workgroup> squares: array<f32, TEAMS>;

struct X {
    low: vec4<u32>,
    high: vec4<u32>,
    d: vec4<f32>,
}

fn x_of(at: u32) -> X {
    return X(x[at], x[at + p.n_units], bitcast<vec4<f32>>(x[at + 2u * p.n_units]));
}

// The sums of the halves of a unit.
fn halves(x: X) -> vec2<f32> {
    let ones = 0x01010101u;
    let a = dot4I8Packed(ones, x.low.x) + dot4I8Packed(ones, x.low.y);
    let b = dot4I8Packed(ones, x.low.z) + dot4I8Packed(ones, x.low.w);
    let c = dot4I8Packed(ones, x.high.x) + dot4I8Packed(ones, x.high.y);
    let d = dot4I8Packed(ones, x.high.z) + dot4I8Packed(ones, x.high.w);
    return vec2(f32(a) * x.d.x + f32(b) * x.d.y, f32(c) * x.d.z + f32(d) * x.d.w);
}

// w[i] = a * code[i] + b in each half of a unit, so their sum of products is a * (code . x) + b * sum(x).
fn dot_unit(w: Unit, x: X, half_sums: vec2<f32>) -> f32 {
    let k = codes(w);
    let s = scales(w);
    let a = dot4I8Packed(k[0], x.low.x) + dot4I8Packed(k[1], x.low.y);
    let b = dot4I8Packed(k[2], x.low.z) + dot4I8Packed(k[3], x.low.w);
    let c = dot4I8Packed(k[4], x.high.x) + dot4I8Packed(k[5], x.high.y);
    let d = dot4I8Packed(k[6], x.high.z) + dot4I8Packed(k[7], x.high.w);
    let first = f32(a) * x.d.x + f32(b) * x.d.y;
    let second = f32(c) * x.d.z + f32(d) * x.d.w;
    return s.x * first + s.z * second + s.y * half_sums.x + s.w * half_sums.y;
}

// Where a unit of a row of W and of x lies, and what their product counts.
struct Place {
    w: u32, // from the row of the first expert
    x: u32,
    share: f32,
}

fn place(wg: vec3<u32>, n_out: u32, unit: u32) -> Place {
    var at = Place(unit, wg.y * 4u * p.n_units + unit, 1.0);
    // unroll i EACH
    let token = wg.y / p.n_used;
    let expert = u32(routes[p.routes_at + token * p.n_used + wg.y]);
    at.w += expert * n_out * p.n_units;
    at.x = token * 4u * p.n_units + unit;
    // end
    // unroll i SUM
    let slot = unit / p.n_units;
    let route = p.routes_at + 2u * wg.y * p.n_used + slot;
    let rest = unit - slot * p.n_units;
    at.w = u32(routes[route]) * n_out * p.n_units + rest;
    at.x = (wg.y * p.n_used + slot) * 4u * p.n_units + rest;
    at.share = routes[route + p.n_used];
    // end
    return at;
}

fn run(wg: vec3<u32>, tid: u32, team: u32, lane: u32) {
    var which = 0u;
    if !GLU && MATRICES == 3u && wg.x >= p.first_wg.z {
        which = 2u;
    } else if !GLU && MATRICES >= 2u && wg.x >= p.first_wg.y {
        which = 1u;
    }
    let n_out = p.n_out[which];
    let group = wg.x - p.first_wg[which];
    let token = wg.y;
    // What the first lane needs at the end is on its way with the weights.
    // unroll i GAIN
    let gain_at = 2u * (p.row_at / 8u + group);
    var gain_low = vec4(0.0);
    var gain_high = vec4(0.0);
    if tid == 0u {
        gain_low = gain[gain_at];
        gain_high = gain[gain_at + 1u];
    }
    // end
    // unroll i TAPS
    // A tap of a convolution, from the last back, and the row that it is for, of which the newest is made here.
    var tap_low_#i = vec4(0.0);
    var tap_high_#i = vec4(0.0);
    var old_low_#i = vec4(0.0);
    var old_high_#i = vec4(0.0);
    if tid == 0u {
        let tap = (TAPS - 1u - #iu) * (n_out / 4u) + 2u * group;
        tap_low_#i = taps[tap];
        tap_high_#i = taps[tap + 1u];
        if #iu > 0u {
            let old = (p.ring_row + p.ring - #iu) % p.ring * (n_out / 4u) + 2u * group;
            old_low_#i = memory[old];
            old_high_#i = memory[old + 1u];
        }
    }
    // end
    // unroll i RESIDUAL
    let residual_at = p.residual_at + token * p.stride[which] + p.row_at / 4u + 2u * group;
    var residual_low = vec4(0.0);
    var residual_high = vec4(0.0);
    if tid == 0u {
        residual_low = residual[residual_at];
        residual_high = residual[residual_at + 1u];
    }
    // end
    // unroll r ROWS
    let row_#r = min(8u * group + team / SPLIT * ROWS + #ru, n_out - 1u) * p.n_units;
    var sum_#r = 0.0;
    var up_#r = 0.0;
    var third_#r = 0.0;
    // end
    var square = 0.0;
    var n_all = p.n_units;
    // unroll i SUM
    n_all *= p.n_used;
    // end
    for (var unit = team % SPLIT * TEAM + lane; unit < n_all; unit += SPLIT * TEAM * DEPTH) {
        // unroll d DEPTH
        // Lanes without work read what others read.
        let at_#d = place(wg, n_out, min(unit + #du * SPLIT * TEAM, n_all - 1u));
        // unroll r ROWS
        let w_#d_#r = load(which, row_#r + at_#d.w);
        // unroll i GLU
        let w_up_#d_#r = load_1(row_#r + at_#d.w);
        // end
        // unroll i CONV
        let w_up_#d_#r = load_0(row_#r + n_out * p.n_units + at_#d.w);
        let w_third_#d_#r = load_0(row_#r + 2u * n_out * p.n_units + at_#d.w);
        // end
        // end
        let x_#d = x_of(at_#d.x);
        // end
        // unroll d DEPTH
        if #du == 0u || unit + #du * SPLIT * TEAM < n_all {
            let half_sums = halves(x_#d);
            // unroll r ROWS
            sum_#r += at_#d.share * dot_unit(w_#d_#r, x_#d, half_sums);
            // unroll i PAIRS
            up_#r += dot_unit(w_up_#d_#r, x_#d, half_sums);
            // end
            // unroll i CONV
            third_#r += dot_unit(w_third_#d_#r, x_#d, half_sums);
            // end
            // end
            if NORM {
                square += dot(bitcast<vec4<f32>>(x[at_#d.x + 3u * p.n_units]), vec4(1.0));
            }
        }
        // end
    }
    // unroll r ROWS
    sum_#r = team_sum(sum_#r, tid);
    if GLU || CONV {
        up_#r = team_sum(up_#r, tid);
    }
    if CONV {
        third_#r = team_sum(third_#r, tid);
    }
    if lane == 0u {
        sums[team * ROWS + #ru] = sum_#r;
        if GLU || CONV {
            sums_up[team * ROWS + #ru] = up_#r;
        }
        if CONV {
            sums_third[team * ROWS + #ru] = third_#r;
        }
    }
    // end
    if NORM {
        square = team_sum(square, tid);
        if lane == 0u {
            squares[team] = square;
        }
    }
    workgroupBarrier();
    if tid > 0u {
        return;
    }
    var scale = 1.0;
    if NORM {
        var total = 0.0;
        for (var i = 0u; i < SPLIT; i++) {
            total += squares[i];
        }
        scale = 1.0 / sqrt(total / f32(32u * p.n_units) + p.eps);
    }
    // Each by itself, not in an array, which might live in memory.
    // unroll e EIGHT
    var y_#e = 0.0;
    var gate_#e = 0.0;
    var third_of_#e = 0.0;
    for (var j = 0u; j < SPLIT; j++) {
        y_#e += sums[#eu * SPLIT + j];
        if GLU || CONV {
            gate_#e += sums_up[#eu * SPLIT + j];
        }
        if CONV {
            third_of_#e += sums_third[#eu * SPLIT + j];
        }
    }
    y_#e *= scale;
    gate_#e *= scale;
    if GLU {
        y_#e = activation(y_#e) * gate_#e;
    }
    if CONV {
        y_#e *= third_of_#e * scale;
    }
    // end
    var low = vec4(y_0, y_1, y_2, y_3);
    var high = vec4(y_4, y_5, y_6, y_7);
    // unroll i CONV
    let newest = p.ring_row * (n_out / 4u) + 2u * group;
    memory[newest] = low;
    memory[newest + 1u] = high;
    low *= tap_low_0;
    high *= tap_high_0;
    // unroll b TAPS
    if #bu > 0u {
        low = fma(tap_low_#b, old_low_#b, low);
        high = fma(tap_high_#b, old_high_#b, high);
    }
    // end
    low *= vec4(gate_0, gate_1, gate_2, gate_3);
    high *= vec4(gate_4, gate_5, gate_6, gate_7);
    // end
    // unroll i BIAS
    low += bias(which, p.row_at / 4u + 2u * group);
    high += bias(which, p.row_at / 4u + 2u * group + 1u);
    // end
    // unroll i RESIDUAL
    low += residual_low;
    high += residual_high;
    // end
    // unroll i OUT
    let at = p.out_at + token * p.stride[which] + p.row_at / 4u + 2u * group;
    put(which, at, low);
    put(which, at + 1u, high);
    // end
    // unroll i PACK
    let next = token * 4u * p.next_units;
    let group_of_y = p.row_at / 8u + group;
    if SQUARES {
        pack_squares(next, p.next_units, group_of_y, dot(low, low) + dot(high, high));
    }
    // unroll i GAIN
    low *= gain_low;
    high *= gain_high;
    // end
    pack(next, p.next_units, group_of_y, low, high);
    // end
}
