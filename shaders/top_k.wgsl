// The K largest of every 1024 numbers, the largest first, of equals the first: x (n), floats or (PAIRS) pairs of a key and
// where it stood -> out (groups, K), such pairs. Keys are in the order of the floats; what is no number comes before all,
// so that it is seen. A group sorts its numbers as a bitonic network does; lane i has two comparisons of each step.

struct Params {
    n: u32,
    at: u32, // the first of x, in words
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec2<u32>>;

const N: u32 = 1024u;

var<workgroup> pairs: array<vec2<u32>, N>;

fn key(bits: u32) -> u32 {
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 0xffffffffu;
    }
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

fn better(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y < b.y);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    for (var j = tid; j < N; j += 256u) {
        let i = wg.x * N + j;
        var pair = vec2(0u, 0xffffffffu);
        if i < p.n {
            if PAIRS {
                pair = vec2(x[p.at + 2u * i], x[p.at + 2u * i + 1u]);
            } else {
                pair = vec2(key(x[p.at + i]), i);
            }
        }
        pairs[j] = pair;
    }
    workgroupBarrier();
    for (var size = 2u; size <= N; size *= 2u) {
        for (var step = size / 2u; step > 0u; step /= 2u) {
            for (var c = tid; c < N / 2u; c += 256u) {
                let a = c / step * 2u * step + c % step;
                let b = a + step;
                let falls = (a & size) == 0u;
                let x_a = pairs[a];
                let x_b = pairs[b];
                if better(x_b, x_a) == falls {
                    pairs[a] = x_b;
                    pairs[b] = x_a;
                }
            }
            workgroupBarrier();
        }
    }
    for (var j = tid; j < K; j += 256u) {
        out[wg.x * K + j] = pairs[j];
    }
}
