//! The verbs against a cluster in memory.

mod random;
pub(crate) mod reference;
mod verbs;
