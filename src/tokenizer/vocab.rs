//! The vocabulary as a model file states it, before anything is derived from it: plain data, checked on the way into a
//! [`Tokenizer`](super::Tokenizer).

use crate::gguf::{Metadata, StringArray};
use crate::{Error, Result};

/// What a token is for, as numbered in `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TokenType {
    /// 0: not stated; treated as [`TokenType::Normal`].
    Undefined = 0,
    /// 1: text.
    Normal = 1,
    /// 2: stands for what the vocabulary cannot spell.
    Unknown = 2,
    /// 3: steers the model; never made from the text of a user.
    Control = 3,
    /// 4: text that is cut out before everything else.
    UserDefined = 4,
    /// 5: never trained.
    Unused = 5,
    /// 6: one byte, spelled `<0xNN>`.
    Byte = 6,
}

impl TokenType {
    /// The type with this number.
    pub fn from_number(number: i64) -> Option<TokenType> {
        Some(match number {
            0 => TokenType::Undefined,
            1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => return None,
        })
    }

    /// Control and unknown tokens: never made from text unless the caller asks for them to be parsed.
    pub(super) fn is_special(self) -> bool {
        matches!(self, TokenType::Control | TokenType::Unknown)
    }
}

/// More tokens than any vocabulary has, and few enough that ids of tokens and of merge results fit in 32 bits.
const MAX_TOKENS: usize = 1 << 28;

/// The `tokenizer.*` keys of a model file. Lists are parallel to `tokens`; an empty list stands for a missing key.
#[derive(Debug, Clone, Default)]
pub struct Vocab {
    /// `tokenizer.ggml.model`: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
    pub model: String,
    /// `tokenizer.ggml.pre`: the pre-tokenizer of a BPE; empty if the file has none.
    pub pre: String,
    /// `tokenizer.ggml.tokens`: the spelling of each token.
    pub tokens: StringArray,
    /// `tokenizer.ggml.scores`: the merge priority of SentencePiece tokens, higher first.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`
    pub types: Vec<TokenType>,
    /// `tokenizer.ggml.merges`: pairs `left right` by falling priority.
    pub merges: StringArray,
    /// `tokenizer.ggml.bos_token_id`
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: ends a message that expects a tool's answer.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`: SentencePiece only.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`
    pub chat_template: Option<String>,
}

impl Vocab {
    /// Reads the `tokenizer.*` keys of a model file.
    ///
    /// # Errors
    /// [`Error::BadModel`] if a key is missing, or its value is of a wrong type or out of range.
    pub fn from_metadata(metadata: &Metadata) -> Result<Vocab> {
        const TYPES: &str = "tokenizer.ggml.token_type";
        let id = |name: &str| metadata.opt_u32(&format!("tokenizer.ggml.{name}_token_id"));
        let model = metadata.str("tokenizer.ggml.model")?;
        let numbers = metadata.opt_i32s(TYPES)?.unwrap_or_default();
        let mut types = Vec::with_capacity(numbers.len());
        for (idx, &number) in numbers.iter().enumerate() {
            match TokenType::from_number(number.into()) {
                Some(token_type) => types.push(token_type),
                None => {
                    return bad(format!(
                        "{TYPES}: entry {idx}: expected a number from 0 to 6, found {number}"
                    ));
                }
            }
        }
        Ok(Vocab {
            model: model.to_owned(),
            pre: metadata
                .opt_str("tokenizer.ggml.pre")?
                .unwrap_or_default()
                .to_owned(),
            tokens: metadata.strings("tokenizer.ggml.tokens")?.clone(),
            scores: metadata
                .opt_f32s("tokenizer.ggml.scores")?
                .unwrap_or_default()
                .into_owned(),
            types,
            merges: if model == "gpt2" {
                metadata.strings("tokenizer.ggml.merges")?.clone()
            } else {
                StringArray::default()
            },
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unk: id("unknown")?,
            pad: id("padding")?,
            add_bos: metadata.opt_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.opt_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.opt_bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: metadata
                .opt_str("tokenizer.chat_template")?
                .map(str::to_owned),
        })
    }

    /// Checks what can be checked list by list: lengths, ids in range, numbers finite, no two tokens alike.
    pub(super) fn validate(&self) -> Result<()> {
        let n = self.tokens.len();
        if n == 0 {
            return bad("tokenizer.ggml.tokens: expected at least one token, found none");
        }
        if n > MAX_TOKENS {
            return bad(format!(
                "tokenizer.ggml.tokens: expected at most {MAX_TOKENS} tokens, found {n}"
            ));
        }
        if self.merges.len() > MAX_TOKENS {
            let found = self.merges.len();
            return bad(format!(
                "tokenizer.ggml.merges: expected at most {MAX_TOKENS} pairs, found {found}"
            ));
        }
        for (key, len) in [
            ("tokenizer.ggml.scores", self.scores.len()),
            ("tokenizer.ggml.token_type", self.types.len()),
        ] {
            if len != 0 && len != n {
                return bad(format!(
                    "{key}: expected {n} entries, one for each token, found {len}"
                ));
            }
        }
        if let Some(idx) = self.scores.iter().position(|s| s.is_nan()) {
            return bad(format!(
                "tokenizer.ggml.scores: entry {idx}: expected a number, found NaN"
            ));
        }
        for (key, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("eom", self.eom),
            ("unknown", self.unk),
            ("padding", self.pad),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return bad(format!(
                    "tokenizer.ggml.{key}_token_id: expected an id below {n}, the number of tokens, found {id}"
                ));
            }
        }
        Ok(())
    }

    /// The type of token `id`.
    pub(super) fn type_of(&self, id: usize) -> TokenType {
        self.types.get(id).copied().unwrap_or(TokenType::Normal)
    }
}

/// `Err` with a message about a vocabulary.
pub(super) fn bad<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::BadModel(what.into()))
}
