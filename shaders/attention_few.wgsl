// As attention_one.wgsl, for a token that is decoded and reads few keys, so that more workgroups have some: a tile has 32, and
// four lanes share a key, each with a quarter of it.

const PARTS: u32 = 4u;
const TILE: u32 = 128u / PARTS;
// Vectors of a part of a key.
const PART: u32 = D4 / PARTS;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let split = wg.x;
    let head0 = wg.y * GROUP;
    let kv_head = wg.y / p.per_kv_head;
    let token_at = wg.z * p.n_kv_heads * p.per_kv_head * GROUP * D4;
    let row = wg.z * p.n_kv_heads + kv_head;
    let n = n_read(row);
    for (var i = tid; i < GROUP * D4; i += 128u) {
        qs[i] = q[p.q_at + token_at + head0 * D4 + i] * p.scale;
    }
    workgroupBarrier();
    let part_of_key = tid / TILE * PART;
    let column = tid % D4;
    let lane = tid / D4;
    // unroll g GROUP
    var acc_#g = vec4(0.0);
    var total_#g = 0.0;
    var most_#g = LOWEST;
    // end
    for (var t = 0u; t < p.tiles; t++) {
        let tile = (split * p.tiles + t) * TILE;
        if tile >= n {
            break;
        }
        // unroll g GROUP
        var sum_#g = vec4(0.0);
        // end
        if tile + tid % TILE < n {
            let at = (place(row, tile + tid % TILE) * p.n_kv_heads + kv_head) * D4 + part_of_key;
            for (var i = 0u; i < PART; i++) {
                let k = key4(at + i);
                // unroll g GROUP
                sum_#g = fma(k, qs[#gu * D4 + part_of_key + i], sum_#g);
                // end
            }
        }
        // Parts of scores; whoever looks for the largest puts the scores in the place of the first.
        // unroll g GROUP
        weights[#gu * 128u + tid] = (sum_#g.x + sum_#g.y) + (sum_#g.z + sum_#g.w);
        // end
        workgroupBarrier();
        if tid < GROUP * 8u {
            let head = tid / 8u * 128u;
            var m = LOWEST;
            for (var i = tid % 8u * (TILE / 8u); i < (tid % 8u + 1u) * (TILE / 8u); i++) {
                let low = weights[head + i] + weights[head + TILE + i];
                let high = weights[head + 2u * TILE + i] + weights[head + 3u * TILE + i];
                let s = select(LOWEST, low + high, tile + i < n);
                weights[head + i] = s;
                m = max(m, s);
            }
            maxima[tid] = m;
        }
        workgroupBarrier();
        // unroll g GROUP
        {
            var m = most_#g;
            for (var i = 0u; i < 8u; i++) {
                m = max(m, maxima[#gu * 8u + i]);
            }
            let shrink = exp(most_#g - m);
            acc_#g *= shrink;
            total_#g *= shrink;
            most_#g = m;
            if tid < TILE {
                weights[#gu * 128u + tid] = select(0.0, exp(weights[#gu * 128u + tid] - m), tile + tid < n);
            }
        }
        // end
        workgroupBarrier();
        if lane < LANES {
            let n_tile = min(TILE, n - tile);
            for (var i = lane; i < n_tile; i += LANES) {
                let v = value4((place_again(row, tile + i) * p.n_kv_heads + kv_head) * D4 + column);
                // unroll g GROUP
                {
                    let w = weights[#gu * 128u + i];
                    acc_#g = fma(vec4(w), v, acc_#g);
                    total_#g += w;
                }
                // end
            }
        }
        workgroupBarrier();
    }
    // unroll g GROUP
    columns[tid] = acc_#g;
    sums[tid] = total_#g;
    workgroupBarrier();
    if tid < D4 {
        var sum = vec4(0.0);
        var weight = 0.0;
        for (var i = 0u; i < LANES; i++) {
            sum += columns[i * D4 + tid];
            weight += sums[i * D4 + tid];
        }
        let head = head0 + #gu;
        if p.n_splits == 1u {
            out[p.out_at + token_at + head * D4 + tid] = sum / weight;
            results[tid] = sum / weight;
        } else {
            let at = (head * p.n_splits + split) * (D + 2u);
            part[at + 4u * tid] = sum.x;
            part[at + 4u * tid + 1u] = sum.y;
            part[at + 4u * tid + 2u] = sum.z;
            part[at + 4u * tid + 3u] = sum.w;
            if tid == 0u {
                part[at + D] = most_#g;
                part[at + D + 1u] = weight;
            }
        }
    }
    workgroupBarrier();
    // unroll i PACK
    if p.n_splits == 1u && tid < D / 8u {
        let group = (head0 + #gu) * D / 8u + tid;
        pack(p.packed_at, p.n_units, group, results[2u * tid], results[2u * tid + 1u]);
    }
    // end
    // end
}
