//! Applying log entries: the only place where metadata changes.
//!
//! A [`Batch`](crate::Batch) applies entries one after the other to its own copy of the layers, which is then published
//! as a whole. This file has what all entries share: the time, and the lanes that make a mutation take effect once.
//! `writer` has the rows and the rollback of a refused mutation, `transaction` runs the operations of one mutation, the
//! other files are its operations.

mod attributes;
mod content;
mod namespace;
mod orphans;
mod rename;
mod rewrite;
mod sessions;
mod transaction;
mod unlinked;
mod writer;

use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{FsError, Outcome, RequestId};

use super::command::{Applied, ApplyResult, Crowded, Effects, LogBody, LogCommand};
use super::fault::{Failure, StorageFault};
use super::limits::check_feature_level;
use super::tables::{LaneRecord, Lanes, Replicas, Sessions};
use rewrite::Replaced;
use transaction::Transaction;
use writer::without_effects;

pub(super) use writer::RowWriter;

/// The result of a mutation that its lane had not decided before.
enum Decision {
    /// The mutation is decided, finally.
    Made(Result<Outcome, FsError>, Effects),
    /// The mutation is not decided: [`ApplyResult::Crowded`].
    Crowded(Crowded),
}

impl RowWriter {
    /// Applies one entry as a whole, or returns a verdict and changes nothing. After a fault the writer and the node
    /// must stop.
    pub(super) fn apply(&mut self, index: u64, entry: &LogCommand) -> Result<Applied, StorageFault> {
        let now = entry.stamp.max(self.summary.last_stamp.plus_nanoseconds(1));
        self.summary.last_stamp = now;
        self.index = index;
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
            LogBody::OpenSession { session, description } => {
                self.open_session(now, *session, description).map(without_effects)
            }
            LogBody::EndSession { session } => self.end_session(now, *session).map(without_effects),
            LogBody::ForgetSession { session } => self.forget_session(*session).map(without_effects),
            LogBody::ReclaimUnlinked { inode, extents_max } => {
                let effects = Transaction::reclaim_step(self, index, now, *inode, *extents_max)?;
                Ok(Applied {
                    result: ApplyResult::Done,
                    effects,
                })
            }
            LogBody::SetReplicas { replicas } => {
                // Below level 2 some nodes might not do this; then no node does.
                if self.summary.feature_level >= 2 {
                    self.summary.replicas = Replicas {
                        count: *replicas,
                        since_index: index,
                    };
                }
                Ok(without_effects(ApplyResult::Done))
            }
            LogBody::RaiseFeatureLevel { level } => {
                check_feature_level(*level)?;
                let before = self.summary.feature_level;
                self.summary.feature_level = before.max(*level);
                if before < 2 && *level >= 2 {
                    self.give_root_its_times(now)?;
                }
                Ok(without_effects(ApplyResult::Done))
            }
            LogBody::Audit => Ok(without_effects(ApplyResult::Done)),
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
                Transaction::rewrite_step(self, index, now, replaced, chunk)
            }
            LogBody::Settle {
                inode,
                through_version,
            } => self
                .settle_fragmented(*inode, *through_version)
                .map(|()| without_effects(ApplyResult::Done)),
            LogBody::OpenSessionWithKey {
                session,
                description,
                key,
            } => self
                .open_session_with_key(now, *session, description, key)
                .map(without_effects),
            LogBody::OpenContentSession {
                session,
                description,
                key,
            } => self
                .open_content_session(now, *session, description, key)
                .map(without_effects),
            LogBody::AnswerUnlinked { answers } => {
                self.answer_unlinked(answers)?;
                Ok(without_effects(ApplyResult::Done))
            }
            LogBody::Reclaim { work_max } => Ok(Applied {
                result: ApplyResult::Done,
                effects: Transaction::reclaim_some(self, index, now, *work_max)?,
            }),
            LogBody::NoteSilences { silences } => {
                self.note_silences(silences);
                Ok(without_effects(ApplyResult::Done))
            }
        }
    }

    /// Decides a mutation once. The session's lane shows whether it was decided before; if not, `run` decides it, given
    /// the session's low-water mark.
    fn decide(
        &mut self,
        request: &RequestId,
        run: impl FnOnce(&mut RowWriter, u64) -> Result<Decision, StorageFault>,
    ) -> Result<Applied, StorageFault> {
        let lane = (request.session, request.lane);
        let decided = self.get::<Lanes>(&lane)?;
        let last_sequence = decided.as_ref().map_or(0, |record| record.sequence);
        if let Some(record) = decided.filter(|record| record.sequence == request.sequence) {
            return Ok(without_effects(record.result));
        }
        // A session that has ended still gets earlier results; it gets no new ones.
        let Some(&low_water) = self.summary.living.get(&request.session) else {
            // While an ended session is known, its lanes are complete, and it never lives again. So the next mutation
            // of a lane was not decided, whoever sent it and however often.
            let is_next = last_sequence.checked_add(1) == Some(request.sequence);
            let is_remembered = is_next && self.get::<Sessions>(&request.session)?.is_some();
            return Ok(without_effects(match is_remembered {
                true => ApplyResult::NeverDecided,
                false => ApplyResult::UnknownSession,
            }));
        };
        if request.lane.0 >= LANES_MAX {
            let refused = ApplyResult::Outcome(Err(FsError::InvalidArgument));
            return Ok(without_effects(refused));
        }
        if last_sequence.checked_add(1) != Some(request.sequence) {
            return Ok(without_effects(ApplyResult::StaleSequence));
        }

        self.forget_silence(request.session);
        let (outcome, effects) = match run(self, low_water)? {
            Decision::Made(outcome, effects) => (outcome, effects),
            Decision::Crowded(place) => return Ok(without_effects(ApplyResult::Crowded(place))),
        };
        let result = ApplyResult::Outcome(outcome);
        let record = LaneRecord {
            sequence: request.sequence,
            result,
        };
        self.put::<Lanes>(&lane, &record);
        Ok(Applied {
            result: record.result,
            effects,
        })
    }
}
