// What the shaders of the attention of one token share.

struct Params {
    first: u32,
    end: u32,
    n_kv_heads: u32,
    per_kv_head: u32, // groups that share keys
    tiles: u32, // of a split
    n_splits: u32,
    q_at: u32, // vec4
    out_at: u32, // vec4
    scale: f32,
    packed_at: u32, // vec4
    n_units: u32,
    n_first: u32,
    skipped: u32,
    stride: u32, // of the list
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> part: array<f32>;
// unroll i PACK
@group(0) @binding(6) var<storage, read_write> packed: array<u32>;
// end

const D4: u32 = D / 4u;
// Lanes that share a column of values.
const LANES: u32 = 128u / D4;
const LOWEST: f32 = -3.0e38;

var<workgroup> qs: array<vec4<f32>, GROUP * D4>;
var<workgroup> weights: array<f32, GROUP * 128u>;
var<workgroup> maxima: array<f32, GROUP * 8u>;
var<workgroup> columns: array<vec4<f32>, 128>;
var<workgroup> sums: array<f32, 128>;
var<workgroup> results: array<vec4<f32>, D4>;
