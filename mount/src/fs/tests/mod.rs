//! The verbs against a cluster in memory.

mod random;
mod reference;
mod verbs;
