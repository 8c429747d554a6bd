//! Ctrl-C: ends the reply that is being made, else the program.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::failure::INTERRUPTED;

static BUSY: AtomicBool = AtomicBool::new(false);
static HIT: AtomicBool = AtomicBool::new(false);

/// Something that looks at [`hit`] is running. Until this is dropped, the first Ctrl-C is left to it.
pub struct Busy(());

impl Drop for Busy {
    fn drop(&mut self) {
        BUSY.store(false, SeqCst);
    }
}

/// Takes Ctrl-C over. Where that is refused, it ends the program as ever.
pub fn install() {
    let _ = ctrlc::set_handler(|| {
        // The second one does not wait for the first to be seen.
        if !BUSY.load(SeqCst) || HIT.swap(true, SeqCst) {
            std::process::exit(INTERRUPTED.into());
        }
    });
}

/// Says that something will look at [`hit`].
pub fn busy() -> Busy {
    HIT.store(false, SeqCst);
    BUSY.store(true, SeqCst);
    Busy(())
}

/// Whether Ctrl-C was hit since [`busy`].
pub fn hit() -> bool {
    HIT.load(SeqCst)
}
