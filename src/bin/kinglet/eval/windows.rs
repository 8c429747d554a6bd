//! A text in windows of `-c` tokens, each read from an empty session, its first token replaced by BOS where the model
//! wants one; what follows its middle is scored.

use kinglet::Model;
use kinglet::tokenizer::Special;

use super::bos;
use crate::args::WindowArgs;
use crate::failure::{Failure, Outcome};
use crate::ui;

/// The windows of a text.
pub struct Windows {
    tokens: Vec<u32>,
    bos: Option<u32>,
    ctx: usize,
    n: usize,
}

impl Windows {
    pub fn open(model: &Model, args: &WindowArgs) -> Outcome<Self> {
        let ctx = args.ctx;
        if ctx < 4 {
            return Err(Failure::usage(format!(
                "-c: expected at least 4 tokens, found {ctx}"
            )));
        }
        let text = ui::read_prompt(&args.file)?;
        let tokenizer = model.tokenizer()?;
        let tokens = tokenizer.encode_with_bos(&text, Special::Text);
        if tokens.len() < 2 * ctx {
            return Err(Failure::usage(format!(
                "{}: expected at least {} tokens for windows of {ctx}, found {}",
                args.file.display(),
                2 * ctx,
                tokens.len()
            )));
        }
        let windows = Self {
            n: (tokens.len() / ctx).min(args.chunks.unwrap_or(usize::MAX)),
            bos: bos(tokenizer),
            tokens,
            ctx,
        };
        ui::note(&format!(
            "{} windows of {ctx} tokens, {} in the text",
            windows.n,
            windows.tokens.len()
        ));
        Ok(windows)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Tokens of the text.
    pub fn n_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// What of a window is read, in two parts: tokens that are not scored, tokens that predict another; and the latter's
    /// successors.
    pub fn iter(&self) -> impl Iterator<Item = (Vec<u32>, &[u32], &[u32])> {
        let windows = self.tokens.chunks_exact(self.ctx).take(self.n);
        windows.map(|window| {
            let (first, last) = (self.ctx / 2, self.ctx - 1);
            let mut unscored = window[..first].to_vec();
            if let Some(bos) = self.bos {
                unscored[0] = bos;
            }
            (unscored, &window[first..last], &window[first + 1..])
        })
    }
}
