//! What a node does so that nobody has to: missing content is fetched, bad copies are found and made anew, dead content
//! is freed.

pub mod audit;
pub mod completeness;
pub mod names;
pub mod pace;
pub mod recovery;
pub mod repair;
pub mod sweep;

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, in milliseconds since 1970, for people to read: no decision rests on it.
fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}
