// Sums of the keys of chunks of CHUNK, from chunk `first` on: cache (n_positions, n_kv_heads, D) -> sums (n_chunks,
// n_kv_heads, D). One after the other, as they are cached, so that a sum depends on its keys alone. A lane has four columns.
// Grid: (columns / 256, chunks).

struct Params {
    first: u32,
    n_chunks: u32,
    n_columns: u32, // vec4
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read_write> sums: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let column = wg.x * 64u + tid;
    if column >= p.n_columns || wg.y >= p.n_chunks {
        return;
    }
    let chunk = p.first + wg.y;
    var sum = vec4(0.0);
    for (var i = 0u; i < CHUNK; i++) {
        sum += key4((chunk * CHUNK + i) * p.n_columns + column);
    }
    sums[chunk * p.n_columns + column] = sum;
}
