// Tiles of half floats; what does not fit becomes the largest that does.

alias Tile4 = vec4<f16>;

fn to_tile(x: vec4<f32>) -> Tile4 {
    return vec4<f16>(clamp(x, vec4(-65504.0), vec4(65504.0)));
}
