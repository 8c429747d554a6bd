// What happens to queries, keys and values between their projections and attention, a head at a time: norm over the head
// (NORM), rotary embedding (ROPE 1: pairs of halves, 2: of neighbours), and into the cache.
//
// q (n_tokens, n_heads, n), k and v (n_tokens, n_kv_heads, n); gains (n); angles (n_tokens, 2 * half): cosines, sines.
// Cache: (n_positions, n_kv_heads, n), from position start, of what KEYS and VALUES say, 0: floats, 1: half floats, 2:
// blocks of 32 of eight bits, see kv/keys_q8_0.wgsl. Lane i has the elements 2i, 2i + 1 and every 128th after.
// Grid: (heads of q, k, v in this order, tokens).

struct Params {
    n: u32,
    n_heads: u32, // 0: no queries
    n_kv_heads: u32, // 0: neither keys nor values
    half: u32,
    start: u32,
    q_at: u32,
    k_at: u32,
    v_at: u32,
    eps: f32,
    angles_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<f32>;
@group(0) @binding(2) var<storage, read> k: array<f32>;
@group(0) @binding(3) var<storage, read> v: array<f32>;
@group(0) @binding(4) var<storage, read> q_gain: array<f32>;
@group(0) @binding(5) var<storage, read> k_gain: array<f32>;
@group(0) @binding(6) var<storage, read> angles: array<f32>;
@group(0) @binding(7) var<storage, read_write> q_out: array<f32>;
@group(0) @binding(8) var<storage, read_write> keys: array<u32>;
@group(0) @binding(9) var<storage, read_write> values: array<u32>;

var<workgroup> head: array<f32, MAX_HEAD>;
var<workgroup> sums: array<f32, 64>;
// What becomes codes.
var<workgroup> blocks: array<f32, CODED>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let token = wg.y;
    // 0: a query, 1: a key, 2: a value.
    var kind = 0u;
    var h = wg.x;
    var in_at = p.q_at + (token * p.n_heads + h) * p.n;
    if h >= p.n_heads {
        h -= p.n_heads;
        kind = 1u + h / p.n_kv_heads;
        h %= p.n_kv_heads;
        in_at = select(p.k_at, p.v_at, kind == 2u) + (token * p.n_kv_heads + h) * p.n;
    }
    var sum = 0.0;
    for (var i = tid; i < p.n; i += 64u) {
        var e = 0.0;
        if kind == 0u {
            e = q[in_at + i];
        } else if kind == 1u {
            e = k[in_at + i];
        } else {
            e = v[in_at + i];
        }
        head[i] = e;
        sum += e * e;
    }
    sums[tid] = sum;
    workgroupBarrier();
    if NORM && kind < 2u {
        for (var step = 32u; step > 0u; step /= 2u) {
            if tid < step {
                sums[tid] += sums[tid + step];
            }
            workgroupBarrier();
        }
        let scale = 1.0 / sqrt(sums[0] / f32(p.n) + p.eps);
        for (var i = tid; i < p.n; i += 64u) {
            let g = select(k_gain[i], q_gain[i], kind == 0u);
            head[i] *= scale * g;
        }
        workgroupBarrier();
    }
    for (var i = 2u * tid; i < p.n; i += 128u) {
        let a = turned(i, token, kind);
        let b = turned(i + 1u, token, kind);
        let at = ((p.start + token) * p.n_kv_heads + h) * p.n + i;
        if kind == 0u {
            q_out[(token * p.n_heads + h) * p.n + i] = a;
            q_out[(token * p.n_heads + h) * p.n + i + 1u] = b;
        } else if kind == 1u {
            if KEYS == 2u {
                blocks[i] = a;
                blocks[i + 1u] = b;
            } else if KEYS == 1u {
                keys[at / 2u] = pack2x16float(vec2(a, b));
            } else {
                keys[at] = bitcast<u32>(a);
                keys[at + 1u] = bitcast<u32>(b);
            }
        } else {
            if VALUES == 2u {
                blocks[i] = a;
                blocks[i + 1u] = b;
            } else if VALUES == 1u {
                values[at / 2u] = pack2x16float(vec2(a, b));
            } else {
                values[at] = bitcast<u32>(a);
                values[at + 1u] = bitcast<u32>(b);
            }
        }
    }
    if KEYS == 2u || VALUES == 2u {
        workgroupBarrier();
        let is_coded = (kind == 1u && KEYS == 2u) || (kind == 2u && VALUES == 2u);
        let row = ((p.start + token) * p.n_kv_heads + h) * (p.n / 32u) * 9u;
        for (var i = tid; is_coded && i < p.n / 4u; i += 64u) {
            let word = coded(i);
            let at = row + i / 8u * 9u;
            if kind == 1u {
                keys[at + 1u + i % 8u] = word.y;
                if i % 8u == 0u {
                    keys[at] = word.x;
                }
            } else {
                values[at + 1u + i % 8u] = word.y;
                if i % 8u == 0u {
                    values[at] = word.x;
                }
            }
        }
    }
}

// Word i of a head that becomes codes: four codes, with the scale of their block.
fn coded(i: u32) -> vec2<u32> {
    var most = 0.0;
    for (var j = 0u; j < 32u; j++) {
        most = max(most, abs(blocks[i / 8u * 32u + j]));
    }
    let scale = most / 127.0;
    let inverse = select(0.0, 1.0 / scale, scale > 0.0);
    let x = inverse * vec4(blocks[4u * i], blocks[4u * i + 1u], blocks[4u * i + 2u], blocks[4u * i + 3u]);
    // Halves away from zero, as files have it.
    let codes = vec4<i32>(sign(x) * floor(abs(x) + 0.5));
    return vec2(pack2x16float(vec2(scale, 0.0)), pack4xI8(codes));
}

// Element i of the head, turned.
fn turned(i: u32, token: u32, kind: u32) -> f32 {
    let x = head[i];
    if ROPE == 0u || kind == 2u || i >= 2u * p.half {
        return x;
    }
    let at = p.angles_at + token * 2u * p.half;
    if ROPE == 1u {
        let j = i % p.half;
        let c = angles[at + j];
        let s = angles[at + p.half + j];
        if i < p.half {
            return x * c - head[i + p.half] * s;
        }
        return head[j] * s + x * c;
    }
    let c = angles[at + i / 2u];
    let s = angles[at + p.half + i / 2u];
    if i % 2u == 0u {
        return x * c - head[i + 1u] * s;
    }
    return head[i - 1u] * s + x * c;
}
