// Parameters and bindings of gemm.wgsl and gemm_matrix.wgsl, and what becomes of a sum.

struct Params {
    n_units: u32,
    x_at: u32, // vec4
    out_at: u32, // first row of a part of a matrix
    residual_at: u32,
    n_out: u32, // rows of the part
    stride: u32, // outputs of a token
    n_tokens: u32,
    x_row: u32, // vec4 of a row of x: whole units but for floats
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> residual: array<f32>;
@group(0) @binding(3) var<storage, read> main_0: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> aux_0: array<u32>;
@group(0) @binding(5) var<storage, read> bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

// The sum for a row of this part and a token, with bias and residual, if both are there.
fn put(row: u32, token: u32, sum: f32) {
    if token < p.n_tokens && row < p.n_out {
        var y = sum;
        if BIAS {
            y += bias[p.out_at + row];
        }
        if RESIDUAL {
            y += residual[p.residual_at + token * p.stride + p.out_at + row];
        }
        out[token * p.stride + p.out_at + row] = y;
    }
}
