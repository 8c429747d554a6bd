// Which keys tokens at positions start.. read of what they see: the first, the last, and of the items between, which are chunks
// of CHUNK keys or blocks of four of them, of ITEM keys, the best up to the budget, of equals the first. scores (n_tokens, n_rows, n_scores), as
// chunk_scores.wgsl has them -> list (n_tokens, n_kv_heads, stride): how many keys, then their positions in order.
//
// BY says what makes an item good, 0: its score with the sum of queries, 1: the same of all heads, summed, 2: the
// probabilities that GROUP queries give to chunks, 3: the query that wants it most, 4: blocks, the best mean of two chunks by such
// probabilities. See src/sparsity, which this must agree with.
//
// A workgroup has a token and a head of keys, a lane some items side by side. Values become whole numbers in the same order;
// the least that is read is found by its digits of 8 bits, by how many keys there are from each on. Grid: (n_kv_heads, tokens).

struct Params {
    start: u32,
    window: u32, // 0: none
    n_kv_heads: u32,
    n_rows: u32,
    n_scores: u32, // of a row
    n_orders: u32, // of a row
    stride: u32,
    sink: u32,
    local: u32,
    budget: u32,
    per_cent: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> scores: array<f32>;
@group(0) @binding(2) var<storage, read_write> orders: array<u32>; // (n_tokens, n_kv_heads, n_orders)
@group(0) @binding(3) var<storage, read_write> list: array<u32>;

const LOWEST: f32 = -3.0e38;

var<workgroup> shared_sums: array<u32, 256>;
var<workgroup> shared_floats: array<f32, 256>;
// Of sixteen lanes each.
var<workgroup> sixteens: array<u32, 16>;
var<workgroup> float_sixteens: array<f32, 16>;
var<workgroup> bins: array<atomic<u32>, 256>;
var<workgroup> most: array<f32, GROUP>;
var<workgroup> inverse: array<f32, GROUP>;
var<workgroup> digit: u32;
var<workgroup> rest: u32;

// The sum of what lanes before this one have.
fn sum_before(x: u32, tid: u32) -> u32 {
    workgroupBarrier();
    shared_sums[tid] = x;
    workgroupBarrier();
    if tid < 16u {
        var sum = 0u;
        for (var i = 16u * tid; i < 16u * tid + 16u; i++) {
            sum += shared_sums[i];
        }
        sixteens[tid] = sum;
    }
    workgroupBarrier();
    var before = 0u;
    for (var i = 0u; i < tid / 16u; i++) {
        before += sixteens[i];
    }
    for (var i = tid / 16u * 16u; i < tid; i++) {
        before += shared_sums[i];
    }
    return before;
}

fn joined(a: f32, b: f32, is_sum: bool) -> f32 {
    return select(max(a, b), a + b, is_sum);
}

// The sum or the largest over the workgroup.
fn over_all(x: f32, tid: u32, is_sum: bool) -> f32 {
    workgroupBarrier();
    shared_floats[tid] = x;
    workgroupBarrier();
    if tid < 16u {
        var all = shared_floats[16u * tid];
        for (var i = 1u; i < 16u; i++) {
            all = joined(all, shared_floats[16u * tid + i], is_sum);
        }
        float_sixteens[tid] = all;
    }
    workgroupBarrier();
    var all = float_sixteens[0];
    for (var i = 1u; i < 16u; i++) {
        all = joined(all, float_sixteens[i], is_sum);
    }
    return all;
}

// A query's logit of a chunk, or of a mean of two, from its row of scores.
fn logit(row: u32, i: u32) -> f32 {
    let at = row * p.n_scores + i;
    if BY == 4u {
        return (scores[at] + scores[at + 1u]) * (1.0 / f32(2u * CHUNK));
    }
    if BY == 2u {
        return scores[at] * (1.0 / sqrt(f32(CHUNK)));
    }
    return scores[at];
}

// The probabilities that queries give to a chunk or a mean.
fn votes(row: u32, i: u32) -> f32 {
    var sum = 0.0;
    for (var g = 0u; g < GROUP; g++) {
        sum += exp(logit(row + g, i) - most[g]) * inverse[g];
    }
    return sum;
}

// How good an item is, with n logits.
fn value(row: u32, first_row: u32, item: u32, n: u32) -> f32 {
    if BY == 0u {
        return logit(row, item);
    }
    if BY == 1u {
        var sum = 0.0;
        for (var h = 0u; h < p.n_kv_heads; h++) {
            sum += logit(first_row + h, item);
        }
        return sum;
    }
    if BY == 2u {
        return votes(row, item);
    }
    if BY == 3u {
        var best = LOWEST;
        for (var g = 0u; g < GROUP; g++) {
            best = max(best, logit(row + g, item) - most[g]);
        }
        return best;
    }
    // Means that reach into the block.
    var best = LOWEST;
    for (var i = max(4u * item, 1u) - 1u; i < min(4u * item + 4u, n); i++) {
        best = max(best, votes(row, i));
    }
    return best;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) tid: u32) {
    let token = wg.y;
    let first_row = token * p.n_rows;
    let row = first_row + wg.x * (p.n_rows / p.n_kv_heads);
    let orders_at = (token * p.n_kv_heads + wg.x) * p.n_orders;
    let list_at = (token * p.n_kv_heads + wg.x) * p.stride + 1u;

    // What is seen, always read, and between.
    let end = p.start + token + 1u;
    let first = select(0u, max(end, p.window) - p.window, p.window > 0u);
    let n_known = end / CHUNK;
    let budget = max(p.budget, (end - first) * p.per_cent / 100u);
    var head_end = clamp(p.sink, first, end);
    var tail = max(end, p.local) - p.local;
    var items = vec2(0u);
    var n_logits = 0u;
    var low = head_end; // the first key that an item may have
    if BY == 4u {
        low = first;
        head_end = max(first, min(ITEM, end));
        let last = tail / ITEM;
        items = vec2(min(max(first / ITEM, 1u), last), last);
        n_logits = max(min(n_known, 4u * last + 1u), 1u) - 1u;
        tail = last * ITEM;
    } else {
        tail = max(min(tail, n_known * CHUNK), head_end);
        items = vec2(min(head_end / CHUNK, n_known), min((tail + CHUNK - 1u) / CHUNK, n_known));
        n_logits = items.y;
    }
    // The last keys may reach back to the first.
    let tail_first = max(tail, max(first, head_end));
    let always = select(head_end - first, ITEM, BY == 4u) + end - max(tail, first);
    var left = max(budget, always) - always;
    if BY == 4u {
        left -= left % ITEM;
    }

    if BY >= 2u {
        for (var g = 0u; g < GROUP; g++) {
            var x = LOWEST;
            for (var i = tid; i < n_logits; i += 256u) {
                x = max(x, logit(row + g, i));
            }
            let m = over_all(x, tid, false);
            var sum = 0.0;
            if BY != 3u {
                for (var i = tid; i < n_logits; i += 256u) {
                    sum += exp(logit(row + g, i) - m);
                }
                sum = over_all(sum, tid, true);
            }
            if tid == 0u {
                most[g] = m;
                inverse[g] = 1.0 / sum;
            }
        }
        workgroupBarrier();
    }

    // Items of this lane, and their order.
    let each = (items.y - items.x + 255u) / 256u;
    let mine = vec2(min(items.x + tid * each, items.y), min(items.x + (tid + 1u) * each, items.y));
    for (var i = mine.x; i < mine.y; i++) {
        let bits = bitcast<u32>(value(row, first_row, i, n_logits));
        orders[orders_at + i] = select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
    }

    // The least order of which `left` keys are read with all above, of those of this order the first `left` that remain.
    var least = 0u;
    var mask = 0u;
    let reads_some = left > 0u;
    for (var shift = 32u; shift > 0u; ) {
        shift -= 8u;
        workgroupBarrier();
        atomicStore(&bins[tid], 0u);
        if tid == 0u {
            digit = 0u;
            rest = left;
        }
        workgroupBarrier();
        for (var i = mine.x; i < mine.y; i++) {
            let order = orders[orders_at + i];
            if (order & mask) == least {
                atomicAdd(&bins[(order >> shift) & 255u], weight(i, low, tail));
            }
        }
        workgroupBarrier();
        // Lanes have the bins from the largest on.
        let n = atomicLoad(&bins[255u - tid]);
        let before = sum_before(n, tid);
        if before < left && left <= before + n {
            digit = 255u - tid;
            rest = left - before;
        }
        workgroupBarrier();
        least |= digit << shift;
        left = rest;
        mask |= 255u << shift;
    }
    if !reads_some {
        left = 0u;
        least = 0xffffffffu;
    }

    var n_equal = 0u;
    for (var i = mine.x; i < mine.y; i++) {
        if orders[orders_at + i] == least {
            n_equal += weight(i, low, tail);
        }
    }
    let equal_before = sum_before(n_equal, tid);
    var n_mine = 0u;
    var equal = equal_before;
    for (var i = mine.x; i < mine.y; i++) {
        n_mine += n_taken(orders[orders_at + i], least, i, low, tail, left, &equal);
    }
    let n_head = head_end - first;
    var at = n_head + sum_before(n_mine, tid);
    equal = equal_before;
    for (var i = mine.x; i < mine.y; i++) {
        let n = n_taken(orders[orders_at + i], least, i, low, tail, left, &equal);
        let key = max(i * ITEM, low);
        for (var j = 0u; j < n; j++) {
            list[list_at + at + j] = key + j;
        }
        at += n;
    }
    for (var i = tid; i < n_head; i += 256u) {
        list[list_at + i] = first + i;
    }
    // The last lane knows where the items end.
    if tid == 255u {
        rest = at;
    }
    workgroupBarrier();
    let n_before = rest;
    for (var i = tid; i < end - tail_first; i += 256u) {
        list[list_at + n_before + i] = tail_first + i;
    }
    if tid == 0u {
        list[list_at - 1u] = n_before + end - tail_first;
    }
}

// Keys of an item that are seen and not read anyway.
fn n_keys(item: u32, low: u32, tail: u32) -> u32 {
    let key = max(item * ITEM, low);
    return max(min((item + 1u) * ITEM, tail), key) - key;
}

// What it takes of the budget: a block that a window cuts as much as others.
fn weight(item: u32, low: u32, tail: u32) -> u32 {
    if BY == 4u {
        return ITEM;
    }
    return n_keys(item, low, tail);
}

// Keys of an item that are read: those above `least` whole, of equals the first `left`.
fn n_taken(order: u32, least: u32, item: u32, low: u32, tail: u32, left: u32, equal: ptr<function, u32>) -> u32 {
    let n = n_keys(item, low, tail);
    if order > least {
        return n;
    }
    if order < least {
        return 0u;
    }
    let before = *equal;
    *equal += weight(item, low, tail);
    return min(n, max(left, before) - before);
}
