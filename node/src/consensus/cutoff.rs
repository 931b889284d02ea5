//! Ends the streams of entries to followers for which the log has been kept too long.
//!
//! openraft purges nothing that a follower still has to get from the log while its stream is open: one slow follower
//! that is not dead would keep the whole log on the leader. When the stream ends with an error, openraft continues with
//! the purge that waited for it, and sends the follower a snapshot, since the entries it needs are gone.
//!
//! [`maintenance`](super::maintenance) decides when ([`Cutoff::raise`]); each stream checks whether it is concerned
//! ([`Position`]). This module knows which entries are sent, not their contents.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use tokio::sync::watch;
use tokio::time::Instant;

use super::types::TypeConfig;

/// A request without entries to a follower behind the cutoff waits this long for its answer. Heartbeats and read
/// barriers wait no longer in any case; other requests would delay openraft's notice that the stream has ended.
const QUESTION_PATIENCE: Duration = Duration::from_millis(500);

/// The entry up to which followers must have the log. Clones share it.
#[derive(Clone, Debug)]
pub struct Cutoff(Arc<watch::Sender<u64>>);

impl Default for Cutoff {
    fn default() -> Cutoff {
        Cutoff(Arc::new(watch::Sender::new(0)))
    }
}

impl Cutoff {
    /// Ends present and later streams to followers that have not acknowledged entry `upto`.
    pub fn raise(&self, upto: u64) {
        self.0.send_if_modified(|current| {
            let is_higher = *current < upto;
            *current = upto.max(*current);
            is_higher
        });
    }

    /// Returns the position of a new stream, of which nothing is known yet.
    pub fn position(&self) -> Position {
        Position {
            acknowledged: AtomicU64::new(u64::MAX),
            has_entries: AtomicBool::new(false),
            deadline: OnceLock::new(),
            cutoff: self.0.subscribe(),
        }
    }
}

/// The entries that a stream's follower has and needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overtaken {
    /// The follower has all entries up to this one, or more.
    pub acknowledged: u64,
    /// The entry up to which followers must have the log.
    pub upto: u64,
    /// Whether entries were sent.
    pub has_entries: bool,
}

/// The progress of one stream.
#[derive(Debug)]
pub struct Position {
    /// The follower is known to have all entries up to this one: those before the first request, or more.
    acknowledged: AtomicU64,
    /// Whether entries were sent, besides requests without entries.
    has_entries: AtomicBool,
    /// The time until which the stream may continue with requests without entries, after the log has passed the
    /// follower.
    deadline: OnceLock<Instant>,
    cutoff: watch::Receiver<u64>,
}

impl Position {
    /// Records that `request` is sent.
    pub fn sends(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let has_entries = !request.entries.is_empty();
        let previous = match request.prev_log_id {
            Some(log_id) => log_id.index,
            None if has_entries => 0,
            // A request without reference to the log.
            None => return,
        };
        // Only the first request shows what the follower has: the later ones follow entries that were only sent.
        let first = |current| (current == u64::MAX).then_some(previous);
        let _ = self
            .acknowledged
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, first);
        if has_entries {
            self.has_entries.store(true, Ordering::Relaxed);
        }
    }

    /// Records that the follower has all entries up to `index`.
    pub fn acknowledged(&self, index: u64) {
        let further = |current| (current == u64::MAX || current < index).then_some(index);
        let _ = self
            .acknowledged
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, further);
    }

    /// Resolves when the cutoff passes the follower's entries. Must be called again after each answer.
    pub async fn overtaken(&self) -> Overtaken {
        let mut cutoff = self.cutoff.clone();
        let is_beyond = |upto: &u64| *upto > self.acknowledged.load(Ordering::Relaxed);
        let Ok(upto) = cutoff.wait_for(is_beyond).await.map(|upto| *upto) else {
            // No sender is left that could raise the cutoff.
            return std::future::pending().await;
        };
        if !self.has_entries.load(Ordering::Relaxed) {
            let deadline = self.deadline.get_or_init(|| Instant::now() + QUESTION_PATIENCE);
            tokio::time::sleep_until(*deadline).await;
        }
        Overtaken {
            acknowledged: self.acknowledged.load(Ordering::Relaxed),
            upto,
            has_entries: self.has_entries.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::consensus::types::{Entry, LogId, Vote, VoterId};

    fn request(previous: u64, entries: usize) -> AppendEntriesRequest<TypeConfig> {
        let log_id = |index| LogId::new_term_index(1, index);
        let entry = |index| Entry {
            log_id: log_id(index),
            payload: openraft::EntryPayload::Blank,
        };
        AppendEntriesRequest {
            vote: Vote::new_committed(1, VoterId::from(1)),
            prev_log_id: Some(log_id(previous)),
            entries: (1..=entries as u64).map(|at| entry(previous + at)).collect(),
            leader_commit: None,
        }
    }

    fn overtaken(acknowledged: u64, upto: u64, has_entries: bool) -> Overtaken {
        Overtaken {
            acknowledged,
            upto,
            has_entries,
        }
    }

    #[test]
    fn a_stream_ends_when_the_log_goes_beyond_what_its_follower_has() {
        let cutoff = Cutoff::default();
        let stream = cutoff.position();
        stream.sends(&request(10, 40));
        stream.sends(&request(50, 1));
        cutoff.raise(10);
        assert_eq!(
            stream.overtaken().now_or_never(),
            None,
            "it needs none of the first ten"
        );
        cutoff.raise(40);
        assert_eq!(stream.overtaken().now_or_never(), Some(overtaken(10, 40, true)));
        stream.acknowledged(40);
        assert_eq!(stream.overtaken().now_or_never(), None);
        cutoff.raise(20);
        assert_eq!(stream.overtaken().now_or_never(), None, "it never falls");
        let late = cutoff.position();
        assert_eq!(late.overtaken().now_or_never(), None, "nothing is known of it");
        late.sends(&request(39, 1));
        assert_eq!(
            late.overtaken().now_or_never(),
            Some(overtaken(39, 40, true)),
            "also one that begins later"
        );
    }

    #[tokio::test]
    async fn a_question_has_time_for_its_answer() {
        let cutoff = Cutoff::default();
        let stream = cutoff.position();
        stream.sends(&request(10, 0));
        cutoff.raise(40);
        let began = tokio::time::Instant::now();
        assert_eq!(stream.overtaken().await, overtaken(10, 40, false));
        assert!(began.elapsed() >= QUESTION_PATIENCE);
    }
}
