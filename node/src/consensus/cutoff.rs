//! Ends the streams of entries to followers for which the log has been kept for too long.
//!
//! openraft purges nothing that a follower still has to get from the log, for as long as its stream lives: one follower
//! that is slow, and not dead, would keep the whole log on the leader. When the stream ends with an error openraft goes
//! on with the purge that waits for it, and sends the follower a snapshot, since what it needs is gone.
//!
//! [`maintenance`](super::maintenance) decides when ([`Cutoff::raise`]), each stream asks whether it is meant
//! ([`Position`]). Knows which entries are sent, not what is in them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use tokio::sync::watch;
use tokio::time::Instant;

use super::types::TypeConfig;

/// A request without entries, to a follower that is behind the cutoff, waits so long for its answer. Heartbeats and read
/// barriers do not wait longer anyway; others keep openraft from noticing that the log is not waited for.
const QUESTION_PATIENCE: Duration = Duration::from_millis(500);

/// The entry up to which the log goes, whoever streams from it. Clones share it.
#[derive(Clone, Debug)]
pub struct Cutoff(Arc<watch::Sender<u64>>);

impl Default for Cutoff {
    fn default() -> Cutoff {
        Cutoff(Arc::new(watch::Sender::new(0)))
    }
}

impl Cutoff {
    /// Ends the streams to followers that have not acknowledged entry `upto`, now and later.
    pub fn raise(&self, upto: u64) {
        self.0.send_if_modified(|current| {
            let is_higher = *current < upto;
            *current = upto.max(*current);
            is_higher
        });
    }

    /// The position of a new stream, of which nothing is known yet.
    pub fn position(&self) -> Position {
        Position {
            acknowledged: AtomicU64::new(u64::MAX),
            has_entries: AtomicBool::new(false),
            deadline: OnceLock::new(),
            cutoff: self.0.subscribe(),
        }
    }
}

/// What a stream's follower has, and what it would need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overtaken {
    /// It has all up to this entry, or more.
    pub acknowledged: u64,
    /// Up to this one the log goes.
    pub upto: u64,
    /// Whether entries were sent.
    pub has_entries: bool,
}

/// How far one stream is.
#[derive(Debug)]
pub struct Position {
    /// The follower has all entries up to this one, as far as is known: those before the first request, or more.
    acknowledged: AtomicU64,
    /// Whether entries were sent, and not only questions.
    has_entries: AtomicBool,
    /// Until when it may go on with questions, once the log goes beyond what the follower has.
    deadline: OnceLock<Instant>,
    cutoff: watch::Receiver<u64>,
}

impl Position {
    /// `request` is sent.
    pub fn sends(&self, request: &AppendEntriesRequest<TypeConfig>) {
        let has_entries = !request.entries.is_empty();
        let previous = match request.prev_log_id {
            Some(log_id) => log_id.index,
            None if has_entries => 0,
            // A question that has nothing to do with the log.
            None => return,
        };
        // Only the first says what the follower has: what later ones follow has been sent, no more.
        let first = |current| (current == u64::MAX).then_some(previous);
        let _ = self
            .acknowledged
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, first);
        if has_entries {
            self.has_entries.store(true, Ordering::Relaxed);
        }
    }

    /// The follower has all up to entry `index`.
    pub fn acknowledged(&self, index: u64) {
        let further = |current| (current == u64::MAX || current < index).then_some(index);
        let _ = self
            .acknowledged
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, further);
    }

    /// Ends when the log goes beyond what the follower has. To be asked anew after each answer.
    pub async fn overtaken(&self) -> Overtaken {
        let mut cutoff = self.cutoff.clone();
        let is_beyond = |upto: &u64| *upto > self.acknowledged.load(Ordering::Relaxed);
        let Ok(upto) = cutoff.wait_for(is_beyond).await.map(|upto| *upto) else {
            // Nobody is left who could raise it.
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
