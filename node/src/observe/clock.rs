//! This node's clock: its offset according to NTP servers, and the clock with which commands are stamped.
//!
//! Clocks are used for timestamps and the length of leases; no ordering depends on them. So a clock that is off, or
//! that no server confirms, is reported ([`ClockMonitor::report`], and once in the log on change) and stops nothing.
//! The node never sets the system's clock: that is the task of chrony or the host.

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

/// Least time between two samples of a server, as public servers require; less if rounds are shorter.
const SAMPLE_SPACING_MAX_MS: u64 = 2_000;

/// Compares this node's clock with the clocks of NTP servers.
pub struct ClockMonitor {
    servers: Vec<String>,
    interval: Duration,
    filter: Mutex<ClockFilter>,
}

/// The clock information that a node sends to the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClockBelief {
    /// State of the clock.
    pub state: ClockState,
    /// The value to add to the clock, in microseconds, if known.
    pub offset_us: Option<i64>,
    /// Possible error of the offset, in microseconds.
    pub uncertainty_us: Option<u64>,
    /// Why the offset is unknown.
    pub reason: Option<String>,
}

/// The state of this node's clock; for `/status` and `/health/status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ClockReport {
    /// `off`: no server is configured. `unsynchronized`: no server has answered, ever or recently. `synchronized`.
    /// `skewed`: more than a second off.
    pub state: ClockState,
    /// The value to add to this node's clock to get the server's time, in microseconds.
    pub offset_us: Option<i64>,
    /// Round trip to the server without the server's own time, in microseconds.
    pub delay_us: Option<u64>,
    /// Possible error of `offset_us`, in microseconds: half the delay, the server's own uncertainty, and drift since.
    pub uncertainty_us: Option<u64>,
    /// The server of this estimate.
    pub server: Option<String>,
    /// The server's distance from a reference clock.
    pub stratum: Option<u8>,
    /// Time since its answer, in milliseconds.
    pub last_success_ms_ago: Option<u64>,
    /// Time of its answer by this node's clock, in milliseconds since 1970.
    pub last_success_unix_ms: Option<u64>,
    /// Rounds of questions since the node started.
    pub rounds: u64,
    /// Rounds without a result.
    pub failed_rounds: u64,
    /// The configured servers.
    pub servers: Vec<String>,
    /// Why the last round had no result, if it had none.
    pub reason: Option<String>,
}

impl ClockMonitor {
    /// Makes a monitor that asks `servers` (`HOST:PORT`; none: never) every `interval`, once it
    /// [runs](ClockMonitor::run).
    pub fn new(servers: Vec<String>, interval: Duration) -> Arc<ClockMonitor> {
        let filter = Mutex::new(ClockFilter::new(servers.is_empty()));
        Arc::new(ClockMonitor {
            servers,
            interval,
            filter,
        })
    }

    /// Asks repeatedly; never returns.
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
                "the clock of this node is synchronized"
            ),
            ClockState::Skewed => warn!(
                server,
                offset_us,
                "the clock of this node is skewed by more than a second: check its time synchronization"
            ),
            ClockState::Unsynchronized => warn!(
                reason = report.reason,
                "the clock of this node is unsynchronized; the node continues"
            ),
        }
    }

    /// Returns the information for the other nodes.
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

    /// Returns the full report.
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

/// Returns a duration in whole milliseconds.
pub fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
