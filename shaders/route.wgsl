// The experts of a token: of logits z (n_tokens, n_experts) the n_used with the largest z, or, with a bias, the
// largest sigmoid(z) + bias or z + bias; of equals the first. Their weights are score / (sum of scores + sum_eps). routes (n_tokens, 2 n_used): experts,
// best first, then weights. Lanes have every 64th expert; one after the other is taken. Grid: (tokens).

struct Params {
    n_experts: u32,
    n_used: u32,
    sum_eps: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read_write> routes: array<f32>;

var<workgroup> best: array<f32, 64>;
var<workgroup> which: array<u32, 64>;
var<workgroup> taken: array<u32, 64>; // MAX_USED

const LOWEST: f32 = -3.4e38;

fn score(logit: f32, largest: f32) -> f32 {
    if SIGMOID {
        return 1.0 / (1.0 + exp(-logit));
    }
    return exp(logit - largest);
}

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let at = wg.x * p.n_experts;
    var largest = LOWEST;
    for (var e = 0u; e < p.n_experts; e++) {
        largest = max(largest, z[at + e]);
    }
    for (var j = 0u; j < p.n_used; j++) {
        var mine = LOWEST;
        var expert = 0xffffffffu;
        for (var e = tid; e < p.n_experts; e += 64u) {
            var key = z[at + e];
            if BIAS && SIGMOID {
                key = score(key, largest);
            }
            if BIAS {
                key += bias[e];
            }
            var free = true;
            for (var i = 0u; i < j; i++) {
                free = free && taken[i] != e;
            }
            if free && (expert == 0xffffffffu || key > mine) {
                mine = key;
                expert = e;
            }
        }
        best[tid] = mine;
        which[tid] = expert;
        workgroupBarrier();
        for (var step = 32u; step > 0u; step /= 2u) {
            if tid < step {
                let other = which[tid + step];
                let better = best[tid + step] > best[tid]
                    || (best[tid + step] == best[tid] && other < which[tid]);
                if other != 0xffffffffu && (which[tid] == 0xffffffffu || better) {
                    best[tid] = best[tid + step];
                    which[tid] = other;
                }
            }
            workgroupBarrier();
        }
        if tid == 0u {
            taken[j] = which[0];
        }
        workgroupBarrier();
    }
    if tid == 0u {
        var sum = p.sum_eps;
        for (var j = 0u; j < p.n_used; j++) {
            sum += score(z[at + taken[j]], largest);
        }
        for (var j = 0u; j < p.n_used; j++) {
            let out = wg.x * 2u * p.n_used + j;
            routes[out] = f32(taken[j]);
            routes[out + p.n_used] = score(z[at + taken[j]], largest) / sum;
        }
    }
}
