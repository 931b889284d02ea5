//! Counters and distributions that are cheap to record and can be read at any time.
//!
//! - [`Distribution`]: values (nanoseconds, entries of a flush, …) with their quantiles, to about 3 %.
//! - [`CallCounter`]: calls of one kind, with their failures, bytes and durations.
//!
//! Recording is a handful of relaxed atomic additions: no lock, no allocation, from any thread. Reading takes a
//! [`Snapshot`], which may miss what is being recorded that moment. Nothing is ever reset, so any number of readers can
//! each make their own differences.
//!
//! The buckets are the `histogram` crate's: HdrHistogram's layout over atomic counters. (`hdrhistogram` needs `&mut`
//! or a recorder for each thread; `prometheus` and `prometheus-client` fix a few buckets and know no quantiles.)
//!
//! It knows nothing of what is measured, nor of how it is shown.

mod call_counter;
mod distribution;

pub use call_counter::{CallCounter, Ending, TallySnapshot};
pub use distribution::{Distribution, Latency, Snapshot};
