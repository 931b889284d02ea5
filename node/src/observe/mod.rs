//! Observation: metrics, health and clocks.

pub mod clock;
pub mod health;
pub mod metrics;
