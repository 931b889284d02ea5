//! What a follower takes from its leader's streams, and when.
//!
//! No more than so many bytes of entries are taken and not yet on the disk: who waits for the disk elsewhere goes on with
//! the rest of its work, which may be what makes room.
//!
//! **While the log has no reserve** ([`LogStore::is_pressed`]) the node must stay able to take a snapshot, since only
//! behind one can the log be purged, and openraft asks the thread that applies for it. That thread waits for the log
//! ([`Flusher::wait_for_room`](super::flusher::Flusher::wait_for_room)), which may wait for the purge. So then one
//! message with entries is taken at a time, when all before it are on the disk, and nothing is said to be committed that
//! is not ([`Stream::hold_back`]): nothing is applied that still has to find room. The next message, at the latest the
//! next heartbeat, brings the rest. What has no entries is always taken: it asks who leads.
//!
//! Knows the log and the requests, not what is in the entries.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::log::LogStore;
use super::types::TypeConfig;

/// Bounds how late room is seen that others than this stream make.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What all streams into one log have taken; clones share it.
#[derive(Clone)]
pub struct Intake {
    log: LogStore,
    /// Most bytes taken that are not yet on the disk, while there is a reserve: beyond it one more message.
    waiting_bytes_max: u64,
    /// Bytes of entries that no stream has answered yet.
    taken_bytes: Arc<AtomicU64>,
}

/// The answering side of a stream: when it is gone, its stream takes nothing more.
pub struct Answers {
    /// Bytes of entries in each message that was taken and not answered, oldest first.
    unanswered: Mutex<VecDeque<u64>>,
    taken_bytes: Arc<AtomicU64>,
    answered: Notify,
}

/// The taking side.
#[derive(Clone)]
pub struct Stream {
    intake: Intake,
    answers: Weak<Answers>,
}

impl Intake {
    /// Into `log`, kept in files of `file_bytes`: half of one may wait, so that the reserve, which is one, has room for it.
    pub fn new(log: LogStore, file_bytes: u64) -> Intake {
        Intake {
            log,
            waiting_bytes_max: file_bytes / 2,
            taken_bytes: Arc::default(),
        }
    }

    /// Both sides of a new stream.
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

    /// Bytes of entries on their way to the disk. Those between their append and their answer count twice.
    fn waiting_bytes(&self) -> u64 {
        self.taken_bytes.load(Ordering::Relaxed) + self.log.unflushed_bytes()
    }
}

impl Answers {
    /// The oldest message has been answered, so its entries are on the disk (or refused).
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
    /// Waits until `request`, of `bytes`, may be taken. False: nobody waits for its answer any more.
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
            // A log that has failed says so to who appends.
            if bytes == 0 || is_room || !self.intake.log.is_healthy() {
                answers.unanswered.lock().push_back(bytes);
                self.intake.taken_bytes.fetch_add(bytes, Ordering::Relaxed);
                return true;
            }
            let _ = tokio::time::timeout(LOOK_INTERVAL, answers.answered.notified()).await;
        }
    }

    /// Takes from `request`, which was admitted, what would let entries be applied before they are on the disk, where
    /// that may take for ever.
    pub fn hold_back(&self, request: &mut AppendEntriesRequest<TypeConfig>) {
        if !self.intake.log.is_pressed() {
            return;
        }
        if !request.entries.is_empty() {
            // All before it are on the disk.
            request.leader_commit = request.leader_commit.min(request.prev_log_id);
        } else if self.intake.waiting_bytes() > 0 {
            request.leader_commit = None;
        }
    }
}
