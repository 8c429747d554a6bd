// gemm.wgsl for adapters with matrix units: Y = X W^T + bias + residual, with the same parameters, bindings and grid.
//
// A subgroup makes FM x FN squares of 16 x 16 of Y in matrices that it holds together, a workgroup of SM x SN subgroups a
// tile of BM rows of W by BN tokens. Steps of a unit of 32 along n_in alternate between two tiles of half floats in the
// workgroup's memory; what the next step needs is on its way meanwhile. Sums are f32, in the order of n_in whatever the
// tile. A subgroup has 32 lanes. Squares have names, not places in an array: compilers keep arrays of them in memory, at a
// third of the speed. Grid: (rows, tiles of tokens).

const BM: u32 = 16u * FM * SM;
const BN: u32 = 16u * FN * SN;
const WG: u32 = 32u * SM * SN;
// Vectors of a row of a tile: two more than a unit has, so that rows do not meet in a bank.
const STEP: u32 = 10u;

// (BM, 32) and (BN, 32), twice.
var<workgroup> w_tile: array<vec4<f16>, 2u * BM * STEP>;
var<workgroup> x_tile: array<vec4<f16>, 2u * BN * STEP>;
// A square of each subgroup on its way out.
var<workgroup> squares: array<f32, 256u * SM * SN>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) wg: vec3<u32>,
    @builtin(local_invocation_index) tid: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row0 = wg.x * BM;
    let tokens = tokens_of(wg.y);
    if EXPERTS != 0u {
        // Barriers want to see that all lanes leave.
        if groups[3u * wg.y + 2u] == 0u {
            return;
        }
    }
    let my_row0 = subgroup % SM * FM * 16u;
    let my_token0 = subgroup / SM * FN * 16u;
    // The first BM lanes unpack a row of weights each.
    let units = (tokens.rows_at + min(row0 + tid, p.n_out - 1u)) * p.n_units;
    // unroll i XS
    let x_at_#i = x_of(min(tokens.first + (tid + #iu * WG) / 8u, tokens.end - 1u));
    var x_#i = x[x_at_#i + min(tid % 8u, p.x_row - 1u)];
    // end
    // unroll i FM
    // unroll j FN
    var sum_#i_#j = coop_mat16x16<f32, C>();
    // end
    // end
    var w = load_0(units);
    var turn = 0u;
    for (var unit = 0u; unit < p.n_units; unit++) {
        if tid < BM {
            var v = unpack(w);
            for (var i = 0u; i < 8u; i++) {
                w_tile[(turn * BM + tid) * STEP + i] = to_tile(v[i]);
            }
        }
        // unroll i XS
        x_tile[(turn * BN + (tid + #iu * WG) / 8u) * STEP + tid % 8u] = to_tile(x_#i);
        // end
        workgroupBarrier();
        // Beyond a row of floats that ends inside a unit weights are zeros.
        let next = min(unit + 1u, p.n_units - 1u);
        let x_next = min(next * 8u + tid % 8u, p.x_row - 1u);
        w = load_0(units + next);
        // unroll i XS
        x_#i = x[x_at_#i + x_next];
        // end
        let w_at = (turn * BM + my_row0) * STEP;
        let xs_at = (turn * BN + my_token0) * STEP;
        // unroll k 2
        // unroll i FM
        let a_#k_#i = coopLoadT<coop_mat16x16<f16, A>>(&w_tile[w_at + 16u * #iu * STEP + 4u * #ku], STEP);
        // end
        // unroll j FN
        let b_#k_#j = coopLoad<coop_mat16x16<f16, B>>(&x_tile[xs_at + 16u * #ju * STEP + 4u * #ku], STEP);
        // unroll i FM
        sum_#i_#j = coopMultiplyAdd(a_#k_#i, b_#k_#j, sum_#i_#j);
        // end
        // end
        // end
        turn = 1u - turn;
    }
    // unroll i FM
    // unroll j FN
    workgroupBarrier();
    coopStore(sum_#i_#j, &squares[subgroup * 256u], 16u);
    workgroupBarrier();
    put_square(subgroup * 256u, lane, row0 + my_row0 + 16u * #iu, tokens.first + my_token0 + 16u * #ju, tokens.end);
    // end
    // end
}

// A square, column by column, to Y.
fn put_square(square: u32, lane: u32, row0: u32, token0: u32, end: u32) {
    for (var e = lane; e < 256u; e += 32u) {
        put(row0 + e % 16u, token0 + e / 16u, end, squares[square + e]);
    }
}
