//! Text to tokens and back, from the vocabulary in a model file.
//!
//! | File | What |
//! |---|---|
//! | `vocab.rs` | the `tokenizer.*` keys as plain data |
//! | `special.rs` | control and user-defined tokens are cut out of a text first |
//! | `pretokenize.rs`, `unicode.rs` | what is left is cut into words (byte-level BPE only) |
//! | `bpe.rs`, `spm.rs` | merges: byte-level BPE, SentencePiece |
//! | `index.rs`, `cache.rs` | hash tables of both |
//! | `detokenize.rs` | tokens back to text, one at a time |
//! | `chat_template.rs` | messages to a prompt, by the template in the model file |
//! | `template_source.rs`, `python.rs` | what templates written for Python's Jinja need |
//!
//! Tokens equal those of llama.cpp with one exception that is meant: [`Special::Text`] never gives a control token.

mod bpe;
mod cache;
mod chat_template;
mod detokenize;
mod index;
mod pretokenize;
mod python;
mod special;
mod spm;
mod template_source;
mod unicode;
mod vocab;

pub use self::chat_template::{ChatTemplate, Message, Piece, RenderOptions};
pub use self::detokenize::Detokenizer;
pub use self::vocab::{TokenType, Vocab};

use std::borrow::Cow;

use self::bpe::Bpe;
use self::cache::WordCache;
use self::index::TextIndex;
use self::pretokenize::Pretokenizer;
use self::special::{Part, Specials};
use self::spm::Spm;
use self::vocab::bad;
use crate::gguf::{Array, Gguf, Metadata, StringArray};
use crate::{Cancel, Error, Result};

/// Tokens that end a reply in some family of models, where the file has them as control tokens. A text that spells one
/// is never cut to that token unless control tokens are parsed, whatever type the file gives it.
const ENDS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    // Of code models: what follows is another file.
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|repo_name|>",
];

/// Texts are encoded in parts of at most this many bytes: positions inside a part are 32 bits wide.
const MAX_PART: usize = 1 << 30;

/// Bytes 0 to 255, for slices of one byte.
static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut i = 0;
    while i < 256 {
        bytes[i] = i as u8;
        i += 1;
    }
    bytes
};

/// What a control token spelled out in a text becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Characters like any others. For everything that a user, a tool or a document says.
    Text,
    /// The control token. For text of the application itself.
    Parse,
}

/// Encodes text to tokens and decodes tokens to text.
pub struct Tokenizer {
    encoder: Encoder,
    /// Byte-level BPE: what each token stands for, or the spelling of a special one. SentencePiece: the spelling.
    texts: StringArray,
    types: Vec<TokenType>,
    user_defined: Specials,
    /// User-defined, control and unknown tokens.
    specials: Specials,
    ends: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
    chat_template: Option<String>,
}

enum Encoder {
    Bpe(Bpe),
    Spm(Spm),
}

impl Tokenizer {
    /// The tokenizer of a model file.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kind of tokenizer or a pre-tokenizer that is not known here, [`Error::BadModel`] if
    /// the metadata are incomplete or contradict each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self> {
        Tokenizer::from_gguf_unless(gguf, &Cancel::default())
    }

    /// The same, unless another thread has it stopped.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`], and [`Error::Cancelled`].
    pub fn from_gguf_unless(gguf: &Gguf, cancel: &Cancel) -> Result<Self> {
        Tokenizer::make(Vocab::from_metadata(gguf.metadata())?, cancel)
    }

    /// Bytes that the tokenizer of these metadata will take: its tables by their sizes, and what was found for the
    /// spellings of a BPE's inner pieces.
    pub(crate) fn planned_bytes(metadata: &Metadata) -> usize {
        let strings = |key: &str| match metadata.get(key).and_then(|value| value.as_array()) {
            Some(Array::String(strings)) => (strings.len(), strings.iter().map(<[u8]>::len).sum()),
            _ => (0, 0),
        };
        let slots = |n: usize| (n + n / 2 + 1).next_power_of_two();
        let (n, text): (usize, usize) = strings("tokenizer.ggml.tokens");
        let (n_merges, _) = strings("tokenizer.ggml.merges");
        let merges = if n_merges > 0 {
            size_of::<index::Merge>() * slots(n_merges) + 19 * n_merges
        } else {
            size_of::<f32>() * n
        };
        text + n * (size_of::<u32>() + 1) + size_of::<u32>() * slots(n) + merges
    }

    /// The tokenizer of a vocabulary.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn new(vocab: Vocab) -> Result<Self> {
        Tokenizer::make(vocab, &Cancel::default())
    }

    fn make(vocab: Vocab, cancel: &Cancel) -> Result<Self> {
        let is_bpe = match &*vocab.model {
            "gpt2" => true,
            "llama" => false,
            _ => {
                return Err(Error::Unsupported {
                    kind: "tokenizer",
                    found: vocab.model,
                    supported: "gpt2, llama".into(),
                });
            }
        };
        vocab.validate()?;
        // A model is not loaded before its vocabulary is: two cores do what is most of that time.
        let (distinct, tokenizer) = rayon::join(
            || check_distinct(&vocab.tokens, cancel),
            || Self::build(&vocab, is_bpe, cancel),
        );
        distinct.and(tokenizer)
    }

    fn build(vocab: &Vocab, is_bpe: bool, cancel: &Cancel) -> Result<Self> {
        let n_tokens = vocab.tokens.len();
        let types: Vec<TokenType> = (0..n_tokens).map(|id| vocab.type_of(id)).collect();
        for (id, text) in vocab.tokens.iter().enumerate() {
            if types[id] == TokenType::Byte && byte_spelled(text).is_none() {
                let text = String::from_utf8_lossy(text);
                return bad(format!(
                    "tokenizer.ggml.tokens: token {id} is a byte: expected a spelling like <0x0A>, found `{text}`"
                ));
            }
        }
        let is_end = |text: &[u8]| ENDS.iter().any(|end| end.as_bytes() == text);
        let spelled = |id: u32| vocab.tokens.get(id as usize).unwrap_or_default();
        let type_of = |id: u32| types[id as usize];
        let ids = 0..n_tokens as u32;
        let named = |ids: &mut dyn Iterator<Item = u32>| {
            let with_text =
                ids.filter_map(|id| Some((std::str::from_utf8(spelled(id)).ok()?.to_owned(), id)));
            Specials::new(with_text)
        };
        // Tokens whose spelling says that they end a reply are parsed like control tokens.
        let parsed: Vec<bool> = ids
            .clone()
            .map(|id| type_of(id).is_special() || is_end(spelled(id)))
            .collect();
        let parsed = |id: u32| parsed[id as usize];
        let is_user_defined = |id: u32| type_of(id) == TokenType::UserDefined;
        let user_defined = named(&mut ids.clone().filter(|&id| is_user_defined(id) && !parsed(id)));
        let specials = named(&mut ids.clone().filter(|&id| is_user_defined(id) || parsed(id)));
        let mut ends: Vec<u32> = ids
            .clone()
            .filter(|&id| type_of(id) == TokenType::Control && is_end(spelled(id)))
            .chain([vocab.eot, vocab.eom].into_iter().flatten())
            .collect();

        let is_text =
            |id: u32| !parsed(id) && type_of(id) != TokenType::Byte && !spelled(id).is_empty();
        let default_id = |id: Option<u32>, default: u32| {
            id.or_else(|| Some(default).filter(|&id| !is_bpe && (id as usize) < n_tokens))
        };
        let (bos, eos) = (default_id(vocab.bos, 1), default_id(vocab.eos, 2));
        ends.extend(eos);
        ends.sort_unstable();
        ends.dedup();
        let (encoder, texts, add_bos) = if is_bpe {
            let (pretokenizer, whole_words) = Pretokenizer::from_name(&vocab.pre)?;
            let mut bytes = StringArray::default();
            let mut spellable = vec![false; n_tokens];
            let mut decoded = Vec::new();
            for (id, text) in vocab.tokens.iter().enumerate() {
                cancel.check()?;
                let as_spelled = parsed(id as u32)
                    || matches!(types[id], TokenType::UserDefined | TokenType::Byte);
                decoded.clear();
                if !as_spelled && bpe::decode_to(text, &mut decoded) {
                    bytes.push(&decoded)?;
                    spellable[id] = !decoded.is_empty();
                } else {
                    bytes.push(text)?;
                }
            }
            let bpe = Bpe::new(
                &vocab.merges,
                &bytes,
                |id| spellable[id as usize],
                pretokenizer,
                whole_words,
                cancel,
            )?;
            (Encoder::Bpe(bpe), bytes, whole_words)
        } else {
            let byte_of = |id| byte_spelled(spelled(id)).filter(|_| type_of(id) == TokenType::Byte);
            let spm = Spm::new(&vocab.tokens, &vocab.scores, is_text, byte_of);
            (Encoder::Spm(spm), vocab.tokens.clone(), true)
        };
        Ok(Tokenizer {
            encoder,
            texts,
            types,
            user_defined,
            specials,
            ends,
            bos,
            eos,
            pad: vocab.pad,
            add_bos: vocab.add_bos.unwrap_or(add_bos),
            add_eos: vocab.add_eos.unwrap_or(false),
            add_space_prefix: vocab.add_space_prefix.unwrap_or(true) && !is_bpe,
            chat_template: vocab.chat_template.clone(),
        })
    }

    /// The number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.types.len()
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token that fills a batch.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Whether a prompt begins with [`Tokenizer::bos`].
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether a text ends with [`Tokenizer::eos`].
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }

    /// Whether the model says with this token that its reply is over.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// The tokens that end a reply, ascending.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The type of a token; `None` if `id` is not below [`Tokenizer::n_vocab`].
    pub fn token_type(&self, id: u32) -> Option<TokenType> {
        self.types.get(id as usize).copied()
    }

    /// Whether a token steers the model and stands for no text.
    pub fn is_control(&self, id: u32) -> bool {
        self.token_type(id).is_some_and(TokenType::is_special)
    }

    /// The id of the control or user-defined token that is spelled so.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.specials.get(text)
    }

    /// The spellings that only [`Special::Parse`] turns into tokens, with these tokens.
    pub(crate) fn parsed_only(&self) -> impl Iterator<Item = (&str, u32)> {
        let in_text = |text| self.user_defined.get(text).is_some();
        self.specials.iter().filter(move |(text, _)| !in_text(text))
    }

    /// The tokens of `text`, without BOS or EOS. User-defined tokens are recognized either way.
    pub fn encode(&self, text: &str, special: Special) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        self.encode_to(text, special, &mut out);
        out
    }

    /// The tokens of `text` as a prompt: with BOS and EOS where the model wants them. A BOS that the text begins with,
    /// or an EOS that it ends with, is not doubled.
    pub fn encode_with_bos(&self, text: &str, special: Special) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 3 + 2);
        let bos = self.bos.filter(|_| self.add_bos);
        out.extend(bos);
        self.encode_to(text, special, &mut out);
        if bos.is_some() && out.get(1).copied() == bos {
            out.remove(0);
        }
        if let Some(eos) = self.eos.filter(|_| self.add_eos)
            && out.last() != Some(&eos)
        {
            out.push(eos);
        }
        out
    }

    /// [`Tokenizer::encode`], appended to `out`.
    pub fn encode_to(&self, mut text: &str, special: Special, out: &mut Vec<u32>) {
        let specials = match special {
            Special::Text => &self.user_defined,
            Special::Parse => &self.specials,
        };
        let mut space_prefix = self.add_space_prefix;
        while !text.is_empty() {
            let (part, rest) = text.split_at(text.floor_char_boundary(MAX_PART));
            text = rest;
            match &self.encoder {
                Encoder::Bpe(bpe) => {
                    let mut cache = WordCache::for_text(part);
                    specials.split(part, |part| match part {
                        Part::Token(id) => out.push(id),
                        Part::Text(text) => bpe.encode(&self.texts, text, &mut cache, out),
                    });
                }
                Encoder::Spm(spm) => specials.split(part, |part| match part {
                    Part::Token(id) => {
                        out.push(id);
                        space_prefix = self.add_space_prefix;
                    }
                    Part::Text(text) => {
                        spm.encode(&self.texts, text, space_prefix, out);
                        space_prefix = false;
                    }
                }),
            }
        }
    }

    /// The bytes that a token stands for: possibly part of a character, nothing for control tokens and ids out of range.
    pub fn token_bytes(&self, id: u32) -> Cow<'_, [u8]> {
        let Some(token_type) = self.token_type(id) else {
            return Cow::default();
        };
        let text = self.spelling(id);
        match (token_type, &self.encoder) {
            (TokenType::Control | TokenType::Unknown, _) => Cow::default(),
            (TokenType::Byte, _) => match byte_spelled(text) {
                Some(byte) => Cow::from(&BYTES[usize::from(byte)..][..1]),
                None => Cow::default(),
            },
            (TokenType::UserDefined, _) | (_, Encoder::Bpe(_)) => Cow::from(text),
            (_, Encoder::Spm(_)) => match std::str::from_utf8(text) {
                Ok(text) if text.contains(spm::SPACE) => {
                    Cow::from(text.replace(spm::SPACE, " ").into_bytes())
                }
                _ => Cow::from(text),
            },
        }
    }

    /// A token for people to read: what it stands for, or the spelling of a control token. Half a character shows as
    /// U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        let bytes = match self.token_type(id) {
            Some(TokenType::Control | TokenType::Unknown | TokenType::Byte) => {
                self.spelling(id).into()
            }
            _ => self.token_bytes(id),
        };
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of `ids`, control tokens left out. Bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text = String::new();
        for &id in ids {
            stream.push_to(id, &mut text);
        }
        text.push_str(&stream.flush());
        text
    }

    /// Decodes token by token from the start of a text. A space that encoding put before the text is taken off.
    pub fn stream(&self) -> Detokenizer<'_> {
        Detokenizer::new(self, self.add_space_prefix)
    }

    /// Decodes token by token what continues a text: nothing is taken off.
    pub fn stream_continued(&self) -> Detokenizer<'_> {
        Detokenizer::new(self, false)
    }

    /// The chat template in the model file.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// What the file says a token is; in a byte-level BPE decoded, but for special tokens.
    fn spelling(&self, id: u32) -> &[u8] {
        self.texts.get(id as usize).unwrap_or_default()
    }
}

/// The byte that `<0xNN>` spells.
fn byte_spelled(text: &[u8]) -> Option<u8> {
    let hex = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    if hex.len() != 2 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()
}

/// No two tokens may be spelled alike, but any number may be empty: these are never made from text.
fn check_distinct(tokens: &StringArray, cancel: &Cancel) -> Result<()> {
    let mut index = TextIndex::with_room_for(tokens.len());
    for (id, text) in (0u32..).zip(tokens.iter()) {
        cancel.check()?;
        if !text.is_empty()
            && let Some(other) = index.insert(tokens, id)
        {
            let text = String::from_utf8_lossy(text);
            return bad(format!(
                "tokenizer.ggml.tokens: expected distinct tokens, found `{text}` as {other} and as {id}"
            ));
        }
    }
    Ok(())
}
