//! The verbs against a cluster in memory.

mod failures;
mod order;
mod random;
pub(crate) mod reference;
mod removed;
mod verbs;
