// Keys that a token reads: all from the first to the end.

fn n_read(row: u32) -> u32 {
    return p.end - p.first;
}

// Number i of them.
fn place(row: u32, i: u32) -> u32 {
    return p.first + i;
}

fn place_again(row: u32, i: u32) -> u32 {
    return p.first + i;
}
