//! Applying log entries: the one place where metadata changes.
//!
//! A [`Batch`] applies entries one after the other on its own copy of the layers and is then published as a whole. This
//! file has what is common to all entries: the time, the lanes that make a mutation happen once, and the way back from
//! a refused one. `transaction` runs the operations of one mutation, the other files are its verbs.

mod attributes;
mod content;
mod namespace;
mod orphans;
mod rename;
mod sessions;
mod transaction;

use std::sync::Arc;

use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{FsError, InodeNumber, Outcome, RequestId, Timestamp, codec};

use super::command::{Applied, CallResult, Effects, FEATURE_LEVEL, LogBody, LogCommand};
use super::fault::{Failure, StorageFault};
use super::overlay::{Cell, Direction, KeyRange, Layers};
use super::store::{MetadataStore, Position, Summary};
use super::tables::{Inodes, LaneRecord, Lanes, Meta, Replicas, RowKey, RowOf, Rows, Sessions, Table};
use transaction::Transaction;

/// How many extents (or pins, or extended attributes) one command may free beyond those it overwrites; what is more is
/// left to [`LogBody::ReclaimUnlinked`]. A few milliseconds' work. (This part's own tests take it so low that the steps
/// are taken.)
pub const COMMAND_FREED_EXTENTS_MAX: u32 = if cfg!(test) { 3 } else { 4096 };

/// A row that was written, and what the active overlay had in its place.
pub(super) struct Change {
    pub(super) table: Table,
    pub(super) key: RowKey,
    previous: Option<Cell>,
}

/// The rows as the batch sees and changes them.
pub(super) struct Writer {
    pub(super) layers: Layers,
    pub(super) summary: Summary,
    /// Everything written since the batch began, in order.
    pub(super) journal: Vec<Change>,
}

/// A moment of a [`Writer`] to which it can go back.
struct Mark {
    journal_length: usize,
    summary: Summary,
}

impl Writer {
    pub(super) fn new(layers: Layers, summary: Summary) -> Writer {
        Writer {
            layers,
            summary,
            journal: Vec::new(),
        }
    }

    fn get<R: Rows>(&self, key: &R::Key) -> Result<Option<R::Value>, StorageFault> {
        self.layers.get::<R>(key)
    }

    /// The keys and values of at most `max` rows.
    fn collect<R: Rows>(&self, range: KeyRange, max: usize) -> Result<Vec<RowOf<R>>, StorageFault> {
        self.layers.scan::<R>(range, Direction::Up)?.take(max).collect()
    }

    fn put<R: Rows>(&mut self, key: &R::Key, value: &R::Value) {
        let encoded = codec::encode_checked(value);
        self.set(R::TABLE, R::key(key), Some(Arc::from(&encoded[..])));
    }

    fn remove<R: Rows>(&mut self, key: &R::Key) {
        self.set(R::TABLE, R::key(key), None);
    }

    fn set(&mut self, table: Table, key: RowKey, cell: Cell) {
        let previous = Arc::make_mut(&mut self.layers.active).set(table, key.clone(), cell);
        self.journal.push(Change { table, key, previous });
    }

    /// The root directory is made before there is a time; it gets one as soon as all members can give it.
    fn give_root_its_times(&mut self, now: Timestamp) -> Result<(), StorageFault> {
        let Some(mut root) = self.get::<Inodes>(&InodeNumber::ROOT)? else {
            return Err(StorageFault::inconsistent("there is no root directory"));
        };
        let times = [
            &mut root.attributes.atime,
            &mut root.attributes.mtime,
            &mut root.attributes.ctime,
            &mut root.attributes.birth_time,
        ];
        for time in times.into_iter().filter(|time| **time == Timestamp::default()) {
            *time = now;
        }
        self.put::<Inodes>(&InodeNumber::ROOT, &root);
        Ok(())
    }

    fn mark(&self) -> Mark {
        Mark {
            journal_length: self.journal.len(),
            summary: self.summary.clone(),
        }
    }

    fn roll_back(&mut self, mark: Mark) {
        let active = Arc::make_mut(&mut self.layers.active);
        for change in self.journal.drain(mark.journal_length..).rev() {
            active.restore(change.table, change.key, change.previous);
        }
        self.summary = mark.summary;
    }
}

/// Entries that are being applied; nobody sees what they did before [`Batch::publish`]. A batch that is dropped did
/// nothing.
pub struct Batch<'store> {
    store: &'store MetadataStore,
    writer: Writer,
    freezes_at_begin: u64,
}

impl<'store> Batch<'store> {
    pub(super) fn new(store: &'store MetadataStore, writer: Writer, freezes_at_begin: u64) -> Batch<'store> {
        Batch {
            store,
            writer,
            freezes_at_begin,
        }
    }

    /// Applies one entry: all of it, or nothing and a verdict. After a fault the batch, and the node, must not go on.
    pub fn apply(&mut self, index: u64, entry: &LogCommand) -> Result<Applied, StorageFault> {
        let now = entry
            .stamp
            .max(self.writer.summary.last_stamp.plus_nanoseconds(1));
        self.writer.summary.last_stamp = now;
        match &entry.body {
            LogBody::Call(mutation) => self.decide(&mutation.request, |writer, low_water| {
                let mark = writer.mark();
                let run = Transaction::run(writer, index, now, mutation, low_water);
                let decided = match Failure::split(run)? {
                    Ok((outcome, effects)) => (Ok(outcome), effects),
                    Err(verdict) => {
                        writer.roll_back(mark);
                        (Err(verdict), Effects::default())
                    }
                };
                if mutation.chunk_low_water > low_water {
                    writer.raise_low_water(mutation.request.session, mutation.chunk_low_water)?;
                }
                Ok(decided)
            }),
            LogBody::Refuse { request, verdict } => {
                self.decide(request, |_, _| Ok((Err(*verdict), Effects::default())))
            }
            LogBody::OpenSession { session, description } => self
                .writer
                .open_session(now, *session, description)
                .map(without_effects),
            LogBody::EndSession { session } => self.writer.end_session(now, *session).map(without_effects),
            LogBody::ForgetSession { session } => self.writer.forget_session(*session).map(without_effects),
            LogBody::ReclaimUnlinked { inode, extents_max } => {
                let effects = Transaction::reclaim_step(&mut self.writer, index, now, *inode, *extents_max)?;
                Ok(Applied {
                    result: CallResult::Done,
                    effects,
                })
            }
            LogBody::SetReplicas { replicas } => {
                // Below level 2 some node might not do this: then no node does.
                if self.writer.summary.feature_level >= 2 {
                    self.writer.summary.replicas = Replicas {
                        count: *replicas,
                        since_index: index,
                    };
                }
                Ok(without_effects(CallResult::Done))
            }
            LogBody::RaiseFeatureLevel { level } => {
                check_feature_level(*level)?;
                let before = self.writer.summary.feature_level;
                self.writer.summary.feature_level = before.max(*level);
                if before < 2 && *level >= 2 {
                    self.writer.give_root_its_times(now)?;
                }
                Ok(without_effects(CallResult::Done))
            }
            LogBody::Audit => Ok(without_effects(CallResult::Done)),
        }
    }

    /// Makes what was applied visible to views at once; `position` is that of the last entry (of entries without a
    /// command too).
    pub fn publish(mut self, position: Position) {
        self.writer.summary.position = position;
        let meta = self.writer.summary.meta();
        self.writer.put::<Meta>(&(), &meta);
        self.store.publish(self.writer, self.freezes_at_begin);
    }

    /// A mutation, once: its lane tells whether it was decided before; if not, `run` decides it. `run` is told the
    /// session's low-water mark.
    fn decide(
        &mut self,
        request: &RequestId,
        run: impl FnOnce(&mut Writer, u64) -> Result<(Result<Outcome, FsError>, Effects), StorageFault>,
    ) -> Result<Applied, StorageFault> {
        let lane = (request.session, request.lane);
        let decided = self.writer.get::<Lanes>(&lane)?;
        let last_sequence = decided.as_ref().map_or(0, |record| record.sequence);
        if let Some(record) = decided.filter(|record| record.sequence == request.sequence) {
            return Ok(without_effects(record.result));
        }
        // Of a session that has ended, what was decided is still told; nothing new is.
        let Some(&low_water) = self.writer.summary.living.get(&request.session) else {
            // As long as the session is remembered its lanes are complete, and it never lives again: what is next in a lane
            // was not decided, whoever sent it and however often.
            let is_next = last_sequence.checked_add(1) == Some(request.sequence);
            let is_remembered = is_next && self.writer.get::<Sessions>(&request.session)?.is_some();
            return Ok(without_effects(match is_remembered {
                true => CallResult::NeverDecided,
                false => CallResult::UnknownSession,
            }));
        };
        if request.lane.0 >= LANES_MAX {
            let refused = CallResult::Outcome(Err(FsError::InvalidArgument));
            return Ok(without_effects(refused));
        }
        if last_sequence.checked_add(1) != Some(request.sequence) {
            return Ok(without_effects(CallResult::StaleSequence));
        }

        let (outcome, effects) = run(&mut self.writer, low_water)?;
        let result = CallResult::Outcome(outcome);
        let record = LaneRecord {
            sequence: request.sequence,
            result,
        };
        self.writer.put::<Lanes>(&lane, &record);
        Ok(Applied {
            result: record.result,
            effects,
        })
    }
}

/// A program must not go on with a state of which it does not know what belongs to it.
pub(super) fn check_feature_level(level: u32) -> Result<(), StorageFault> {
    match level <= FEATURE_LEVEL {
        true => Ok(()),
        false => Err(StorageFault::UnknownFeatures {
            found: level,
            known: FEATURE_LEVEL,
        }),
    }
}

fn without_effects(result: CallResult) -> Applied {
    Applied {
        result,
        effects: Effects::default(),
    }
}
