// The largest of every 4096 numbers, of equals the first: x (n), floats or (PAIRS) pairs of a key and where it stood ->
// out (groups), such pairs. Keys are in the order of the floats; what is no number comes before all, so that it is seen.
// Lane i has every 256th number from the i-th of its group.

struct Params {
    n: u32,
    at: u32, // the first of x, in words
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec2<u32>>;

var<workgroup> best: array<vec2<u32>, 256>;

fn key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0xffffffffu;
    }
    // Both zeros are the same number.
    let b = select(bits, 0u, bits == 0x80000000u);
    return select(b | 0x80000000u, ~b, (b >> 31u) == 1u);
}

fn better(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y < b.y);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    var mine = vec2(0u, 0xffffffffu);
    for (var j = 0u; j < 16u; j++) {
        let i = wg.x * 4096u + j * 256u + tid;
        if i < p.n {
            var other = vec2(0u);
            if PAIRS {
                other = vec2(x[p.at + 2u * i], x[p.at + 2u * i + 1u]);
            } else {
                other = vec2(key(x[p.at + i]), i);
            }
            if better(other, mine) {
                mine = other;
            }
        }
    }
    best[tid] = mine;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step /= 2u) {
        if tid < step && better(best[tid + step], best[tid]) {
            best[tid] = best[tid + step];
        }
        workgroupBarrier();
    }
    if tid == 0u {
        out[wg.x] = best[0];
    }
}
