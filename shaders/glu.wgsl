// out = activation(gate) * up, n elements. Grid: (elements / 256).

struct Params {
    n: u32,
    gate_at: u32,
    up_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read> up: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let i = (wg.y * 65535u + wg.x) * 256u + tid;
    if i < p.n {
        out[i] = activation(gate[p.gate_at + i]) * up[p.up_at + i];
    }
}
