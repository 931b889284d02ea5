//! The client with a fake cluster that has configurable faults.

// A test's helpers fail as tests do.
#![allow(clippy::unwrap_used)]

mod abandoned;
mod calls;
mod content;
mod ended;
mod fake;
mod proxy;
mod sessions;
