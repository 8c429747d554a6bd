//! (attention tests)
