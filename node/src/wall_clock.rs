//! The time of day, for people to read: nothing is decided by it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Returns the present time in milliseconds since 1970; 0 if the clock shows an earlier time.
pub fn unix_ms() -> u64 {
    unix_ms_ago(Duration::ZERO)
}

/// Returns the time `ago` before now, in milliseconds since 1970.
pub fn unix_ms_ago(ago: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(ago).as_millis()).unwrap_or(u64::MAX)
}
