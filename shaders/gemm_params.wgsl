// Parameters and bindings of gemm.wgsl and gemm_matrix.wgsl, which tokens and weights a tile has, and what becomes of a sum.
//
// With EXPERTS 1 and 2 the places of group.wgsl stand for tokens, and a tile has the rows of its expert: from x of tokens
// (n_tokens, n_in) to y of places (n_places, n_out), and from x of places to y of slots (n_tokens, n_used, n_out).

struct Params {
    n_units: u32,
    x_at: u32, // vec4
    out_at: u32, // first row of a part of a matrix, or in it of an expert
    residual_at: u32,
    n_out: u32, // rows of the part, or in it of an expert
    stride: u32, // outputs of a token
    n_tokens: u32,
    x_row: u32, // vec4 of a row of x: whole units but for floats
    n_used: u32, // experts of a token
    n_tiles: u32, // of groups
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> residual: array<f32>;
@group(0) @binding(3) var<storage, read> main_0: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> aux_0: array<u32>;
@group(0) @binding(5) var<storage, read> bias: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
@group(0) @binding(7) var<storage, read> groups: array<u32>;

struct Tokens {
    first: u32,
    end: u32,
    rows_at: u32, // of weights
}

// Those of a tile: BN, or fewer; of experts there may be none.
fn tokens_of(tile: u32) -> Tokens {
    if EXPERTS != 0u {
        let first = groups[3u * tile + 1u];
        return Tokens(first, first + groups[3u * tile + 2u], groups[3u * tile] * p.n_out);
    }
    return Tokens(tile * BN, min(tile * BN + BN, p.n_tokens), 0u);
}

fn pair_of(place: u32) -> u32 {
    return groups[3u * p.n_tiles + place];
}

// Where x of a token begins.
fn x_of(token: u32) -> u32 {
    if EXPERTS == 1u {
        return p.x_at + pair_of(token) / p.n_used * p.x_row;
    }
    return p.x_at + token * p.x_row;
}

// The sum for a row of this part and a token, with bias and residual, if both are there.
fn put(row: u32, token: u32, end: u32, sum: f32) {
    if token < end && row < p.n_out {
        var y = sum;
        if BIAS {
            y += bias[p.out_at + row];
        }
        if RESIDUAL {
            y += residual[p.residual_at + token * p.stride + p.out_at + row];
        }
        var y_row = token;
        if EXPERTS == 2u {
            y_row = pair_of(token);
        }
        out[y_row * p.stride + p.out_at + row] = y;
    }
}
