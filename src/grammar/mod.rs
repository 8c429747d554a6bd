//! What a reply may be: JSON by a schema, or text by a grammar. The work is that of the crate llguidance, with the feature
//! `grammar`: an Earley parser that walks the vocabulary as a tree of bytes.
//!
//! | File | What |
//! |---|---|
//! | `guide.rs` | vocabulary and source to a [`Constraint`](crate::sampler::Constraint) |
//! | `locate.rs` | where in a schema the error is |

#[cfg(feature = "grammar")]
mod guide;
#[cfg(feature = "grammar")]
mod locate;

#[cfg(feature = "grammar")]
pub(crate) use self::guide::Lexicon;

/// What a reply must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyFormat<'a> {
    /// JSON that a schema (draft 2020-12, `$ref` within it) describes, with at most one space or line break with
    /// indentation between two of its signs. The schema's key `x-guidance` says otherwise, see llguidance's manual.
    JsonSchema(&'a str),
    /// A text of a grammar in llguidance's variant of Lark, whose start is `start`.
    Lark(&'a str),
}

impl ReplyFormat<'_> {
    /// What messages call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            ReplyFormat::JsonSchema(_) => "JSON schema",
            ReplyFormat::Lark(_) => "grammar",
        }
    }

    /// Its source.
    pub fn text(&self) -> &str {
        match self {
            ReplyFormat::JsonSchema(text) | ReplyFormat::Lark(text) => text,
        }
    }
}
