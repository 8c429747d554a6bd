//! Tokens that are cut out of a text before it is tokenized: control and user-defined ones.
//!
//! The rule is llama.cpp's: the longest token claims all its occurrences first (from the left, not overlapping), then
//! the next shorter one in what is left. A search for each of some 6,000 tokens (Gemma) would read the text as often;
//! here one pass finds the occurrences, and each cluster of overlapping ones is settled by that rule.

use std::ops::Range;

/// Occurrences in one cluster before it is settled by searching token by token, which needs no memory for them.
const MAX_CLUSTER: usize = 4096;

/// A set of tokens to cut out.
#[derive(Debug, Default)]
pub(super) struct Specials {
    tokens: Vec<(Box<str>, u32)>, // sorted by text
    /// Bit `first * 256 + second`: some token starts with these two bytes, or with `first` and has no second.
    starts: Box<[u64]>, // (1024), or empty without tokens
}

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'t> {
    /// Text to tokenize; never empty.
    Text(&'t str),
    /// A token that was spelled out.
    Token(u32),
}

#[derive(Debug, Clone)]
struct Occurrence {
    at: Range<usize>,
    token: usize, // index into `tokens`
}

impl Specials {
    /// A set of `(text, id)`. Empty texts are left out: they occur everywhere.
    pub(super) fn new(tokens: impl IntoIterator<Item = (String, u32)>) -> Self {
        let mut tokens: Vec<(Box<str>, u32)> = tokens
            .into_iter()
            .filter(|(text, _)| !text.is_empty())
            .map(|(text, id)| (text.into_boxed_str(), id))
            .collect();
        tokens.sort_unstable();
        let mut starts = vec![0u64; if tokens.is_empty() { 0 } else { 1024 }];
        for (text, _) in &tokens {
            let first = usize::from(text.as_bytes()[0]) * 256;
            let seconds = match text.as_bytes().get(1) {
                Some(&second) => first + usize::from(second)..first + usize::from(second) + 1,
                None => first..first + 256,
            };
            for bit in seconds {
                starts[bit / 64] |= 1 << (bit % 64);
            }
        }
        Specials {
            tokens,
            starts: starts.into(),
        }
    }

    /// The tokens and their ids, by text.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u32)> {
        self.tokens.iter().map(|(text, id)| (&**text, *id))
    }

    /// The id of the token spelled `text`.
    pub(super) fn get(&self, text: &str) -> Option<u32> {
        let idx = self
            .tokens
            .binary_search_by(|(t, _)| (**t).cmp(text))
            .ok()?;
        Some(self.tokens[idx].1)
    }

    /// Calls `part` with each part of `text`, in order.
    pub(super) fn split<'t>(&self, text: &'t str, mut part: impl FnMut(Part<'t>)) {
        let mut done = 0;
        let mut cluster = Cluster::default();
        if !self.tokens.is_empty() {
            for pos in 0..text.len() {
                if cluster.end <= pos && cluster.end > 0 {
                    self.settle(text, &mut cluster, &mut done, &mut part);
                }
                self.find_at(text, pos, &mut cluster);
            }
            self.settle(text, &mut cluster, &mut done, &mut part);
        }
        if done < text.len() {
            part(Part::Text(&text[done..]));
        }
    }

    /// Enters every token that starts at `pos`.
    #[inline]
    fn find_at(&self, text: &str, pos: usize, cluster: &mut Cluster) {
        let bytes = text.as_bytes();
        let second = bytes.get(pos + 1).copied().unwrap_or(0);
        let bit = usize::from(bytes[pos]) * 256 + usize::from(second);
        if self.starts[bit / 64] & (1 << (bit % 64)) == 0 {
            return;
        }
        // `range` are the tokens that agree with the text so far; those of exactly that length come first.
        let mut range = 0..self.tokens.len();
        for len in 0.. {
            while range.start < range.end && self.tokens[range.start].0.len() == len {
                cluster.add(pos..pos + len, range.start);
                range.start += 1;
            }
            let Some(&byte) = bytes.get(pos + len) else {
                break;
            };
            let tokens = &self.tokens[range.clone()];
            if tokens.is_empty() {
                break;
            }
            let lo = tokens.partition_point(|(text, _)| text.as_bytes()[len] < byte);
            let hi = tokens.partition_point(|(text, _)| text.as_bytes()[len] <= byte);
            range = range.start + lo..range.start + hi;
        }
    }

    /// Gives the tokens of the cluster out, and the text before each.
    fn settle<'t>(
        &self,
        text: &'t str,
        cluster: &mut Cluster,
        done: &mut usize,
        part: &mut impl FnMut(Part<'t>),
    ) {
        if cluster.overflow {
            self.search(text, cluster);
        } else if cluster.found.len() > 1 {
            // Longest first, then by id, then from the left.
            let key = |o: &Occurrence| {
                (
                    std::cmp::Reverse(o.at.len()),
                    self.tokens[o.token].1,
                    o.at.start,
                )
            };
            cluster.found.sort_unstable_by_key(key);
            let mut claimed: Vec<Occurrence> = Vec::new(); // by position
            for o in cluster.found.drain(..) {
                let idx = claimed.partition_point(|c| c.at.end <= o.at.start);
                if claimed.get(idx).is_none_or(|c| c.at.start >= o.at.end) {
                    claimed.insert(idx, o);
                }
            }
            cluster.found = claimed;
        }
        for o in cluster.found.drain(..) {
            if *done < o.at.start {
                part(Part::Text(&text[*done..o.at.start]));
            }
            part(Part::Token(self.tokens[o.token].1));
            *done = o.at.end;
        }
        *cluster = Cluster::default();
    }

    /// The rule itself, on the span of a cluster with too many occurrences to list.
    fn search(&self, text: &str, cluster: &mut Cluster) {
        let mut order: Vec<usize> = (0..self.tokens.len()).collect();
        order.sort_unstable_by_key(|&t| {
            (std::cmp::Reverse(self.tokens[t].0.len()), self.tokens[t].1)
        });
        cluster.found.clear();
        let whole = cluster.start..cluster.end;
        let mut free = vec![whole];
        for token in order {
            let needle = &*self.tokens[token].0;
            let mut left = Vec::with_capacity(free.len());
            for span in free {
                let mut start = span.start;
                while let Some(at) = text[start..span.end].find(needle) {
                    let at = start + at..start + at + needle.len();
                    if start < at.start {
                        left.push(start..at.start);
                    }
                    start = at.end;
                    cluster.found.push(Occurrence { at, token });
                }
                if start < span.end {
                    left.push(start..span.end);
                }
            }
            free = left;
        }
        cluster.found.sort_unstable_by_key(|o| o.at.start);
    }
}

/// Occurrences that overlap, directly or through others.
#[derive(Default)]
struct Cluster {
    start: usize,
    end: usize, // 0 while there is none
    found: Vec<Occurrence>,
    overflow: bool,
}

impl Cluster {
    fn add(&mut self, at: Range<usize>, token: usize) {
        if self.end == 0 {
            self.start = at.start;
        }
        self.end = self.end.max(at.end);
        if self.found.len() < MAX_CLUSTER {
            self.found.push(Occurrence { at, token });
        } else {
            self.overflow = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The rule, literally: token by token over the fragments.
    fn by_the_rule<'t>(tokens: &[&str], text: &'t str) -> Vec<Part<'t>> {
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|&i| (std::cmp::Reverse(tokens[i].len()), i));
        let mut parts = vec![Part::Text(text)];
        for i in order {
            let mut next = Vec::new();
            for part in parts {
                let Part::Text(mut rest) = part else {
                    next.push(part);
                    continue;
                };
                while let Some(at) = rest.find(tokens[i]) {
                    next.push(Part::Text(&rest[..at]));
                    next.push(Part::Token(i as u32));
                    rest = &rest[at + tokens[i].len()..];
                }
                next.push(Part::Text(rest));
            }
            parts = next;
        }
        parts.retain(|p| *p != Part::Text(""));
        parts
    }

    fn split<'t>(tokens: &[&str], text: &'t str) -> Vec<Part<'t>> {
        let numbered = tokens
            .iter()
            .enumerate()
            .map(|(i, t)| (t.to_string(), i as u32));
        let mut parts = Vec::new();
        Specials::new(numbered).split(text, |p| parts.push(p));
        parts
    }

    #[test]
    fn the_longest_token_claims_first() {
        let parts = split(&["<a>", "<a><b>", "b>c"], "x<a><b>c<a>");
        assert_eq!(
            parts,
            [
                Part::Text("x"),
                Part::Token(1),
                Part::Text("c"),
                Part::Token(0)
            ]
        );
    }

    #[test]
    fn long_runs_are_settled_alike() {
        let tokens = ["\n", "\n\n", "\n\n\n", "\n\n\n\n\n\n\n"];
        let text = format!("a{}b", "\n".repeat(5000));
        assert_eq!(split(&tokens, &text), by_the_rule(&tokens, &text));
    }

    proptest! {
        #[test]
        fn equals_the_rule(
            mut tokens in prop::collection::vec("[abé]{1,4}", 0..8),
            text in "[abcé]{0,60}",
        ) {
            tokens.sort();
            tokens.dedup();
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            prop_assert_eq!(split(&tokens, &text), by_the_rule(&tokens, &text));
        }
    }
}
