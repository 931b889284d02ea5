//! Counters and distributions that are cheap to record and can be read at any time.
//!
//! - [`Distribution`]: values (nanoseconds, entries of a flush, …) with their quantiles, to about 3 %.
//! - [`CallCounter`]: calls of one kind, with their failures, bytes and durations.
//!
//! Recording takes a handful of relaxed atomic additions: no lock, no allocation, from any thread. Reading takes a
//! [`Snapshot`], which may miss a value that is being recorded at that moment. Counters are never reset, so any number
//! of readers can compute their own differences.
//!
//! The buckets are those of the crate `histogram`: HdrHistogram's layout over atomic counters. The crate `hdrhistogram`
//! needs `&mut` or one recorder for each thread; `prometheus` and `prometheus-client` fix a few buckets and have no
//! quantiles.
//!
//! This crate does not know what is measured or how it is shown.

mod call_counter;
mod distribution;

pub use call_counter::{CallCounter, CallCounterSnapshot, Ending};
pub use distribution::{Distribution, Latency, Snapshot};
