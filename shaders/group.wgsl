// The pairs (token, slot) of routes (n_tokens, 2 n_used: experts, then weights) by expert: pair p is slot p % n_used of token
// p / n_used. groups is n_tiles tiles of up to `tile` pairs of one expert each, as (expert, first place, pairs), of which the last
// may be empty; then, place by place, the pairs: those of expert 0 first, of an expert the smallest first.
//
// A workgroup has an expert. It counts those of all experts, which says where its own begin; then each lane places the
// pairs of its run, behind those that the lanes before it will place: what is written does not depend on who is first.
// Grid: (experts).

struct Params {
    n_pairs: u32,
    n_used: u32,
    routes_at: u32,
    tile: u32,
    n_tiles: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> routes: array<f32>;
@group(0) @binding(2) var<storage, read_write> groups: array<u32>;

var<workgroup> counts: array<atomic<u32>, N_EXPERTS>;
// Pairs of this expert in the runs up to each lane's.
var<workgroup> mine: array<u32, 256>;

fn expert(pair: u32) -> u32 {
    return u32(routes[p.routes_at + pair / p.n_used * 2u * p.n_used + pair % p.n_used]);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    for (var e = tid; e < N_EXPERTS; e += 256u) {
        atomicStore(&counts[e], 0u);
    }
    workgroupBarrier();
    let run = (p.n_pairs + 255u) / 256u;
    let begin = min(tid * run, p.n_pairs);
    let end = min(begin + run, p.n_pairs);
    var n = 0u;
    for (var pair = begin; pair < end; pair++) {
        let e = expert(pair);
        atomicAdd(&counts[e], 1u);
        n += select(0u, 1u, e == wg.x);
    }
    mine[tid] = n;
    workgroupBarrier();
    for (var step = 1u; step < 256u; step *= 2u) {
        var before = 0u;
        if tid >= step {
            before = mine[tid - step];
        }
        workgroupBarrier();
        mine[tid] += before;
        workgroupBarrier();
    }
    var first = 0u;
    var tile = 0u;
    for (var e = 0u; e < wg.x; e++) {
        let count = atomicLoad(&counts[e]);
        first += count;
        tile += (count + p.tile - 1u) / p.tile;
    }
    var at = 3u * p.n_tiles + first + mine[tid] - n;
    for (var pair = begin; pair < end; pair++) {
        if expert(pair) == wg.x {
            groups[at] = pair;
            at++;
        }
    }
    let count = mine[255];
    let n_mine = (count + p.tile - 1u) / p.tile;
    for (var t = tid; t < n_mine; t += 256u) {
        put(tile + t, wg.x, first + t * p.tile, min(p.tile, count - t * p.tile));
    }
    if wg.x == N_EXPERTS - 1u {
        for (var t = tile + n_mine + tid; t < p.n_tiles; t += 256u) {
            put(t, 0u, 0u, 0u);
        }
    }
}

fn put(tile: u32, expert: u32, first: u32, n: u32) {
    groups[3u * tile] = expert;
    groups[3u * tile + 1u] = first;
    groups[3u * tile + 2u] = n;
}
