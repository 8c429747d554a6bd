// Keys that a token reads: the first n_first, and what comes `skipped` later to the end.

fn n_read(row: u32) -> u32 {
    return p.end - p.first - p.skipped;
}

// Number i of them.
fn place(row: u32, i: u32) -> u32 {
    return p.first + i + select(0u, p.skipped, i >= p.n_first);
}

fn place_again(row: u32, i: u32) -> u32 {
    return place(row, i);
}
