// What the experts of a token add up to: out = sum_j weight_j y_j over its slots j, in their order. y (n_tokens, n_used, n),
// routes (n_tokens, 2 n_used): experts, then their weights; out (n_tokens, n). A lane has four outputs. Grid: (n / 256, tokens).

struct Params {
    n: u32, // vec4
    n_used: u32,
    routes_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> routes: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = wg.x * 64u + tid;
    if i >= p.n {
        return;
    }
    let weights = p.routes_at + (2u * wg.y + 1u) * p.n_used;
    var sum = vec4(0.0);
    for (var j = 0u; j < p.n_used; j++) {
        sum = fma(vec4(routes[weights + j]), y[(wg.y * p.n_used + j) * p.n + i], sum);
    }
    out[wg.y * p.n + i] = sum;
}
