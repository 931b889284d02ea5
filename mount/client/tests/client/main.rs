//! The client against a cluster that is told how to misbehave.

// A test's helpers fail as tests do.
#![allow(clippy::unwrap_used)]

mod abandoned;
mod calls;
mod content;
mod ended;
mod fake;
mod proxy;
mod sessions;
