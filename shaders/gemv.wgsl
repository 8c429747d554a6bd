// y = W x, for one to three matrices W, (n_out, n_in), that share x; a token at a time.
//
// Around it, where the constants say so: x is normed first (NORM: x * gain / sqrt(mean(x^2) + eps)), a bias and a
// residual are added, two matrices become activation(W0 x) * (W1 x) (GLU), rows are those of the experts that a
// router named (EXPERTS 1: a slot of the route each; 2: all slots, weighted and summed).
//
// x (n_tokens, n_in), gain (n_in), residual and out_m (n_tokens, n_out_m), bias_m (n_out_m),
// routes (n_tokens, 2 * n_slots): experts, then their weights.
//
// A team of lanes has ROWS rows: lane i reads the units i, i + TEAM, ... of each, a unit being 32 weights, DEPTH of them
// ahead: the first are on their way while the workgroup prepares x in its memory, SEG units at a time, which are a
// multiple of DEPTH * TEAM where they are not all. It has n_blocks of rows one after the other. Grid: (rows, tokens), with EXPERTS 1
// (rows, slots, tokens).

struct Params {
    n_units: u32,
    x_at: u32, // of the first token, in vec4
    out_at: u32, // of the first token, and of the first row of a part of a matrix, or in it of an expert
    residual_at: u32,
    n_out: vec3<u32>, // rows of the matrices that are there
    n_slots: u32,
    stride: vec3<u32>, // outputs of a token
    eps: f32,
    first_wg: vec3<u32>,
    routes_at: u32,
    x_row: u32, // vec4 of a row of x: whole units but for floats
    n_blocks: u32, // of rows that a workgroup has one after the other
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> gain: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> residual: array<f32>;
@group(0) @binding(4) var<storage, read> routes: array<f32>;

var<workgroup> shared_sums: array<f32, WG>;

fn run(wg: vec3<u32>, tid: u32, team: u32, lane: u32) {
    var which = 0u;
    var token = wg.y;
    var slot = 0u;
    if GLU {
        if EXPERTS == 1u {
            slot = wg.y;
            token = wg.z;
        }
    } else if MATRICES == 3u && wg.x >= p.first_wg.z {
        which = 2u;
    } else if MATRICES >= 2u && wg.x >= p.first_wg.y {
        which = 1u;
    }
    let n_out = p.n_out[which];
    var squares = 0.0;
    var scale = 1.0;
    var n_loops = 1u;
    if EXPERTS == 2u {
        n_loops = p.n_slots;
    }
    for (var b = 0u; b < p.n_blocks; b++) {
        let row = (((wg.x - p.first_wg[which]) * p.n_blocks + b) * TEAMS + team) * ROWS;
        var total = array<f32, ROWS>();
        var total_up = array<f32, ROWS>();
        for (var j = 0u; j < n_loops; j++) {
            // The rows before this expert's, and its weight.
            var before = 0u;
            var share = 1.0;
            var x_at = p.x_at + token * p.x_row;
            if EXPERTS != 0u {
                let at = p.routes_at + token * 2u * p.n_slots + slot + j;
                before = u32(routes[at]) * n_out;
                if EXPERTS == 2u {
                    share = routes[at + p.n_slots];
                    x_at = p.x_at + (token * p.n_slots + j) * p.x_row;
                }
            }
            var unit = lane;
            var w: array<Unit, DEPTH * ROWS>;
            var w_up: array<Unit, DEPTH * ROWS>;
            for (var d = 0u; d < DEPTH; d++) {
                var first = tile(which, before, row, unit + d * TEAM);
                for (var r = 0u; r < ROWS; r++) {
                    w[d * ROWS + r] = first[r];
                }
                if GLU {
                    var first_up = tile(1u, before, row, unit + d * TEAM);
                    for (var r = 0u; r < ROWS; r++) {
                        w_up[d * ROWS + r] = first_up[r];
                    }
                }
            }
            // Zeros that are written: what a loop declares is not always made anew.
            var acc = array<f32, ROWS>();
            var acc_up = array<f32, ROWS>();
            for (var seg_at = 0u; seg_at < p.n_units; seg_at += SEG) {
                let end = min(seg_at + SEG, p.n_units);
                // Once for all blocks of rows, where one segment holds it.
                if b == 0u || EXPERTS == 2u || p.n_units > SEG {
                    if b + j + seg_at > 0u {
                        workgroupBarrier();
                    }
                    let more = prepare(x_at, seg_at, end, tid);
                    squares += select(0.0, more, b == 0u);
                    workgroupBarrier();
                }
                for (; unit < end; unit += DEPTH * TEAM) {
                    for (var d = 0u; d < DEPTH; d++) {
                        let u = unit + d * TEAM;
                        if u >= end {
                            break;
                        }
                        let xs = x_of(u - seg_at);
                        for (var r = 0u; r < ROWS; r++) {
                            acc[r] += dot_unit(w[d * ROWS + r], xs);
                        }
                        if GLU {
                            for (var r = 0u; r < ROWS; r++) {
                                acc_up[r] += dot_unit(w_up[d * ROWS + r], xs);
                            }
                        }
                        let next = u + DEPTH * TEAM;
                        if next < p.n_units {
                            var more = tile(which, before, row, next);
                            for (var r = 0u; r < ROWS; r++) {
                                w[d * ROWS + r] = more[r];
                            }
                            if GLU {
                                var more_up = tile(1u, before, row, next);
                                for (var r = 0u; r < ROWS; r++) {
                                    w_up[d * ROWS + r] = more_up[r];
                                }
                            }
                        }
                    }
                }
            }
            for (var r = 0u; r < ROWS; r++) {
                total[r] += share * acc[r];
                total_up[r] += share * acc_up[r];
            }
        }
        if NORM && b == 0u {
            let mean = group_sum(squares, tid, team, lane) / f32(p.x_row * 4u);
            scale = 1.0 / sqrt(mean + p.eps);
        }
        var at = p.out_at + token * p.stride[which];
        if EXPERTS == 1u {
            at = p.out_at + (token * p.n_slots + slot) * p.stride[which];
        }
        for (var r = 0u; r < ROWS; r++) {
            var y = team_sum(total[r], tid) * scale;
            if GLU {
                let up = team_sum(total_up[r], tid) * scale;
                y = activation(y) * up;
            }
            if lane == 0u && row + r < n_out {
                put(which, at, token, row + r, y);
            }
        }
    }
}
