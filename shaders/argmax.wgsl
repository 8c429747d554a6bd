// The index of the largest of n logits, the first of equals: out[0]. One workgroup; lanes have every 256th.

struct Params {
    n: u32,
    at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<u32>;

var<workgroup> best: array<f32, 256>;
var<workgroup> which: array<u32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) tid: u32) {
    var mine = -3.4e38;
    var index = tid;
    for (var i = tid; i < p.n; i += 256u) {
        let x = logits[p.at + i];
        if x > mine {
            mine = x;
            index = i;
        }
    }
    best[tid] = mine;
    which[tid] = index;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step /= 2u) {
        if tid < step {
            let other = best[tid + step];
            if other > best[tid] || (other == best[tid] && which[tid + step] < which[tid]) {
                best[tid] = other;
                which[tid] = which[tid + step];
            }
        }
        workgroupBarrier();
    }
    if tid == 0u {
        out[0] = which[0];
    }
}
