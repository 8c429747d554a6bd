//! What a reply may be, told token by token: a mask over the vocabulary before all other samplers.

use std::fmt::Debug;

use crate::error::Result;

/// What replies may be.
pub trait Constraint: Debug + Send + Sync {
    /// Begins to follow a reply.
    fn start(&self) -> Box<dyn Follow>;
}

/// Follows one reply.
pub trait Follow: Send {
    /// The tokens that may come next, a bit each: token 0 is the lowest bit of the first word, and what lies beyond the
    /// last word may not come. The end of the reply is among them where it may end.
    ///
    /// # Errors
    /// If none may come, or it cannot be told.
    fn allowed(&mut self) -> Result<&[u32]>;

    /// Tells it the token that came.
    ///
    /// # Errors
    /// If that may not come.
    fn accept(&mut self, token: u32) -> Result<()>;

    /// Whether nothing may follow any more but the end.
    fn is_complete(&self) -> bool;

    /// Takes the last `n` tokens back, as [`Session::truncate`](crate::Session::truncate) does.
    ///
    /// # Errors
    /// If there are not so many.
    fn take_back(&mut self, n: usize) -> Result<()>;

    /// The same once more, to go its own way, as [`Session::fork`](crate::Session::fork) does.
    fn fork(&self) -> Box<dyn Follow>;
}

/// Whether the bit of `token` is set.
pub(super) fn is_allowed(allowed: &[u32], token: usize) -> bool {
    let word = allowed.get(token / 32).copied().unwrap_or(0);
    word >> (token % 32) & 1 == 1
}
