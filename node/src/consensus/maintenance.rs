//! Periodic maintenance: the log's length, the free space on its disk, and a slow disk of a leader.

use std::time::{Duration, Instant};

use openraft::async_runtime::WatchReceiver;

use super::{Consensus, Ordering};

/// Interval of the maintenance. It also bounds the delay until a hanging flush is noticed.
const TICK: Duration = Duration::from_millis(200);
/// Least time between two requests for a snapshot or a purge.
const REQUEST_INTERVAL: Duration = Duration::from_secs(5);
/// The same when the log's reserve is used up: a snapshot would free space.
const PRESSED_REQUEST_INTERVAL: Duration = Duration::from_secs(1);
/// Longest time that a purge may wait for a follower that streams from the log, if the log is too long or its disk too
/// full.
const PURGE_PATIENCE: Duration = Duration::from_secs(1);
/// Least time between two handovers of leadership: if all disks are slow, leadership would move in circles.
const HAND_ON_INTERVAL: Duration = Duration::from_secs(30);
/// Below this many log files of free space, commands that take space are refused.
const ROOM_FILES_MIN: u64 = 2;

/// The time of the last action.
#[derive(Default)]
struct Last(Option<Instant>);

impl Last {
    /// Whether the action is due. If so, its time is set to now.
    fn due(&mut self, interval: Duration) -> bool {
        let due = self.0.is_none_or(|last| last.elapsed() >= interval);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// The requests to openraft that bound the log's length.
#[derive(Default)]
struct Asked {
    snapshot: Last,
    /// The entry up to which a purge was requested.
    purge_upto: u64,
    /// The time since which a purge has been waiting for a follower.
    waits_since: Option<Instant>,
}

impl Consensus {
    pub(super) async fn run_maintenance(self) {
        let (mut asked, mut hand_on) = (Asked::default(), Last::default());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.look_for_room().await;
            // A node in trouble keeps its log unchanged, since it may have nothing else: see `StateMachine::held_up`.
            // Only the space on its disk bounds the log then.
            if self.trouble().is_some() {
                continue;
            }
            self.bound_log(&mut asked).await;
            self.end_streams_that_hold_up(&mut asked);
            self.hand_on_if_slow(&mut hand_on).await;
            self.end_futile_hand_on();
        }
    }

    async fn look_for_room(&self) {
        let status = self.0.log.status();
        if !status.reserve_held {
            // Not awaited: creating the reserve takes long on a slow disk, and a lack of space is noticed at once.
            let log = self.0.log.clone();
            tokio::task::spawn_blocking(move || log.look_after_reserve());
        }
        let directory = self.0.options.directory.clone();
        let needed_bytes = ROOM_FILES_MIN * self.0.options.wal.file_bytes;
        let free = tokio::task::spawn_blocking(move || {
            nix::sys::statvfs::statvfs(&directory).map(|v| v.blocks_available() * v.fragment_size())
        });
        // If the free space is unknown, a full disk is noticed by a failed write, for which there is the reserve.
        let free_bytes = match free.await {
            Ok(Ok(free_bytes)) => free_bytes,
            _ => u64::MAX,
        };
        let room = status.reserve_held && !status.disk_full && free_bytes >= needed_bytes;
        if self.0.has_room.swap(room, Ordering::Relaxed) && !room {
            tracing::warn!(
                free_bytes,
                "the log's disk is nearly full: only commands that free space are admitted"
            );
        }
    }

    /// Requests a snapshot when the log has grown by many bytes since the last, and purges whole files behind it. If
    /// the disk is full and the reserve used up, it does so as soon as that frees space, and as much as possible.
    async fn bound_log(&self, asked: &mut Asked) {
        let (taken, raft) = {
            let raft = &self.0.raft;
            let metrics = raft.metrics();
            let taken = metrics.borrow_watched().snapshot;
            (taken, raft)
        };
        let is_pressed = self.0.log.is_pressed();
        let grown = self.0.log.bytes_after(taken.map(|id| id.index));
        let is_large = grown > self.0.options.snapshot_log_bytes + self.0.options.wal.file_bytes;
        let gives_room = is_pressed
            && self.purgeable_behind(self.0.metadata.durable_position().index, 0) > asked.purge_upto;
        let is_behind = taken.map_or(0, |id| id.index) < self.0.metadata.durable_position().index;
        if is_large && asked.snapshot.due(REQUEST_INTERVAL)
            || gives_room && is_behind && asked.snapshot.due(PRESSED_REQUEST_INTERVAL)
        {
            // An error means that openraft has stopped, which is reported elsewhere.
            let _ = raft.trigger().snapshot().await;
        }
        let Some(taken) = taken else { return };
        let keep_bytes = if is_pressed {
            0
        } else {
            self.0.options.keep_log_bytes
        };
        let upto = self.purgeable_behind(taken.index, keep_bytes);
        if upto > asked.purge_upto {
            asked.purge_upto = upto;
            let _ = raft.trigger().purge_log(upto).await;
        }
    }

    /// openraft does not purge entries that a follower still gets from the log. A follower that is slightly behind
    /// delays the purge; if the log becomes too long or the disk too full, the follower gets a snapshot instead.
    fn end_streams_that_hold_up(&self, asked: &mut Asked) {
        let purged = self.metrics().purged.map_or(0, |log_id| log_id.index);
        if purged >= asked.purge_upto || !self.is_leader() {
            asked.waits_since = None;
            return;
        }
        let waits_since = *asked.waits_since.get_or_insert_with(Instant::now);
        let is_long = self.0.log.weight_bytes() >= self.0.options.hold_log_bytes_max;
        if waits_since.elapsed() >= PURGE_PATIENCE && (is_long || self.0.log.is_pressed()) {
            self.0.cutoff.raise(asked.purge_upto);
        }
    }

    /// Returns the entry up to which whole files can be purged behind a snapshot of entry `index`, if `keep_bytes` stay
    /// and also the chunks that did not fit into the content store; 0 if none.
    fn purgeable_behind(&self, index: u64, keep_bytes: u64) -> u64 {
        let limit = self.0.flusher.purge_limit(index);
        let upto = limit.and_then(|limit| self.0.log.purgeable(limit, keep_bytes));
        upto.unwrap_or(0)
    }

    /// Hands on leadership if this leader's disk is slow, since every call waits for it, and another voter has all
    /// entries.
    async fn hand_on_if_slow(&self, hand_on: &mut Last) {
        let slowest_ms = self.0.log.take_slowest_flush_ms();
        if slowest_ms < self.0.options.slow_flush_ms || !self.is_leader() {
            return;
        }
        let candidates = self.voters_up_to_date();
        if candidates.is_empty() || !hand_on.due(HAND_ON_INTERVAL) {
            return;
        }
        match self.hand_on(candidates).await {
            Ok(to) => tracing::warn!(slowest_ms, %to, "flushing the log is slow: leadership is handed on"),
            Err(error) => {
                tracing::warn!(slowest_ms, %error, "flushing the log is slow, and leadership cannot be handed on")
            }
        }
    }
}
