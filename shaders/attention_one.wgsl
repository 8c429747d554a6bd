// Attention of one token: softmax(scale q k^T) v over the positions that kv/all.wgsl, ends.wgsl or list.wgsl has for it, for
// GROUP query heads of D elements that share a head of keys and values. q and out (n_tokens, n_heads, D), cache
// (n_positions, n_kv_heads, D).
//
// Positions go by in tiles of 128, one a lane, with running maxima and sums. Those of one token may be split between
// workgroups, whose parts attention_merge.wgsl puts together: part (n_heads, n_splits, D + 2): sums of values, maximum, sum.
// For values a lane has four columns of some positions. PACK: out is packed too, unless parts are, of one token.
// Grid: (splits, groups of query heads, tokens).

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
    let column = tid % D4;
    let lane = tid / D4;
    var acc: array<vec4<f32>, GROUP>;
    var total: array<f32, GROUP>;
    var most: array<f32, GROUP>;
    for (var g = 0u; g < GROUP; g++) {
        most[g] = LOWEST;
    }
    for (var t = 0u; t < p.tiles; t++) {
        let tile = (split * p.tiles + t) * 128u;
        if tile >= n {
            break;
        }
        var s = array<f32, GROUP>();
        if tile + tid < n {
            let at = (place(row, tile + tid) * p.n_kv_heads + kv_head) * D4;
            var sum = array<vec4<f32>, GROUP>();
            for (var i = 0u; i < D4; i++) {
                let k = key4(at + i);
                for (var g = 0u; g < GROUP; g++) {
                    sum[g] = fma(k, qs[g * D4 + i], sum[g]);
                }
            }
            for (var g = 0u; g < GROUP; g++) {
                s[g] = (sum[g].x + sum[g].y) + (sum[g].z + sum[g].w);
            }
        } else {
            for (var g = 0u; g < GROUP; g++) {
                s[g] = LOWEST;
            }
        }
        for (var g = 0u; g < GROUP; g++) {
            weights[g * 128u + tid] = s[g];
        }
        workgroupBarrier();
        if tid < GROUP * 8u {
            var m = LOWEST;
            for (var i = 0u; i < 16u; i++) {
                m = max(m, weights[tid * 16u + i]);
            }
            maxima[tid] = m;
        }
        workgroupBarrier();
        for (var g = 0u; g < GROUP; g++) {
            var m = most[g];
            for (var i = 0u; i < 8u; i++) {
                m = max(m, maxima[g * 8u + i]);
            }
            let shrink = exp(most[g] - m);
            acc[g] *= shrink;
            total[g] *= shrink;
            most[g] = m;
            weights[g * 128u + tid] = select(0.0, exp(s[g] - m), tile + tid < n);
        }
        workgroupBarrier();
        if lane < LANES {
            let n_tile = min(128u, n - tile);
            for (var i = lane; i < n_tile; i += LANES) {
                let v = value4((place_again(row, tile + i) * p.n_kv_heads + kv_head) * D4 + column);
                for (var g = 0u; g < GROUP; g++) {
                    let w = weights[g * 128u + i];
                    acc[g] = fma(vec4(w), v, acc[g]);
                    total[g] += w;
                }
            }
        }
        workgroupBarrier();
    }
    for (var g = 0u; g < GROUP; g++) {
        columns[tid] = acc[g];
        sums[tid] = total[g];
        workgroupBarrier();
        if tid < D4 {
            var sum = vec4(0.0);
            var weight = 0.0;
            for (var i = 0u; i < LANES; i++) {
                sum += columns[i * D4 + tid];
                weight += sums[i * D4 + tid];
            }
            let head = head0 + g;
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
                    part[at + D] = most[g];
                    part[at + D + 1u] = weight;
                }
            }
        }
        workgroupBarrier();
        // unroll i PACK
        if p.n_splits == 1u && tid < D / 8u {
            let group = (head0 + g) * D / 8u + tid;
            pack(p.packed_at, p.n_units, group, results[2u * tid], results[2u * tid + 1u]);
        }
        // end
    }
}
