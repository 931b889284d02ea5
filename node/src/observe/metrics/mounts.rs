//! The reports that mounts send with their keep-alives to the leader.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::SessionId;
use quorumfs_proto::statistics::ClientStatistics;
use serde::Serialize;
use utoipa::ToSchema;

/// Most mounts that are remembered; more are not shown.
const MOUNTS_MAX: usize = 1024;
/// A mount that was silent for this long (several keep-alives) is not shown any more.
const SILENCE_MS_MAX: u64 = 30_000;

/// The report of one mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct MountRow {
    /// The mount's session, in hexadecimal.
    pub session: String,
    /// Host, directory and process.
    pub description: String,
    /// Age of the report, in milliseconds.
    pub age_ms: u64,
    /// The mount's statistics since it was mounted.
    pub statistics: ClientStatistics,
}

#[derive(Debug)]
struct Heard {
    at: Instant,
    description: String,
    statistics: ClientStatistics,
}

/// The mounts heard recently.
#[derive(Debug, Default)]
pub struct Mounts {
    heard: Mutex<HashMap<SessionId, Heard>>,
}

impl Mounts {
    /// Records the report of a mount.
    pub fn heard(&self, session: SessionId, description: String, statistics: ClientStatistics) {
        let mut heard = self.heard.lock();
        if heard.len() >= MOUNTS_MAX && !heard.contains_key(&session) {
            heard.retain(|_, row| is_fresh(row));
            if heard.len() >= MOUNTS_MAX {
                return;
            }
        }
        let row = Heard {
            at: Instant::now(),
            description,
            statistics,
        };
        heard.insert(session, row);
    }

    /// Removes a mount whose session is over.
    pub fn closed(&self, session: SessionId) {
        self.heard.lock().remove(&session);
    }

    /// Returns the mounts heard recently, in the order of their descriptions.
    pub fn rows(&self) -> Vec<MountRow> {
        let mut heard = self.heard.lock();
        heard.retain(|_, row| is_fresh(row));
        let row = |(session, row): (&SessionId, &Heard)| MountRow {
            session: format!("{:016x}", session.0),
            description: row.description.clone(),
            age_ms: row.at.elapsed().as_millis() as u64,
            statistics: row.statistics.clone(),
        };
        let mut rows: Vec<MountRow> = heard.iter().map(row).collect();
        rows.sort_by(|a, b| (&a.description, &a.session).cmp(&(&b.description, &b.session)));
        rows
    }
}

fn is_fresh(row: &Heard) -> bool {
    row.at.elapsed() < Duration::from_millis(SILENCE_MS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_of_each_counts_and_there_is_a_bound() {
        let mounts = Mounts::default();
        for uptime_s in [1, 2] {
            let statistics = ClientStatistics {
                uptime_s,
                ..ClientStatistics::default()
            };
            mounts.heard(SessionId(1), String::from("a"), statistics);
        }
        assert_eq!(mounts.rows().len(), 1);
        assert_eq!(mounts.rows()[0].statistics.uptime_s, 2);
        for session in 0..2 * MOUNTS_MAX as u64 {
            mounts.heard(SessionId(session), String::new(), ClientStatistics::default());
        }
        assert_eq!(mounts.rows().len(), MOUNTS_MAX);
        mounts.closed(SessionId(1));
        assert_eq!(mounts.rows().len(), MOUNTS_MAX - 1);
    }
}
