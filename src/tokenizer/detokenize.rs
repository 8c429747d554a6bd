//! Tokens back to text, one at a time. A token may hold part of a character: text comes out only when a character is
//! whole, so joined pieces equal the text decoded at once.

use super::Tokenizer;

/// Turns a stream of tokens into text. Made by [`Tokenizer::stream`].
#[derive(Clone)]
pub struct Detokenizer<'t> {
    tokenizer: &'t Tokenizer,
    /// The start of a character, at most three bytes.
    pending: Vec<u8>,
    /// A space that SentencePiece put before the text is still to be taken off.
    strip_space: bool,
    show_special: bool,
    /// Those that are shown in any case.
    shown: Vec<u32>,
}

impl<'t> Detokenizer<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, strip_space: bool) -> Self {
        Detokenizer {
            tokenizer,
            pending: Vec::new(),
            strip_space,
            show_special: false,
            shown: Vec::new(),
        }
    }

    /// Lets control tokens appear as they are spelled; otherwise they are left out. A parser of tool calls needs them.
    pub fn show_special(mut self, show: bool) -> Self {
        self.show_special = show;
        self
    }

    /// Lets these control tokens appear, whatever becomes of the others.
    pub fn show(mut self, tokens: impl IntoIterator<Item = u32>) -> Self {
        self.shown.extend(tokens);
        self
    }

    /// The text that token `id` completes; often empty within a character of several bytes. Bytes that are no UTF-8
    /// become U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_to(id, &mut text);
        text
    }

    /// [`Detokenizer::push`] into a string of the caller.
    pub fn push_to(&mut self, id: u32, text: &mut String) {
        let tokenizer = self.tokenizer;
        let special = tokenizer.is_control(id);
        if special && !self.show_special && !self.shown.contains(&id) {
            return;
        }
        let bytes = if special {
            tokenizer.spelling(id).into()
        } else {
            tokenizer.token_bytes(id)
        };
        let mut bytes = &*bytes;
        if std::mem::take(&mut self.strip_space) && !special {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let rest = push_whole_chars(&self.pending, text);
        self.pending.drain(..self.pending.len() - rest);
    }

    /// Ends the stream: the start of a character that never came whole is U+FFFD.
    pub fn flush(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

/// Appends what is whole, with U+FFFD for what cannot become a character. Returns how many bytes at the end may yet.
fn push_whole_chars(mut bytes: &[u8], text: &mut String) -> usize {
    loop {
        let err = match std::str::from_utf8(bytes) {
            Ok(whole) => {
                text.push_str(whole);
                return 0;
            }
            Err(err) => err,
        };
        let (whole, rest) = bytes.split_at(err.valid_up_to());
        text.push_str(std::str::from_utf8(whole).unwrap_or_default());
        match err.error_len() {
            None => return rest.len(),
            Some(len) => {
                text.push(char::REPLACEMENT_CHARACTER);
                bytes = &rest[len..];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_equals_the_whole(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), 0x80..=0xBFu8, 0xE0..=0xF4u8], 0..24),
            cuts in prop::collection::vec(0..24usize, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort();
            let mut text = String::new();
            let mut pending = Vec::new();
            for cut in cuts.windows(2) {
                pending.extend_from_slice(&bytes[cut[0]..cut[1]]);
                let rest = push_whole_chars(&pending, &mut text);
                prop_assert!(rest < 4);
                pending.drain(..pending.len() - rest);
            }
            text.push_str(&String::from_utf8_lossy(&pending));
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
