//! This node's clock: how far it is off, by what NTP servers say, and what commands are stamped with.
//!
//! Clocks are for timestamps and the length of leases; no ordering rests on them. So a clock that is off, or that nobody
//! can vouch for, is told ([`ClockMonitor::report`], once in the log on change) and stops nothing. This node asks; it
//! never sets the system's clock: that is chrony's or the host's.

mod filter;
mod ntp;
mod stamp;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use tracing::{info, warn};

use self::filter::ClockFilter;
use self::ntp::NtpServers;

pub use self::filter::ClockState;
pub use self::stamp::StampClock;

use crate::wall_clock::unix_ms_ago;

/// Samples of a server are at least this far apart, as public servers want it; less where rounds are.
const SAMPLE_SPACING_MAX_MS: u64 = 2_000;

/// Compares this node's clock with NTP servers'.
pub struct ClockMonitor {
    servers: Vec<String>,
    interval: Duration,
    filter: Mutex<ClockFilter>,
}

/// What a node tells the others of its clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClockBelief {
    /// How it is.
    pub state: ClockState,
    /// What must be added to it, in microseconds, where that is known.
    pub offset_us: Option<i64>,
    /// How far that may be wrong.
    pub uncertainty_us: Option<u64>,
    /// Why it is not known, in words.
    pub reason: Option<String>,
}

/// What is known of this node's clock; for `/status` and `/health/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ClockReport {
    /// `off`: no server is to be asked. `unsynchronized`: none has answered, or not for long. `synchronized`.
    /// `skewed`: over a second off.
    pub state: ClockState,
    /// What must be added to this node's clock to get the server's time, in microseconds.
    pub offset_us: Option<i64>,
    /// Round trip to the server, without the time it took, in microseconds.
    pub delay_us: Option<u64>,
    /// How far `offset_us` may be wrong: half the delay, the server's own uncertainty, and drift since.
    pub uncertainty_us: Option<u64>,
    /// Which server it is from.
    pub server: Option<String>,
    /// How far that server is from a reference clock.
    pub stratum: Option<u8>,
    /// How long ago it was asked, in milliseconds.
    pub last_success_ms_ago: Option<u64>,
    /// When that was by this node's clock, in milliseconds since 1970.
    pub last_success_unix_ms: Option<u64>,
    /// Times that the servers were asked since the node started.
    pub rounds: u64,
    /// How many of these made nothing known.
    pub failed_rounds: u64,
    /// Whom this node asks.
    pub servers: Vec<String>,
    /// Why the last time made nothing known, if it did not.
    pub reason: Option<String>,
}

impl ClockMonitor {
    /// Asks `servers` (`HOST:PORT`; none: never) every `interval`, once it [runs](ClockMonitor::run).
    pub fn new(servers: Vec<String>, interval: Duration) -> Arc<ClockMonitor> {
        let filter = Mutex::new(ClockFilter::new(servers.is_empty()));
        Arc::new(ClockMonitor {
            servers,
            interval,
            filter,
        })
    }

    /// Asks again and again, for ever.
    pub async fn run(self: Arc<Self>) {
        if self.servers.is_empty() {
            return;
        }
        let spacing = Duration::from_millis(SAMPLE_SPACING_MAX_MS).min(self.interval / 16);
        let mut servers = NtpServers::new(self.servers.clone(), spacing);
        loop {
            let round = servers.ask().await;
            let (worth_telling, pause) = {
                let mut filter = self.filter.lock();
                (filter.record(round), filter.pause(self.interval))
            };
            if worth_telling {
                self.tell();
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn tell(&self) {
        let report = self.report();
        let (server, offset_us) = (report.server.as_deref(), report.offset_us);
        match report.state {
            ClockState::Off => {}
            ClockState::Synchronized => info!(
                server,
                offset_us,
                uncertainty_us = report.uncertainty_us,
                "this node's clock is synchronized"
            ),
            ClockState::Skewed => warn!(
                server,
                offset_us, "this node's clock is skewed: over a second off"
            ),
            ClockState::Unsynchronized => warn!(
                reason = report.reason,
                "this node's clock is unsynchronized; it works on"
            ),
        }
    }

    /// What the others are told.
    pub fn belief(&self) -> ClockBelief {
        let now = Instant::now();
        let filter = self.filter.lock();
        let estimate = filter.estimate();
        ClockBelief {
            state: filter.state(),
            offset_us: estimate.map(|estimate| estimate.sample.offset_us),
            uncertainty_us: estimate.map(|estimate| estimate.uncertainty_us(now)),
            reason: filter.reason().map(ToString::to_string),
        }
    }

    /// All that is known.
    pub fn report(&self) -> ClockReport {
        let now = Instant::now();
        let filter = self.filter.lock();
        let estimate = filter.estimate();
        let (rounds, failed_rounds) = filter.counts();
        let ago = filter.last_success().map(|at| now.saturating_duration_since(at));
        ClockReport {
            state: filter.state(),
            offset_us: estimate.map(|estimate| estimate.sample.offset_us),
            delay_us: estimate.map(|estimate| estimate.sample.delay_us),
            uncertainty_us: estimate.map(|estimate| estimate.uncertainty_us(now)),
            server: estimate.map(|estimate| estimate.server.clone()),
            stratum: estimate.map(|estimate| estimate.sample.stratum),
            last_success_ms_ago: ago.map(whole_ms),
            last_success_unix_ms: ago.map(unix_ms_ago),
            rounds,
            failed_rounds,
            servers: self.servers.clone(),
            reason: filter.reason().map(ToString::to_string),
        }
    }
}

/// A duration in whole milliseconds.
pub fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
