// Rows of a table, (n_rows, n_in), times scale: tokens (n_tokens), out (n_tokens, n_in). The table may be one of several
// parts: tokens of the others are left. A lane makes a unit of 32. Grid: (units / 64, tokens).

struct Params {
    n_units: u32,
    first_row: u32,
    n_rows: u32,
    scale: f32,
    row: u32, // vec4 of a row of out
    tokens_at: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> main_0: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> aux_0: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let unit = wg.x * 64u + tid;
    let row = tokens[p.tokens_at + wg.y] - p.first_row; // wraps for tokens of earlier parts
    if unit >= p.n_units || row >= p.n_rows {
        return;
    }
    var v = unpack(load_0(row * p.n_units + unit));
    for (var i = 0u; i < 8u; i++) {
        if unit * 8u + i < p.row {
            out[wg.y * p.row + unit * 8u + i] = v[i] * p.scale;
        }
    }
}
