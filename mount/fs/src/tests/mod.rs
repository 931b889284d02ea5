//! The verbs against a cluster in memory.

mod appends;
mod failures;
mod found;
mod kernel;
mod leased;
mod order;
mod random;
mod removed;
mod support;
mod unnamed;
mod verbs;
