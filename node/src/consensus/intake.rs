//! Bounds what a follower takes from its leader's streams.
//!
//! Only a bounded number of bytes of entries is taken and not yet on disk. Work that waits for the disk in other places
//! continues, and may be what frees space.
//!
//! **While the log has no reserve** ([`LogStore::is_pressed`]) the node must stay able to take a snapshot, since the
//! log can only be purged behind one, and openraft asks the thread that applies for it. That thread waits for the log
//! ([`Flusher::wait_for_room`](super::flusher::Flusher::wait_for_room)), which may wait for the purge. So in this state
//! one message with entries is taken at a time, after all entries before it are on disk, and the commit index in it is
//! lowered to entries on disk ([`Stream::hold_back`]): nothing is applied that still waits for space. The next message,
//! at the latest the next heartbeat, brings the rest. A message without entries is always taken: it asks who leads.
//!
//! This module knows the log and the requests, not the contents of entries.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::log::LogStore;
use super::types::TypeConfig;

/// Bounds the delay until space that other streams free is noticed.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The bytes that all streams into one log have taken. Clones share it.
#[derive(Clone)]
pub struct Intake {
    log: LogStore,
    /// Most bytes taken that are not yet on disk, while there is a reserve; above it one more message is taken.
    waiting_bytes_max: u64,
    /// Bytes of entries that no stream has answered yet.
    taken_bytes: Arc<AtomicU64>,
}

/// The answering side of a stream. When it is dropped, its stream takes nothing more.
pub struct Answers {
    /// For each message that was taken and not answered, its bytes of entries, oldest first.
    unanswered: Mutex<VecDeque<u64>>,
    taken_bytes: Arc<AtomicU64>,
    answered: Notify,
}

/// The taking side of a stream.
#[derive(Clone)]
pub struct Stream {
    intake: Intake,
    answers: Weak<Answers>,
}

impl Intake {
    /// Makes the intake of `log`, whose files have `file_bytes`. Half a file of bytes may wait, so that the reserve,
    /// one file, has space for them.
    pub fn new(log: LogStore, file_bytes: u64) -> Intake {
        Intake {
            log,
            waiting_bytes_max: file_bytes / 2,
            taken_bytes: Arc::default(),
        }
    }

    /// Returns both sides of a new stream.
    pub fn stream(&self) -> (Stream, Arc<Answers>) {
        let answers = Arc::new(Answers {
            unanswered: Mutex::default(),
            taken_bytes: self.taken_bytes.clone(),
            answered: Notify::new(),
        });
        let stream = Stream {
            intake: self.clone(),
            answers: Arc::downgrade(&answers),
        };
        (stream, answers)
    }

    /// Returns the bytes of entries on their way to the disk. Entries between their append and their answer count
    /// twice.
    fn waiting_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Relaxed) + self.log.unflushed_bytes()
    }
}

impl Answers {
    /// Records that the oldest message has been answered: its entries are on disk (or refused).
    pub fn answered(&self) {
        let bytes = self.unanswered.lock().pop_front().unwrap_or(0);
        self.taken_bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.answered.notify_one();
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        let bytes: u64 = self.unanswered.lock().drain(..).sum();
        self.taken_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Stream {
    /// Waits until `request`, of `bytes`, may be taken. Returns false if its answer is no longer awaited.
    pub async fn admit(&self, request: &AppendEntriesRequest<TypeConfig>, bytes: u64) -> bool {
        let bytes = if request.entries.is_empty() { 0 } else { bytes };
        loop {
            let Some(answers) = self.answers.upgrade() else {
                return false;
            };
            let waiting_max = if self.intake.log.is_pressed() {
                0
            } else {
                self.intake.waiting_bytes_max
            };
            let is_room = self.intake.waiting_bytes() <= waiting_max;
            // A failed log reports its failure to the append.
            if bytes == 0 || is_room || !self.intake.log.is_healthy() {
                answers.unanswered.lock().push_back(bytes);
                self.intake.taken_bytes.fetch_add(bytes, Ordering::Relaxed);
                return true;
            }
            let _ = tokio::time::timeout(LOOK_INTERVAL, answers.answered.notified()).await;
        }
    }

    /// Lowers the commit index of an admitted `request`, if it would let entries be applied before they are on disk and
    /// that may take for ever.
    pub fn hold_back(&self, request: &mut AppendEntriesRequest<TypeConfig>) {
        if !self.intake.log.is_pressed() {
            return;
        }
        if !request.entries.is_empty() {
            // All entries before the request are on disk.
            request.leader_commit = request.leader_commit.min(request.prev_log_id);
        } else if self.intake.waiting_bytes() > 0 {
            request.leader_commit = None;
        }
    }
}
