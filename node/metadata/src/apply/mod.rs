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
mod rewrite;
mod sessions;
mod transaction;
mod unlinked;

use std::sync::Arc;

use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{FsError, InodeNumber, Outcome, RequestId, Timestamp, codec};

use super::command::{Applied, CallResult, Crowded, Effects, FEATURE_LEVEL, LogBody, LogCommand};
use super::fault::{Failure, StorageFault};
use super::overlay::{Cell, Direction, KeyRange, Layers};
use super::store::{MetadataStore, Position, Summary};
use super::tables::{Inodes, LaneRecord, Lanes, Meta, Replicas, RowKey, RowOf, Rows, Sessions, Table};
use rewrite::Replaced;
use transaction::Transaction;

/// How many extents (or pins, or extended attributes) one command may free beyond those it overwrites; what is more is
/// left to [`LogBody::ReclaimUnlinked`]. A few milliseconds' work. (This part's own tests take it so low that the steps
/// are taken.)
pub const COMMAND_FREED_EXTENTS_MAX: u32 = if cfg!(test) { 3 } else { 4096 };

/// How many cuts a file has at most: a further truncation waits until the older ones have been dealt with.
const CUTS_MAX: usize = if cfg!(test) { 3 } else { 64 };
/// From this level on the work of every command is bounded, fragmented files are noted, and writes and extended
/// attributes follow the rules of Linux' own filesystems.
pub(super) const BOUNDED_WORK_LEVEL: u32 = 3;

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
    /// Of the entry that is being applied.
    pub(super) index: u64,
    /// Everything written since the batch began, in order.
    pub(super) journal: Vec<Change>,
    /// Set by a mutation that stopped because of it.
    pub(super) crowded: Option<Crowded>,
}

/// What became of a mutation that its lane had not decided before.
enum Decision {
    /// It is decided, for ever.
    Made(Result<Outcome, FsError>, Effects),
    /// It is not: [`CallResult::Crowded`].
    Crowded(Crowded),
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
            index: 0,
            journal: Vec::new(),
            crowded: None,
        }
    }

    fn get<R: Rows>(&self, key: &R::Key) -> Result<Option<R::Value>, StorageFault> {
        self.layers.get::<R>(key)
    }

    /// The keys and values of at most `max` rows.
    fn collect<R: Rows>(&self, range: KeyRange, max: usize) -> Result<Vec<RowOf<R>>, StorageFault> {
        self.layers.scan::<R>(range, Direction::Up)?.take(max).collect()
    }

    /// At most `max` keys; values, which may be large, stay where they are.
    fn collect_keys<R: Rows>(&self, range: KeyRange, max: usize) -> Result<Vec<R::Key>, StorageFault> {
        let keys = self.layers.scan_keys::<R>(range, Direction::Up)?;
        keys.take(max).collect()
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
        self.writer.index = index;
        match &entry.body {
            LogBody::Call(mutation) => self.decide(&mutation.request, |writer, low_water| {
                let mark = writer.mark();
                let run = Transaction::run(writer, index, now, mutation, low_water);
                let decided = match Failure::split(run)? {
                    Ok((outcome, effects)) => (Ok(outcome), effects),
                    Err(verdict) => {
                        writer.roll_back(mark);
                        if let Some(crowded) = writer.crowded.take() {
                            return Ok(Decision::Crowded(crowded));
                        }
                        (Err(verdict), Effects::default())
                    }
                };
                if mutation.chunk_low_water > low_water {
                    writer.raise_low_water(mutation.request.session, mutation.chunk_low_water)?;
                }
                let (outcome, effects) = decided;
                Ok(Decision::Made(outcome, effects))
            }),
            LogBody::Refuse { request, verdict } => self.decide(request, |_, _| {
                Ok(Decision::Made(Err(*verdict), Effects::default()))
            }),
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
            LogBody::Rewrite {
                inode,
                from,
                extents,
                digest,
                chunk,
            } => {
                let replaced = Replaced {
                    inode: *inode,
                    from: *from,
                    extents: *extents,
                    digest: *digest,
                };
                Transaction::rewrite_step(&mut self.writer, index, now, replaced, chunk)
            }
            LogBody::Settle {
                inode,
                through_version,
            } => self
                .writer
                .settle_fragmented(*inode, *through_version)
                .map(|()| without_effects(CallResult::Done)),
            LogBody::OpenSessionWithKey {
                session,
                description,
                key,
            } => self
                .writer
                .open_session_with_key(now, *session, description, key)
                .map(without_effects),
            LogBody::OpenContentSession {
                session,
                description,
                key,
            } => self
                .writer
                .open_content_session(now, *session, description, key)
                .map(without_effects),
            LogBody::AnswerUnlinked { answers } => {
                self.writer.answer_unlinked(answers)?;
                Ok(without_effects(CallResult::Done))
            }
            LogBody::Reclaim { work_max } => Ok(Applied {
                result: CallResult::Done,
                effects: Transaction::reclaim_some(&mut self.writer, index, now, *work_max)?,
            }),
            LogBody::NoteSilences { silences } => {
                self.writer.note_silences(silences);
                Ok(without_effects(CallResult::Done))
            }
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
        run: impl FnOnce(&mut Writer, u64) -> Result<Decision, StorageFault>,
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

        self.writer.forget_silence(request.session);
        let (outcome, effects) = match run(&mut self.writer, low_water)? {
            Decision::Made(outcome, effects) => (outcome, effects),
            Decision::Crowded(place) => return Ok(without_effects(CallResult::Crowded(place))),
        };
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
