//! A flag by which another thread stops work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Says whether work is still wanted. Clones are the same flag; it stays set.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<Flag>);

#[derive(Debug, Default)]
struct Flag {
    is_set: AtomicBool,
    parent: Option<Cancel>,
}

impl Cancel {
    /// A flag of its own that counts as set where this one is, too.
    pub fn child(&self) -> Self {
        Self(Arc::new(Flag {
            is_set: AtomicBool::new(false),
            parent: Some(self.clone()),
        }))
    }

    /// Whoever works with this flag stops soon: between two operations of a forward pass.
    pub fn cancel(&self) {
        self.0.is_set.store(true, Ordering::Relaxed); // nothing else is told by it
    }

    /// Whether somebody has called [`Cancel::cancel`].
    #[inline]
    pub fn is_cancelled(&self) -> bool {
        let Flag { is_set, parent } = &*self.0;
        is_set.load(Ordering::Relaxed) || parent.as_ref().is_some_and(Cancel::is_cancelled)
    }

    /// # Errors
    /// [`Error::Cancelled`] if it is.
    #[inline]
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}
