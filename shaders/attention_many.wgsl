// Attention of many tokens at positions start..: q and out (n_tokens, n_heads, D), cache (n_positions, n_kv_heads, D); a
// query at position p sees keys in (p - window, p]. ENDS: it reads the first of them and the last, as many as sink, budget and
// per_cent say.
//
// A workgroup has a head and BQ queries, and streams over tiles of BK keys from the first that any of them sees, always a
// multiple of BK, so that a query's sums run in the same order whatever else is in the batch; tiles of which no query reads
// anything are left out. 8 lanes share a query: for scores lane i has every 8th key, for values every 8th vec4 of columns.
// Grid: (heads, queries / BQ).

struct Params {
    start: u32,
    n_tokens: u32,
    n_heads: u32,
    n_kv_heads: u32,
    window: u32, // 0: none
    q_at: u32, // vec4
    out_at: u32, // vec4
    scale: f32,
    sink: u32,
    budget: u32,
    per_cent: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;

const D4: u32 = D / 4u;
const WG: u32 = 8u * BQ;
// Columns of a lane.
const COLUMNS: u32 = (D4 + 7u) / 8u;
const LOWEST: f32 = -3.0e38;

// Rows of one more than D4, so that lanes do not meet in a bank.
var<workgroup> qs: array<vec4<f32>, BQ * (D4 + 1u)>;
var<workgroup> tile: array<vec4<f32>, BK * (D4 + 1u)>;
var<workgroup> weights: array<f32, BQ * BK>;
var<workgroup> parts: array<f32, WG>;

// The first of the last keys that a query reads, which sees keys from `first` on.
fn last_from(position: u32, first: u32) -> u32 {
    let end = position + 1u;
    let budget = max(p.budget, (end - first) * p.per_cent / 100u);
    let sink = clamp(p.sink, first, end);
    let n_last = budget - (sink - first);
    return max(max(end, n_last) - n_last, sink);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let h = wg.x;
    let kv_head = h * p.n_kv_heads / p.n_heads;
    let query0 = wg.y * BQ;
    for (var i = tid; i < BQ * D4; i += WG) {
        let token = min(query0 + i / D4, p.n_tokens - 1u);
        qs[i / D4 * (D4 + 1u) + i % D4] = q[p.q_at + (token * p.n_heads + h) * D4 + i % D4] * p.scale;
    }
    let mine = tid / 8u;
    let lane = tid % 8u;
    let position = p.start + query0 + mine;
    var first = 0u; // of this query
    var first_key = 0u; // of all
    if p.window > 0u {
        first = max(position + 1u, p.window) - p.window;
        first_key = max(p.start + query0 + 1u, p.window) - p.window;
    }
    var last = 0u; // the first of the last keys of this query
    var last_key = 0u; // of all
    if ENDS {
        last = last_from(position, first);
        last_key = last_from(p.start + query0, first_key);
    }
    let end = min(p.start + query0 + BQ, p.start + p.n_tokens);
    var acc: array<vec4<f32>, COLUMNS>;
    var most = LOWEST;
    var total = 0.0;
    for (var key0 = first_key / BK * BK; key0 < end; key0 += BK) {
        if ENDS && key0 >= p.sink && key0 + BK <= last_key {
            continue;
        }
        workgroupBarrier();
        for (var i = tid; i < BK * D4; i += WG) {
            let key = min(key0 + i / D4, end - 1u);
            tile[i / D4 * (D4 + 1u) + i % D4] = key4((key * p.n_kv_heads + kv_head) * D4 + i % D4);
        }
        workgroupBarrier();
        var s: array<f32, BK / 8u>;
        var m = LOWEST;
        for (var j = 0u; j < BK / 8u; j++) {
            let key = key0 + j * 8u + lane;
            s[j] = LOWEST;
            if key >= first && key <= position && (!ENDS || key < p.sink || key >= last) {
                var sum = vec4(0.0);
                for (var i = 0u; i < D4; i++) {
                    sum = fma(qs[mine * (D4 + 1u) + i], tile[(j * 8u + lane) * (D4 + 1u) + i], sum);
                }
                s[j] = (sum.x + sum.y) + (sum.z + sum.w);
            }
            m = max(m, s[j]);
        }
        parts[tid] = m;
        workgroupBarrier();
        m = most;
        for (var i = 0u; i < 8u; i++) {
            m = max(m, parts[mine * 8u + i]);
        }
        let shrink = exp(most - m);
        most = m;
        for (var j = 0u; j < BK / 8u; j++) {
            weights[mine * BK + j * 8u + lane] = select(0.0, exp(s[j] - m), s[j] > LOWEST);
        }
        workgroupBarrier();
        for (var i = tid; i < BK * D4; i += WG) {
            let key = min(key0 + i / D4, end - 1u);
            tile[i / D4 * (D4 + 1u) + i % D4] = value4((key * p.n_kv_heads + kv_head) * D4 + i % D4);
        }
        total *= shrink;
        for (var c = 0u; c < COLUMNS; c++) {
            acc[c] *= shrink;
        }
        workgroupBarrier();
        for (var j = 0u; j < BK; j++) {
            let w = weights[mine * BK + j];
            total += w;
            for (var c = 0u; c < COLUMNS; c++) {
                let at = min(c * 8u + lane, D4 - 1u);
                acc[c] = fma(vec4(w), tile[j * (D4 + 1u) + at], acc[c]);
            }
        }
    }
    if query0 + mine < p.n_tokens {
        for (var c = 0u; c < COLUMNS; c++) {
            if c * 8u + lane < D4 {
                out[p.out_at + ((query0 + mine) * p.n_heads + h) * D4 + c * 8u + lane] = acc[c] / total;
            }
        }
    }
}
