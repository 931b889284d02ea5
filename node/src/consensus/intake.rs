//! What a follower takes from its leader's stream, and when.
//!
//! No more than so many bytes are taken and not yet on the disk: who waits for the disk elsewhere goes on with the rest
//! of its work, which may be what makes room.
//!
//! **While the log has no reserve** ([`LogStore::is_pressed`]) the node must stay able to take a snapshot, since only
//! behind one can the log be purged, and openraft asks the thread that applies for it. That thread waits for the log
//! ([`Flusher::wait_for_room`](super::flusher::Flusher::wait_for_room)), which may wait for the purge. So then one
//! message is taken at a time, when all before it are on the disk, and what it says of the commit is used only as far as
//! the entries before its own ([`Intake::hold_back`]): nothing is applied that still has to find room. The next
//! message, at the latest the next heartbeat, brings the rest.
//!
//! Knows the log and the requests, not what is in the entries.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use openraft::raft::AppendEntriesRequest;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::log::LogStore;
use super::types::TypeConfig;

/// Most bytes taken that are not yet on the disk: half a log file, so that the reserve, which is one, has room for them.
const OUTSTANDING_BYTES_MAX: u64 = 32 << 20;
/// Bounds how late room is seen that others than this stream make.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Outstanding {
    messages: VecDeque<u64>,
    bytes: u64,
}

/// What was taken and not answered. Held by who answers: when that is gone, nothing more is taken.
pub struct Answers {
    outstanding: Mutex<Outstanding>,
    answered: Notify,
}

impl Answers {
    /// The oldest message has been answered, so it is on the disk (or refused).
    pub fn answered(&self) {
        let mut outstanding = self.outstanding.lock();
        let bytes = outstanding.messages.pop_front().unwrap_or(0);
        outstanding.bytes -= bytes;
        drop(outstanding);
        self.answered.notify_one();
    }
}

/// The taking side of one stream; see the module.
#[derive(Clone)]
pub struct Intake {
    log: LogStore,
    answers: Weak<Answers>,
}

/// Both sides of a stream whose entries go to `log`.
pub fn intake(log: LogStore) -> (Intake, Arc<Answers>) {
    let answers = Arc::new(Answers {
        outstanding: Mutex::default(),
        answered: Notify::new(),
    });
    let intake = Intake {
        log,
        answers: Arc::downgrade(&answers),
    };
    (intake, answers)
}

impl Intake {
    /// Waits until a message of `bytes` may be taken. False: nobody waits for its answer any more.
    pub async fn admit(&self, bytes: u64) -> bool {
        loop {
            let Some(answers) = self.answers.upgrade() else {
                return false;
            };
            {
                let mut outstanding = answers.outstanding.lock();
                let most = if self.log.is_pressed() {
                    0
                } else {
                    OUTSTANDING_BYTES_MAX
                };
                // A message without entries counts too: its answer comes behind those of the others.
                let is_room = outstanding.bytes <= most && self.log.unflushed_bytes() <= most;
                if is_room || !self.log.is_healthy() {
                    outstanding.messages.push_back(bytes);
                    outstanding.bytes += bytes;
                    return true;
                }
            }
            let _ = tokio::time::timeout(LOOK_INTERVAL, answers.answered.notified()).await;
        }
    }

    /// Takes from `request` what would let its own entries be applied before they are on the disk, where that may take
    /// for ever.
    pub fn hold_back(&self, request: &mut AppendEntriesRequest<TypeConfig>) {
        if self.log.is_pressed() && !request.entries.is_empty() {
            request.leader_commit = request.leader_commit.min(request.prev_log_id);
        }
    }
}
