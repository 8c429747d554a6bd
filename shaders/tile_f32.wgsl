// Tiles of floats: exact, and for adapters without half floats.

alias Tile4 = vec4<f32>;

fn to_tile(x: vec4<f32>) -> Tile4 {
    return x;
}
