// Products of the queries of tokens at positions start.. with sums of keys: q (n_tokens, n_heads, D), sums (n_chunks,
// n_kv_heads, D) -> scores (n_tokens, n_rows, n_scores), of the chunks that a token knows. SUMMED: rows are of heads of keys,
// their query the sum of n_summed from the head's own or, if that is all of them, the first.
//
// A workgroup has ROWS rows of a token that share a head of keys; a lane has a chunk. Grid: (chunks / 128, n_rows / ROWS, tokens).

struct Params {
    start: u32,
    n_heads: u32,
    n_kv_heads: u32,
    n_rows: u32,
    n_summed: u32,
    n_scores: u32, // of a row
    q_at: u32, // vec4
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> sums: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;

const D4: u32 = D / 4u;

var<workgroup> qs: array<vec4<f32>, ROWS * D4>;

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row0 = wg.y * ROWS;
    let kv_head = row0 * p.n_kv_heads / p.n_rows;
    let token_at = p.q_at + wg.z * p.n_heads * D4;
    for (var i = tid; i < ROWS * D4; i += 128u) {
        if SUMMED {
            let head = select(kv_head * p.n_summed, 0u, p.n_summed == p.n_heads);
            var sum = vec4(0.0);
            for (var h = head; h < head + p.n_summed; h++) {
                sum += q[token_at + h * D4 + i] * p.scale;
            }
            qs[i] = sum;
        } else {
            qs[i] = q[token_at + row0 * D4 + i] * p.scale;
        }
    }
    workgroupBarrier();
    let chunk = wg.x * 128u + tid;
    if chunk >= (p.start + wg.z + 1u) / CHUNK {
        return;
    }
    var products = array<vec4<f32>, ROWS>();
    for (var i = 0u; i < D4; i++) {
        let sum = sums[(chunk * p.n_kv_heads + kv_head) * D4 + i];
        for (var r = 0u; r < ROWS; r++) {
            products[r] = fma(sum, qs[r * D4 + i], products[r]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        let product = products[r];
        scores[(wg.z * p.n_rows + row0 + r) * p.n_scores + chunk] = (product.x + product.y) + (product.z + product.w);
    }
}
