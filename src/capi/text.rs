//! Texts to tokens, to text again, and to vectors.
#![allow(unsafe_code, reason = "C names, pointers and callbacks: see mod.rs")]

use std::ffi::c_char;
use std::ptr::{self, null_mut};

use super::handle;
use super::model::{ModelCell, kinglet_model};
use super::params::{self, Place, flag, kinglet_embed_params};
use super::session::{SessionCell, kinglet_session};
use super::values::{cancel_of, give_buffer, kinglet_buffer};
use super::{Failure, Outcome, Status, enter};
use crate::Cancel;
use crate::session::{Pooling, embed};
use crate::tokenizer::Special;

/// An array of the caller.
struct Array<T> {
    out: *mut T,
    cap: usize,
    len: *mut usize,
}

impl<T: Copy> Array<T> {
    /// # Safety
    /// `out` is null or has room for `cap` items, `len` is null or a place; nobody else uses them until this is dropped.
    unsafe fn of(out: *mut T, cap: usize, len: *mut usize) -> Outcome<Self> {
        if len.is_null() {
            return Err(Failure::argument("len: expected a place, found NULL"));
        }
        if out.is_null() && cap > 0 {
            return Err(Failure::argument(format!(
                "out: expected room for {cap} items, found NULL"
            )));
        }
        Ok(Self { out, cap, len })
    }

    /// Writes how many items there are or would be; an error if there is no room for them.
    fn reserve(&self, n: usize) -> Outcome {
        // SAFETY: `of` was promised the place.
        unsafe { self.len.write_unaligned(n) };
        if n > self.cap {
            return Err(Failure::new(
                Status::Space,
                format!("out: expected room for {n} items, found {}", self.cap),
            ));
        }
        Ok(())
    }

    /// Writes the items, and how many there are or would be.
    fn set(self, items: &[T]) -> Outcome {
        self.reserve(items.len())?;
        if !items.is_empty() {
            let bytes = size_of_val(items);
            // SAFETY: `of` was promised room for `cap` items, and there are no more.
            unsafe {
                ptr::copy_nonoverlapping(items.as_ptr().cast::<u8>(), self.out.cast(), bytes)
            };
        }
        Ok(())
    }
}

/// The tokens of a text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_tokenize(
    model: *mut kinglet_model,
    text: *const c_char,
    text_len: usize,
    flags: u32,
    tokens: *mut u32,
    tokens_cap: usize,
    n_tokens: *mut usize,
) -> Status {
    enter(|| {
        let cell = handle::get::<ModelCell>(model)?;
        // SAFETY: an array of the caller.
        let out = unsafe { Array::of(tokens, tokens_cap, n_tokens) }?;
        // SAFETY: a text of the caller.
        let text = unsafe { params::text("text", text, text_len) }?;
        if flags > 3 {
            return Err(Failure::argument(format!(
                "flags: expected kinglet_tokenize_flag, found {flags}"
            )));
        }
        let tokenizer = cell.model.tokenizer()?;
        let special = match flags & 2 {
            0 => Special::Text,
            _ => Special::Parse,
        };
        out.set(&match flags & 1 {
            0 => tokenizer.encode(text, special),
            _ => tokenizer.encode_with_bos(text, special),
        })
    })
}

/// The text of tokens.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_model_detokenize(
    model: *mut kinglet_model,
    out: *mut *mut kinglet_buffer,
    tokens: *const u32,
    n_tokens: usize,
) -> Status {
    enter(|| {
        // SAFETY: a place of the caller.
        let out = unsafe { Place::needed(out, null_mut()) }?;
        let cell = handle::get::<ModelCell>(model)?;
        let tokenizer = cell.model.tokenizer()?;
        if n_tokens > MAX_TOKENS || (tokens.is_null() && n_tokens > 0) {
            return Err(Failure::argument(format!(
                "tokens: expected at most {MAX_TOKENS}, found {n_tokens} at {tokens:?}"
            )));
        }
        // SAFETY: there are `n_tokens`, and `i` is below.
        let token = |i| unsafe { tokens.add(i).read_unaligned() };
        let tokens: Vec<u32> = (0..n_tokens).map(token).collect();
        let n_vocab = tokenizer.n_vocab();
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            return Err(Failure::argument(format!(
                "tokens: expected numbers below {n_vocab}, found {token}"
            )));
        }
        let mut stream = tokenizer.stream_continued();
        let mut text = String::new();
        tokens.iter().for_each(|t| stream.push_to(*t, &mut text));
        text += &stream.flush();
        out.set(give_buffer(text.into_bytes())?);
        Ok(())
    })
}

/// Tokens in a call at most.
const MAX_TOKENS: usize = 1 << 26;

/// A text as vectors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kinglet_session_embed(
    session: *mut kinglet_session,
    text: *const c_char,
    text_len: usize,
    params: *const kinglet_embed_params,
    out: *mut f32,
    out_cap: usize,
    out_len: *mut usize,
) -> Status {
    enter(|| {
        let cell = handle::get::<SessionCell>(session)?;
        // SAFETY: an array of the caller.
        let out = unsafe { Array::of(out, out_cap, out_len) }?;
        // SAFETY: a text of the caller.
        let text = unsafe { params::text("text", text, text_len) }?;
        // SAFETY: a struct of the caller.
        let params = unsafe { params::read(params) }?;
        let (pooling, raw, cancel) = match params {
            None => (Pooling::default(), false, Cancel::default()),
            Some(params) => {
                let pooling = match params.pooling {
                    0 | 1 => Pooling::Mean,
                    2 => Pooling::Last,
                    3 => Pooling::None,
                    other => {
                        return Err(Failure::argument(format!(
                            "pooling: expected a kinglet_pooling, found {other}"
                        )));
                    }
                };
                (pooling, flag("raw", params.raw)?, cancel_of(params.cancel)?)
            }
        };
        let tokens = cell
            .model
            .model
            .tokenizer()?
            .encode_with_bos(text, Special::Text);
        let hidden = cell.model.model.info().config.hidden;
        let n_vectors = pooling.n_vectors(tokens.len());
        if out.cap < n_vectors * hidden {
            return out.reserve(n_vectors * hidden); // says how much room it takes, before the work
        }
        let vectors = cell.take()?.work(|state| {
            let session = state.session_mut();
            session.set_cancel(&cancel);
            let vectors = embed(session, &tokens, pooling, !raw);
            session.set_cancel(&Cancel::default());
            Ok(vectors?)
        })?;
        out.set(&vectors)
    })
}
