//! The filesystem on a cluster in memory.

mod appends;
mod create_race;
mod failures;
mod kernel;
mod leased;
mod order;
mod random;
mod support;
mod unlinked;
mod unnamed;
mod verbs;
