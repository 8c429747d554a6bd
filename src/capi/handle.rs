//! Handles: places in a table, and how often each was used. Nobody outside holds a pointer, so a handle that was released
//! is told from one that is alive, and what it named lives as long as a call works with it.

use std::any::Any;
use std::ptr::without_provenance_mut;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Failure, Status};

/// What is behind a handle.
pub(super) trait Object: Send + Sync + 'static {
    /// What C calls it.
    const NAME: &'static str;
    /// The type that C has pointers to.
    type Opaque;
}

struct Place {
    /// Uses so far: the upper half of a handle. The first is 1.
    uses: usize,
    object: Option<Arc<dyn Any + Send + Sync>>,
}

struct Table {
    places: Vec<Place>,
    free: Vec<usize>,
}

static TABLE: RwLock<Table> = RwLock::new(Table {
    places: Vec::new(),
    free: Vec::new(),
});

/// Bits of a handle that name its place.
const PLACE_BITS: u32 = usize::BITS / 2;
const MOST: usize = (1 << PLACE_BITS) - 1;

// No code that can panic in the middle of a change runs under the lock.
fn read() -> RwLockReadGuard<'static, Table> {
    TABLE.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Table> {
    TABLE.write().unwrap_or_else(PoisonError::into_inner)
}

/// A new handle.
pub(super) fn give<T: Object>(object: Arc<T>) -> Result<*mut T::Opaque, Failure> {
    let mut table = write();
    let at = match table.free.pop() {
        Some(at) => at,
        None if table.places.len() < MOST => {
            table.places.push(Place {
                uses: 0,
                object: None,
            });
            table.places.len() - 1
        }
        None => {
            let what = format!("handles: expected at most {MOST} at once, found one more");
            return Err(Failure::new(Status::Memory, what));
        }
    };
    let place = &mut table.places[at];
    place.uses += 1;
    place.object = Some(object);
    Ok(without_provenance_mut(place.uses << PLACE_BITS | at))
}

/// What `handle` names.
pub(super) fn get<T: Object>(handle: *mut T::Opaque) -> Result<Arc<T>, Failure> {
    let object =
        named(&read(), handle.addr()).and_then(|object| Arc::clone(object).downcast().ok());
    object.ok_or_else(|| {
        let found = match handle.is_null() {
            true => "NULL",
            false => "one that was released, or is of another kind",
        };
        Failure::new(
            Status::Handle,
            format!("{0}: expected a {0} handle, found {found}", T::NAME),
        )
    })
}

/// The same; NULL is none.
pub(super) fn get_some<T: Object>(handle: *mut T::Opaque) -> Result<Option<Arc<T>>, Failure> {
    match handle.is_null() {
        true => Ok(None),
        false => get(handle).map(Some),
    }
}

/// Forgets `handle`; what it named, if it was one.
pub(super) fn take<T: Object>(handle: *mut T::Opaque) -> Option<Arc<T>> {
    let mut table = write();
    named(&table, handle.addr()).filter(|object| object.is::<T>())?;
    let at = handle.addr() & MOST;
    let place = &mut table.places[at];
    let object = place.object.take();
    // Never the same handle twice: a place that has no numbers left is not used again.
    if place.uses < MOST {
        table.free.push(at);
    }
    drop(table); // what ends with the object ends outside of the lock
    object?.downcast().ok()
}

fn named(table: &Table, handle: usize) -> Option<&Arc<dyn Any + Send + Sync>> {
    let place = table.places.get(handle & MOST)?;
    let object = place.object.as_ref();
    object.filter(|_| place.uses == handle >> PLACE_BITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Number(u32);
    struct Word;
    impl Object for Number {
        const NAME: &'static str = "number";
        type Opaque = Number;
    }
    impl Object for Word {
        const NAME: &'static str = "word";
        type Opaque = Number;
    }

    #[test]
    fn a_handle_is_good_once_and_for_its_kind() {
        let first = give(Arc::new(Number(1))).expect("room");
        assert_eq!(get::<Number>(first).ok().map(|n| n.0), Some(1));
        assert!(get::<Word>(first).is_err());
        assert!(take::<Word>(first).is_none());
        assert!(take::<Number>(first).is_some());
        assert!(take::<Number>(first).is_none());
        assert!(get::<Number>(first).is_err());
        let more: Vec<_> = (0..100)
            .map(|i| give(Arc::new(Number(i))).expect("room"))
            .collect();
        assert!(!more.contains(&first));
        for (i, handle) in more.iter().enumerate() {
            let number = take::<Number>(*handle).expect("it was given");
            assert_eq!(number.0 as usize, i);
        }
        assert!(get::<Number>(without_provenance_mut(usize::MAX)).is_err());
    }
}
