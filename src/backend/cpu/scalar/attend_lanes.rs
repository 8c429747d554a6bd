//! Attention of a batch with queries in the lanes, scores from differences of keys where asked, query by query.

use crate::backend::cpu::table::{LanesBatch, Rows};
use crate::quant::{Block, BlockF16, BlockF32};

/// See [`LanesBatch`].
pub(crate) fn attend(batch: &mut LanesBatch) {
    let (n, group, start) = (
        batch.attend.head_dim,
        batch.attend.group,
        batch.attend.start,
    );
    let n_tokens = batch.attend.out.n_tokens();
    let end = start + n_tokens;
    let window = batch.attend.window.unwrap_or(usize::MAX);
    let (held, rest) = batch.room.split_at_mut(n);
    let (keys, rest) = rest.split_at_mut(batch.frame * n);
    let (changes, rest) = rest.split_at_mut(batch.frame * n);
    let (values, rest) = rest.split_at_mut(batch.frame * n);
    // Largest score and sum of weights of each query.
    let sums = &mut rest[..2 * n_tokens * group];
    for query in sums.chunks_exact_mut(2) {
        query.copy_from_slice(&[f32::NEG_INFINITY, 0.0]);
    }
    for t in 0..n_tokens {
        batch.attend.out.row(t).fill(0.0);
    }
    let mut at = (start + 1).saturating_sub(window) / batch.frame * batch.frame;
    while at < end {
        let n_keys = batch.frame.min(end - at);
        let page = (at - batch.attend.first) / batch.attend.page;
        let in_page = (at - batch.attend.first) % batch.attend.page;
        let rows = in_page * n..(in_page + n_keys) * n;
        widen(batch.attend.keys[page], rows.clone(), keys);
        widen(batch.attend.values[page], rows, values);
        let far = match batch.most > 0 && at >= batch.sink {
            true => batch.exact.is_past(at + batch.frame),
            false => usize::MAX,
        };
        let mut differs = far < end;
        let mut n_changes = 0;
        if differs {
            changes.fill(0.0);
            for j in 0..batch.frame {
                for c in 0..n {
                    let key = keys[j * n + c];
                    let change = match j {
                        0 => key,
                        _ => key - held[c],
                    };
                    // Whatever is no number is a change.
                    let is_held = j > 0 && change.abs() <= batch.thresholds[c];
                    if !is_held {
                        changes[j * n + c] = change;
                        held[c] = key;
                        n_changes += 1;
                    }
                }
            }
            batch.done.elements += (batch.frame * n) as u64;
            batch.done.changes += n_changes as u64;
            differs = n_changes <= batch.most;
        }
        for query in 0..n_tokens * group {
            let (t, head) = (query / group, query % group);
            let position = start + t;
            let q = &batch.attend.q[t * batch.attend.q_stride + head * n..][..n];
            let out = &mut batch.attend.out.row(t)[head * n..][..n];
            let [max, sum] = &mut sums[2 * query..2 * query + 2] else {
                unreachable!("two of them")
            };
            let is_far = position >= far;
            let mut running = 0.0;
            for j in 0..n_keys {
                let key = match is_far && differs {
                    true => &changes[j * n..][..n],
                    false => &keys[j * n..][..n],
                };
                let product: f32 = q.iter().zip(key).map(|(q, k)| q * k).sum();
                running = match is_far && differs {
                    true => running + product,
                    false => product,
                };
                let is_seen = match batch.chosen {
                    Some(chosen) => {
                        let key = at + j - batch.attend.first;
                        chosen.words[key / 32 * n_tokens + t] >> (key % 32) & 1 == 1
                    }
                    None => at + j <= position && position < (at + j).saturating_add(window),
                };
                if !is_seen {
                    continue;
                }
                if batch.chosen.is_none() {
                    batch.done.dense += n as u64;
                    batch.done.far += if is_far { n as u64 } else { 0 };
                    batch.done.done += match is_far && differs {
                        true => match j {
                            0 => n as u64,
                            _ => key.iter().filter(|change| **change != 0.0).count() as u64,
                        },
                        false => n as u64,
                    };
                }
                let score = running * batch.attend.scale;
                if score > *max {
                    let shrink = (*max - score).exp();
                    *sum *= shrink;
                    out.iter_mut().for_each(|o| *o *= shrink);
                    *max = score;
                }
                let weight = (score - *max).exp();
                *sum += weight;
                let value = &values[j * n..][..n];
                out.iter_mut()
                    .zip(value)
                    .for_each(|(o, v)| *o += weight * v);
            }
        }
        at += batch.frame;
    }
    for query in 0..n_tokens * group {
        let inverse = 1.0 / sums[2 * query + 1];
        let out = &mut batch.attend.out.row(query / group)[query % group * n..][..n];
        out.iter_mut().for_each(|o| *o *= inverse);
    }
}

/// The elements `which` of `rows`.
fn widen(rows: Rows, which: std::ops::Range<usize>, out: &mut [f32]) {
    fn blocks<B: Block>(rows: &[B], which: std::ops::Range<usize>, out: &mut [f32]) {
        let rows = &rows[which.start / B::LEN..which.end / B::LEN];
        let out = out.chunks_exact_mut(B::LEN);
        rows.iter()
            .zip(out)
            .for_each(|(block, out)| block.dequantize(out));
    }
    match rows {
        Rows::F32(rows) => blocks(bytemuck::cast_slice::<_, BlockF32>(rows), which, out),
        Rows::F16(rows) => blocks(bytemuck::cast_slice::<_, BlockF16>(rows), which, out),
        Rows::Q8_0(rows) => blocks(rows, which, out),
        Rows::Q4_0(rows) => blocks(rows, which, out),
    }
}
