// Y = X W^T for many tokens: X (n_tokens, n_in), W (n_out, n_in), Y (n_tokens, n_out), + bias (n_out), + residual like Y.
//
// A workgroup of 16 x 16 lanes makes a tile of BM rows of W by BN tokens, a lane (16 TM = BM) by (16 TN = BN) of it,
// in steps of one unit of 32 along n_in: both sides of a step go through its memory as Tile4, sums are f32 and run in
// the order of n_in whatever the tile, so that a token's result does not depend on the others. Grid: (rows, tiles of tokens).

const BM: u32 = 16u * TM;
const BN: u32 = 16u * TN;
// Vectors of a row of a tile: one more than it has, so that lanes do not meet in a bank.
const STEP: u32 = 9u;

// (BM, 32) and (BN, 32).
var<workgroup> w_tile: array<Tile4, BM * STEP>;
var<workgroup> x_tile: array<Tile4, BN * STEP>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let row0 = wg.x * BM;
    let tokens = tokens_of(wg.y);
    if EXPERTS != 0u {
        // Barriers want to see that all lanes leave.
        if groups[3u * wg.y + 2u] == 0u {
            return;
        }
    }
    // A lane has every 16th row and every 16th token.
    let my_row = tid % 16u;
    let my_token = tid / 16u;
    var acc: array<f32, TM * TN>;
    for (var unit = 0u; unit < p.n_units; unit++) {
        // BM lanes unpack weights, the others fetch activations.
        if tid < BM {
            let row = tokens.rows_at + min(row0 + tid, p.n_out - 1u);
            var v = unpack(load_0(row * p.n_units + unit));
            for (var i = 0u; i < 8u; i++) {
                w_tile[tid * STEP + i] = to_tile(v[i]);
            }
        } else {
            for (var i = tid - BM; i < 8u * BN; i += 256u - BM) {
                let token = min(tokens.first + i / 8u, tokens.end - 1u);
                let at = unit * 8u + i % 8u;
                var v = vec4(0.0);
                if at < p.x_row {
                    v = x[x_of(token) + at];
                }
                x_tile[i / 8u * STEP + i % 8u] = to_tile(v);
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < 8u; k++) {
            var w: array<vec4<f32>, TM>;
            for (var r = 0u; r < TM; r++) {
                w[r] = vec4<f32>(w_tile[(r * 16u + my_row) * STEP + k]);
            }
            for (var t = 0u; t < TN; t++) {
                let xt = vec4<f32>(x_tile[(t * 16u + my_token) * STEP + k]);
                for (var r = 0u; r < TM; r++) {
                    var sum = acc[t * TM + r];
                    sum = fma(w[r].x, xt.x, sum);
                    sum = fma(w[r].y, xt.y, sum);
                    sum = fma(w[r].z, xt.z, sum);
                    acc[t * TM + r] = fma(w[r].w, xt.w, sum);
                }
            }
        }
        workgroupBarrier();
    }
    for (var t = 0u; t < TN; t++) {
        let token = tokens.first + t * 16u + my_token;
        for (var r = 0u; r < TM; r++) {
            let row = row0 + r * 16u + my_row;
            put(row, token, tokens.end, acc[t * TM + r]);
        }
    }
}
