//! The verbs against a cluster in memory.

mod kernel;
mod random;
pub(crate) mod reference;
mod support;
mod verbs;
