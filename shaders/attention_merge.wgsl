// The parts of attention_one.wgsl, (n_heads, n_splits, D + 2), to out, (n_heads, D). Lanes have elements. Grid: (heads).

struct Params {
    n: u32,
    n_splits: u32,
    out_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> part: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

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
    }
}
