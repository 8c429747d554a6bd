// Keys that a token reads: a list of positions behind their number, see choose.wgsl; a row for each token and head of keys,
// from word `first` on.

@group(0) @binding(7) var<storage, read> list: array<u32>;

// Those of a tile.
var<workgroup> places: array<u32, 128>;

fn n_read(row: u32) -> u32 {
    return list[p.first + row * p.stride];
}

// Number i of them, kept for other lanes.
fn place(row: u32, i: u32) -> u32 {
    let position = list[p.first + row * p.stride + 1u + i];
    places[i % 128u] = position;
    return position;
}

// The same, after a barrier.
fn place_again(row: u32, i: u32) -> u32 {
    return places[i % 128u];
}
