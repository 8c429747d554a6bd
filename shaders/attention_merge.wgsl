// The parts of attention_one.wgsl, (n_heads, n_splits, D + 2), to out, (n_heads, D). Lanes have elements.
// PACK: out is packed too. Grid: (heads).

struct Params {
    n: u32,
    n_splits: u32,
    out_at: u32,
    packed_at: u32, // vec4
    n_units: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> part: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;
// unroll i PACK
@group(0) @binding(3) var<storage, read_write> packed: array<u32>;

var<workgroup> results: array<f32, 256>;
// end

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = wg.x * p.n_splits * (p.n + 2u);
    var most = -3.0e38;
    for (var s = 0u; s < p.n_splits; s++) {
        most = max(most, part[at + s * (p.n + 2u) + p.n]);
    }
    for (var i = tid; i < p.n; i += 64u) {
        var sum = 0.0;
        var weight = 0.0;
        for (var s = 0u; s < p.n_splits; s++) {
            let place = at + s * (p.n + 2u);
            let w = exp(part[place + p.n] - most);
            sum += w * part[place + i];
            weight += w * part[place + p.n + 1u];
        }
        out[p.out_at + wg.x * p.n + i] = sum / weight;
        // unroll i PACK
        results[i] = sum / weight;
        // end
    }
    // unroll i PACK
    workgroupBarrier();
    if tid < p.n / 8u {
        let at = 8u * tid;
        let low = vec4(results[at], results[at + 1u], results[at + 2u], results[at + 3u]);
        let high = vec4(results[at + 4u], results[at + 5u], results[at + 6u], results[at + 7u]);
        pack(p.packed_at, p.n_units, wg.x * p.n / 8u + tid, low, high);
    }
    // end
}
