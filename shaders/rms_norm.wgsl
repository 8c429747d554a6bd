// y = x / sqrt(mean(x^2) + eps) * gain, + residual: runs of n elements, x, residual and y (n_runs, n), gain (n).
// A workgroup has a run; lanes have every 128th element. Grid: (runs).

struct Params {
    n: u32,
    x_at: u32,
    residual_at: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> gain: array<f32>;
@group(0) @binding(3) var<storage, read> residual: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

var<workgroup> sums: array<f32, 128>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = wg.x * p.n;
    var sum = 0.0;
    for (var i = tid; i < p.n; i += 128u) {
        let v = x[p.x_at + at + i];
        sum += v * v;
    }
    sums[tid] = sum;
    workgroupBarrier();
    for (var step = 64u; step > 0u; step /= 2u) {
        if tid < step {
            sums[tid] += sums[tid + step];
        }
        workgroupBarrier();
    }
    let scale = 1.0 / sqrt(sums[0] / f32(p.n) + p.eps);
    for (var i = tid; i < p.n; i += 128u) {
        var y = x[p.x_at + at + i] * scale * gain[i];
        if RESIDUAL {
            y += residual[p.residual_at + at + i];
        }
        out[at + i] = y;
    }
}
