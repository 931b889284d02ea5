//! What the node does, how well, and what the time is: metrics, health, clocks.

pub mod clock;
pub mod health;
pub mod metrics;
