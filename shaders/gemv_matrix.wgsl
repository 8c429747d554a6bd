// What gemv.wgsl needs of each matrix, _0; repeated for the others. BINDING_i are its bindings.

@group(0) @binding(BINDING_0) var<storage, read> main_0: array<vec4<u32>>;
@group(0) @binding(BINDING_1) var<storage, read> aux_0: array<u32>;
@group(0) @binding(BINDING_2) var<storage, read> bias_0: array<f32>;
@group(0) @binding(BINDING_3) var<storage, read_write> out_0: array<f32>;

fn tile_0(before: u32, row: u32, unit: u32) -> array<Unit, ROWS> {
    var w: array<Unit, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        // Lanes without work read what others read.
        let at = before + min(row + r, p.n_out[M_0] - 1u);
        w[r] = load_0(at * p.n_units + min(unit, p.n_units - 1u));
    }
    return w;
}

fn put_0(at: u32, token: u32, row: u32, y: f32) {
    var sum = y;
    if BIAS {
        sum += bias_0[p.out_at + row];
    }
    if RESIDUAL {
        sum += residual[p.residual_at + p.out_at + token * p.stride[M_0] + row];
    }
    out_0[at + row] = sum;
}
