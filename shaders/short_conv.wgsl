// Gated short convolution: bcx (n_tokens, 3 n): rows b, c, x; u = b * x, y[t] = sum_j taps[j] * u[t - L + 1 + j], out =
// c * y, (n_tokens, n). taps (L, n), oldest first. The memory is a ring of rows of u, (RING, n); the newest before this
// call is number count - 1, in row (count - 1) % RING.
//
// A lane has a channel of a token. STORE: the same dispatch appends the token; else PUSH, a dispatch of its own, appends
// the newest of the batch, after the first has read. PACK: out is packed too. Grid: (channels / 64, tokens).

struct Params {
    n: u32,
    n_taps: u32,
    n_tokens: u32,
    ring: u32,
    count: u32, // modulo ring
    bcx_at: u32,
    first: u32, // token, for PUSH
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> bcx: array<f32>;
@group(0) @binding(2) var<storage, read> taps: array<f32>;
@group(0) @binding(3) var<storage, read_write> memory: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;
// unroll i PACK
@group(0) @binding(5) var<storage, read_write> packed: array<u32>;
// end

var<workgroup> results: array<f32, 64>;

fn u_of(token: u32, channel: u32) -> f32 {
    let at = p.bcx_at + token * 3u * p.n + channel;
    return bcx[at] * bcx[at + 2u * p.n];
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let channel = wg.x * 64u + tid;
    let token = p.first + wg.y;
    let there = channel < p.n;
    let row = (p.count + token) % p.ring;
    if PUSH {
        if there {
            memory[row * p.n + channel] = u_of(token, channel);
        }
        return;
    }
    var y = 0.0;
    if there {
        for (var j = 0u; j < p.n_taps; j++) {
            let back = p.n_taps - 1u - j;
            var u: f32;
            if back <= token {
                u = u_of(token - back, channel);
            } else {
                u = memory[((row + p.ring - back) % p.ring) * p.n + channel];
            }
            y = fma(taps[j * p.n + channel], u, y);
        }
        y *= bcx[p.bcx_at + token * 3u * p.n + p.n + channel];
        out[token * p.n + channel] = y;
        if STORE {
            memory[row * p.n + channel] = u_of(token, channel);
        }
    }
    // unroll i PACK
    results[tid] = y;
    workgroupBarrier();
    let group = wg.x * 8u + tid;
    if tid < 8u && 8u * group < p.n {
        let at = 8u * tid;
        let low = vec4(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
        let high = vec4(results[at + 4u], results[at + 5u], results[at + 6u], results[at + 7u]);
        pack(token * p.n / 8u, p.n / 32u, group, low, high);
    }
    // end
}
