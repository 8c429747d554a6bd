//! Penalties on tokens of the last `n`: for a token that occurs `count` times there, `logit / repeat` (`logit * repeat`
//! if not positive), then `- count * frequency - presence`.

use std::collections::{HashMap, VecDeque};

use super::candidates::Candidates;

/// The last tokens, and how often each occurs among them.
#[derive(Clone, Debug, Default)]
pub(super) struct Penalties {
    pub repeat: f32,
    pub frequency: f32,
    pub presence: f32,
    /// Size of the window; `usize::MAX`: all.
    pub last_n: usize,
    window: VecDeque<u32>,
    counts: HashMap<u32, u32>,
}

impl Penalties {
    pub fn new(repeat: f32, frequency: f32, presence: f32, last_n: usize) -> Self {
        let room = last_n.min(4096);
        Self {
            repeat,
            frequency,
            presence,
            last_n,
            window: VecDeque::with_capacity(room),
            // Twice the tokens, so that removed entries never make it grow.
            counts: HashMap::with_capacity(2 * room),
        }
    }

    /// Whether it changes nothing.
    pub fn is_neutral(&self) -> bool {
        let neutral = self.repeat == 1.0 && self.frequency == 0.0 && self.presence == 0.0;
        neutral || self.last_n == 0
    }

    /// How many logits it changes, if it raises none.
    pub fn lowers(&self) -> Option<usize> {
        let lowers = self.repeat >= 1.0 && self.frequency >= 0.0 && self.presence >= 0.0;
        lowers.then_some(self.counts.len())
    }

    pub fn accept(&mut self, token: u32) {
        if self.is_neutral() {
            return;
        }
        while self.window.len() >= self.last_n {
            let Some(old) = self.window.pop_front() else {
                break;
            };
            if let Some(count) = self.counts.get_mut(&old) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&old);
                }
            }
        }
        self.window.push_back(token);
        *self.counts.entry(token).or_default() += 1;
    }

    pub fn reset(&mut self) {
        self.window.clear();
        self.counts.clear();
    }

    pub fn apply(&self, candidates: &mut Candidates) {
        let penalize = |logit: &mut f32, count: u32| {
            if *logit <= 0.0 {
                *logit *= self.repeat;
            } else {
                *logit /= self.repeat;
            }
            *logit -= count as f32 * self.frequency + self.presence;
        };
        if let Some(all) = candidates.all_mut() {
            for (&token, &count) in &self.counts {
                if let Some(logit) = all.get_mut(token as usize) {
                    penalize(logit, count);
                }
            }
        } else {
            for c in candidates.list() {
                if let Some(&count) = self.counts.get(&c.id) {
                    penalize(&mut c.logit, count);
                }
            }
            candidates.set_sorted(false);
        }
    }

    /// Bytes held, about: a table of pairs with one control byte each.
    pub fn bytes(&self) -> usize {
        4 * self.window.capacity() + 9 * self.counts.capacity()
    }
}
