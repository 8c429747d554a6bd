//! (elementwise tests)
